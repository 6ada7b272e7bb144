"""`neuron-xtts say`, with the trained miniature: files, pipes, players, and what is stopped and goes on."""

import copy
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
import wave

import numpy as np
import pytest
import torch

from neuron_xtts import Voice
from neuron_xtts.coqui.models import load_tts
from neuron_xtts.coqui.voices import settings_of
from neuron_xtts.narration.encoding import FORMATS, to_int16
from neuron_xtts.tools import say
from neuron_xtts.tools.cli import main

TEXT = "Hello world. [pause:0.5] Good morning. How are you?"
LONG = " ".join(["Hello world.", "Good morning.", "How are you?"] * 10)


@pytest.fixture(scope="module")
def loaded(miniature):
    """Never patch this one: copy it."""
    return load_tts(miniature)


@pytest.fixture
def run(loaded, miniature, monkeypatch, tmp_path):
    """Run the command in this process, on a model that need not be loaded again."""
    monkeypatch.setattr(say, "load_or_download", lambda checkpoint: copy.deepcopy(loaded))

    def command(*arguments, voice=("--speaker-wav", miniature / "f5.wav")):
        voices = ("--voices", tmp_path / "voices")
        return main(["say", *map(str, (*arguments, *voices, *voice))])

    return command


@pytest.fixture
def process(miniature):
    """Start the command in a process of its own."""

    def start(*arguments, **options):
        command = [sys.executable, "-m", "neuron_xtts", "say", *arguments, "--checkpoint", miniature]
        threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # of which rounding depends
        command = [*map(str, command), "--speaker-wav", str(miniature / "f5.wav")]
        return subprocess.Popen(command, env=threads, **options)

    return start


def samples(path):
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24000, 1, 2)
        found = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    assert path.stat().st_size == 44 + 2 * len(found)  # the length in the header is the true one
    return found


def alike(found, expected):
    """Whether samples are the same but for the last digits, which rows of fp32 that decode together change."""
    return len(found) == len(expected) and np.abs(found.astype(int) - expected).max() <= 2


def refused(capsys, status):
    assert status == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("neuron-xtts: ")
    return line


@pytest.mark.slow
def test_one_sentence_is_what_inference_says(run, loaded, miniature, tmp_path):
    assert run("Hello world.", "-o", tmp_path / "a.wav", "--seed", 3, "--no-guard") == 0
    xtts = loaded.synthesizer.tts_model
    voice = Voice.of(loaded, miniature / "f5.wav")
    torch.manual_seed(3)
    expected = xtts.inference("Hello world.", "en", **voice.arguments, **settings_of(xtts))["wav"]
    found = samples(tmp_path / "a.wav")
    assert len(found) == len(expected)
    assert np.abs(found.astype(int) - to_int16(np.asarray(expected))).max() <= 1
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.slow
def test_json_says_when_each_sentence_is_heard(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("secrets.randbits", lambda _: 3)
    assert run(TEXT, "-o", tmp_path / "a.wav", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert os.listdir(tmp_path) == ["a.wav"]  # the parts are gone
    found = samples(tmp_path / "a.wav")
    assert said["seconds"] == len(found) / 24000
    assert said["rtf"] == pytest.approx(said["took"] * 24000 / sum(
        round(24000 * (span["end"] - span["start"])) for span in said["sentences"]
    ))  # fmt: skip
    assert [span["text"] for span in said["sentences"]] == ["Hello world.", "Good morning.", "How are you?"]
    ends = [(round(span["start"] * 24000), round(span["end"] * 24000)) for span in said["sentences"]]
    (begin, first), (second, middle), (third, end) = ends
    assert (begin, end, second - first, third - middle) == (0, len(found), 12000, 6000)
    assert not found[first:second].any()
    assert not found[middle:third].any()
    for start, stop in ends:
        assert np.abs(found[start:stop].astype(int)).max() > 1000
    # the seed that was drawn says the same again, sentence by sentence
    assert run("Good morning.", "-o", tmp_path / "b.wav", "--seed", said["seed"] + 1) == 0
    assert alike(samples(tmp_path / "b.wav"), found[second:middle])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_formats(run, tmp_path, name):
    import av

    assert run(TEXT, "-o", tmp_path / f"a.{name}", "--seed", 3, "--json") == 0
    assert run(TEXT, "-o", tmp_path / "b.wav", "--seed", 3) == 0
    expected = samples(tmp_path / "b.wav")
    if name == "pcm":
        assert alike(np.fromfile(tmp_path / "a.pcm", np.int16), expected)
        return
    with av.open(str(tmp_path / f"a.{name}")) as file:
        rate = file.streams.audio[0].rate
        length = sum(frame.samples for frame in file.decode(audio=0)) * 24000 / rate
    assert 0 <= length - len(expected) < (1 if name in ("wav", "flac") else 5000)


@pytest.mark.slow
def test_voices_by_name(run, capsys, loaded, miniature, tmp_path):
    kept = tmp_path / "voices"
    Voice.of(loaded, miniature / "klatt.wav").save(kept / "klatt.safetensors")
    assert run("Hello.", "-o", tmp_path / "a.wav", "--seed", 3, voice=("--voice", "klatt")) == 0
    assert run("Hello.", "-o", tmp_path / "b.wav", "--seed", 3, voice=("--speaker-wav", miniature / "klatt.wav")) == 0
    assert run("Hello.", "-o", tmp_path / "c.wav", "--seed", 3) == 0
    contents = [(tmp_path / name).read_bytes() for name in ("a.wav", "b.wav", "c.wav")]
    assert contents[0] == contents[1] != contents[2]
    capsys.readouterr()
    line = refused(capsys, run("Hello.", "-o", tmp_path / "d.wav", voice=("--voice", "nobody")))
    assert "'nobody'" in line
    assert line.endswith("there are klatt")


@pytest.mark.slow
def test_streamed(run, capsys, tmp_path):
    assert run(TEXT, "-o", tmp_path / "a.wav", "--stream", "--seed", 3, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    found = samples(tmp_path / "a.wav")
    assert said["seconds"] == len(found) / 24000
    first, second = said["sentences"][0]["end"], said["sentences"][1]["start"]
    assert second - first == pytest.approx(0.5)
    assert not found[round(first * 24000) : round(second * 24000)].any()
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.slow
def test_played(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "ffplay, aplay, paplay" in refused(capsys, run("Hello.", "--stream"))
    player = tmp_path / "aplay"
    player.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n/bin/cat > {tmp_path}/heard\n')
    player.chmod(player.stat().st_mode | stat.S_IXUSR)
    assert run("Hello.", "--stream", "--seed", 3) == 0
    assert "-r 24000" in (tmp_path / "arguments").read_text()
    assert run("Hello.", "--stream", "--seed", 3, "-o", tmp_path / "a.wav") == 0
    assert alike(np.fromfile(tmp_path / "heard", np.int16), samples(tmp_path / "a.wav"))
    player.write_text("#!/bin/sh\n/bin/cat > /dev/null\nexit 3\n")
    capsys.readouterr()
    assert "exit status 3" in refused(capsys, run("Hello.", "--stream"))
    # As ffplay does where there is no loudspeaker: it says so among other things, and exits as if there were one.
    player.write_text("#!/bin/sh\necho 'audio open failed\n' >&2\n/bin/cat > /dev/null\n")
    assert "aplay could not play it: audio open failed; write a file with -o" in refused(
        capsys, run("Hello.", "--stream")
    )
    player.write_text("#!/bin/sh\necho 'no such device' >&2\nexit 1\n")
    assert "aplay could not play it: no such device; write a file" in refused(capsys, run("Hello.", "--stream"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["", "-o", "a.wav"], "nothing to say"),
        (["* * *", "-o", "a.wav"], "nothing to say"),
        (["Hello.", "-o", "a.wav", "--language", "xx"], "'xx'"),
        (["-f", "latin-1.txt", "-o", "a.wav"], "latin-1.txt is no text in UTF-8"),
        (["-f", "none.txt", "-o", "a.wav"], "none.txt"),
        (["Hello.", "-f", "latin-1.txt", "-o", "a.wav"], "one of both"),
        (["-f", "latin-1.txt", "-o", "latin-1.txt"], "latin-1.txt is read, and would be overwritten"),
        (["Hello.", "-o", "none/a.wav"], "there is no folder none"),
        (["Hello.", "-o", "a.wav", "--format", "wma"], "'wma'"),
        (["Hello.", "-o", "a.wma"], "'wma'"),
        (["Hello.", "-o", "-", "--json"], "--json"),
        (["Hello."], "-o"),
        (["Hello. Hello.", "-o", "a.wav", "--seed", 2**64 - 1], "too large"),
    ],
)
def test_errors(run, capsys, monkeypatch, tmp_path, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin-1.txt").write_bytes("Ein Märchen.".encode("latin-1"))
    assert named in refused(capsys, run(*arguments))
    assert os.listdir(tmp_path) == ["latin-1.txt"]


def test_nothing_is_loaded_for_a_format_that_is_none(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(say, "load_or_download", None)
    assert "'wma'" in refused(capsys, run("Hello.", "-o", tmp_path / "a.wma"))


@pytest.mark.slow
def test_pipe(process, run, tmp_path):
    """Nothing but audio is on standard output, and ends as soon as the text does."""
    started = process("-o", "-", "--format", "pcm", "--seed", "3", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    heard, _ = started.communicate(b"\xef\xbb\xbfHello world.")
    assert started.returncode == 0
    assert run("Hello world.", "-o", tmp_path / "a.wav", "--seed", 3) == 0
    assert alike(np.frombuffer(heard, np.int16), samples(tmp_path / "a.wav"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_is_stopped_goes_on(process, run, tmp_path, precision):
    """By SIGINT and by SIGKILL, and then the file is that of a run that nobody stopped, but for rounding."""
    out, parts = tmp_path / "a.wav", tmp_path / "a.wav.parts"
    arguments = (LONG, "-o", out, "--precision", precision)
    for number, sent in enumerate((signal.SIGINT, signal.SIGKILL), start=1):
        heeds = {
            "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        }  # where tests run in the background
        with process(*arguments, stderr=subprocess.PIPE, text=True, **heeds) as started:
            deadline = time.monotonic() + 120
            while len(list(parts.glob("*.pcm"))) < 2 * number and time.monotonic() < deadline:
                time.sleep(0.01)
            started.send_signal(sent)
            _, err = started.communicate()
        if sent == signal.SIGINT:
            assert started.returncode == 130, err
            assert "the same command goes on from there" in err.splitlines()[-1]
        assert 2 * number <= len(list(parts.glob("*.pcm"))) < 30
        assert not out.exists()
    seed = json.loads((parts / "manifest.json").read_text())["seed"]
    with process(*arguments, "--json", stdout=subprocess.PIPE) as started:
        said = json.loads(started.communicate()[0])
    assert said["seed"] == seed
    assert os.listdir(tmp_path) == ["a.wav"]
    with process(LONG, "-o", tmp_path / "b.wav", "--precision", precision, "--seed", str(seed)) as whole:
        assert whole.wait() == 0
    found, expected = (samples(path).astype(float) for path in (out, tmp_path / "b.wav"))
    assert len(found) == len(expected)  # the same codes; other company rounds otherwise
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


@pytest.mark.slow
def test_another_speech_is_not_gone_on_with(run, capsys, monkeypatch, tmp_path):
    out = tmp_path / "a.wav"

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("neuron_xtts.tools.saying.write_whole", full)
        assert run(TEXT, "-o", out, "--seed", 3) == 1
    assert len(list((tmp_path / "a.wav.parts").glob("*.pcm"))) == 3
    capsys.readouterr()
    line = refused(capsys, run(TEXT.replace("Good", "Bad"), "-o", out, "--speed", 1.5, "--seed", 4))
    for named in ("the text (sentence 2)", "speed (1.0, now 1.5)", "seed (3, now 4)", "--restart"):
        assert named in line
    assert "the voice" not in line
    assert run(TEXT, "-o", out, "--seed", 4, "--restart") == 0
    assert os.listdir(tmp_path) == ["a.wav"]


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["say", "--help"])
    assert stop.value.code == 0
    assert say.EPILOG in capsys.readouterr().out


def test_standard_input(monkeypatch):
    import argparse

    given = argparse.Namespace(text=["-"], file=None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Märchen".encode())))
    assert say._text(given) == "Märchen"


def test_interrupted(monkeypatch, capsys, run, tmp_path):
    def interrupt(checkpoint):
        raise KeyboardInterrupt

    monkeypatch.setattr(say, "load_or_download", interrupt)
    assert run("Hello.", "-o", tmp_path / "a.wav") == 130
    assert capsys.readouterr().err == "neuron-xtts: interrupted\n"
