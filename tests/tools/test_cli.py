"""The command, as users run it."""

import json
import subprocess
import sys
import wave
from importlib.metadata import version

import numpy as np
import pytest
import torch
from packaging.version import Version

import neuron_xtts
from neuron_xtts.coqui import models
from neuron_xtts.coqui.models import random_tts
from neuron_xtts.coqui.recordings import write_reference
from neuron_xtts.tools import demo
from neuron_xtts.tools.bench import Subject, exactly
from neuron_xtts.tools.bench.batch import Heard
from neuron_xtts.tools.bench.methods import make_calls
from neuron_xtts.tools.bench.sentence import speak
from neuron_xtts.tools.cli import main
from neuron_xtts.tools.judge.listening import hear_all
from neuron_xtts.tools.judge.words import normalize, word_errors


def samples(path):
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)


def check_demo(out, folder, frames):
    assert "largest difference of a sample" in out
    assert "neuron_xtts: backend cpu, precision fp32" in out
    difference = next(line for line in out.splitlines() if line.startswith("largest difference")).split()[-1]
    assert float(difference) < 1e-5
    plain, patched = samples(folder / "plain.wav"), samples(folder / "patched.wav")
    if frames:
        assert len(plain) == frames * 256 + 10000  # coqui-tts appends silence
    assert np.abs(plain.astype(int) - patched).max() <= 1  # of 32767: rounding to 16 bits
    assert np.abs(plain).max() > 100


@pytest.mark.slow
def test_demo(tmp_path, miniature):
    """In a process of its own: the installed command, without a terminal."""
    command = [sys.executable, "-m", "neuron_xtts", "demo", "--small", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    check_demo(done.stdout, tmp_path / "out", frames=None)
    assert f"The miniature ({miniature})" in done.stdout
    heard = hear_all([tmp_path / "out" / "patched.wav"], ["moonshine"])[tmp_path / "out" / "patched.wav"]
    wrong, words = word_errors(normalize(demo.MINIATURE_TEXT), normalize(heard.words["moonshine"]))
    assert wrong < 0.3 * words, heard.words
    assert "random weights" not in done.stdout
    assert "neuron_xtts: " in done.stderr  # the progress bars
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["patched.wav", "plain.wav"]


@pytest.mark.slow
def test_demo_without_the_miniature(tmp_path, monkeypatch):
    """As where the package was installed from its wheel: noise, of as many codes as were asked for."""
    monkeypatch.setattr(models, "__file__", str(tmp_path / "neuron_xtts" / "coqui" / "models.py"))
    text = "\n\n".join(demo.run(tmp_path / "out", small=True, codes=20))
    check_demo(text, tmp_path / "out", frames=int(20 * 4 * 24000 / 22050))
    assert "Small, random weights" in text
    assert (tmp_path / "out" / "reference.wav").is_file()


@pytest.mark.slow
def test_demo_with_a_trained_model(tmp_path, monkeypatch):
    """One that stands beside the package speaks first, in a voice of its own."""
    folder = tmp_path / "miniature"
    random_tts(folder, small=True)
    weights = torch.load(folder / "model.pth")
    weights["model"]["gpt.mel_head.bias"][1025] = 4  # end after some tens of codes, as trained weights do
    torch.save(weights, folder / "model.pth")
    write_reference(folder / "f5.wav", seconds=2)
    monkeypatch.setattr(models, "__file__", str(tmp_path / "neuron_xtts" / "coqui" / "models.py"))
    monkeypatch.setattr(demo, "load_or_make", lambda checkpoint, small: random_tts(tmp_path / "random", small=True))
    parts = demo.run(tmp_path / "out", codes=20)
    assert next(parts) == f"The miniature ({folder})"
    trained = next(parts)
    assert not (tmp_path / "out" / "full-plain.wav").exists()  # it does not wait for the other one
    title, random = parts
    assert "Full size, random weights" in title
    for part in (trained, random):
        difference = next(line for line in part.splitlines() if line.startswith("largest difference")).split()[-1]
        assert float(difference) < 1e-5
    assert len(samples(tmp_path / "out" / "full-plain.wav")) == int(20 * 4 * 24000 / 22050) * 256 + 10000
    names = ["full-patched.wav", "full-plain.wav", "patched.wav", "plain.wav", "reference.wav"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert len(list(demo.run(tmp_path / "out", small=True))) == 2


@pytest.mark.slow
def test_demo_with_a_checkpoint(tmp_path, capsys):
    random_tts(tmp_path / "checkpoint", small=True)
    weights = torch.load(tmp_path / "checkpoint" / "model.pth")
    weights["model"]["gpt.mel_head.bias"][1025] = 4  # end after some tens of codes, as trained weights do
    torch.save(weights, tmp_path / "checkpoint" / "model.pth")
    write_reference(tmp_path / "voice.wav", seconds=2)
    arguments = [
        "--checkpoint",
        tmp_path / "checkpoint",
        "--speaker-wav",
        tmp_path / "voice.wav",
        "--out",
        tmp_path / "out",
    ]
    assert main(["demo", *map(str, arguments), "--text", "hello", "--seed", "4"]) == 0
    output = capsys.readouterr().out
    check_demo(output, tmp_path / "out", frames=None)
    assert not (tmp_path / "out" / "reference.wav").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.pth", b"no weights"),
        ("vocab.json", b"{"),
        ("config.json", b"{"),
        ("config.json", b'{"model": "vits"}'),
    ],
)
def test_a_checkpoint_that_is_none(tmp_path, capsys, name, content):
    random_tts(tmp_path, small=True)
    (tmp_path / name).write_bytes(content)
    assert main(["demo", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert f"{tmp_path} cannot be loaded as an XTTS v2 checkpoint: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--speaker-wav", "none.wav"], "there is no recording none.wav"),
        (["--speaker-wav", __file__], f"{__file__} cannot be read as a recording: "),
        (["--text", " "], "there is no text to speak"),
        (["--language", "xx"], "the model has no language 'xx'; choose one of en, "),
        (["--precision", "bf16-all"], "precision='bf16-all' does not exist on the host; choose one of 'fp32', "),
    ],
)
def test_what_the_demo_cannot_speak(tmp_path, capsys, arguments, error):
    assert main(["demo", "--small", "--out", str(tmp_path / "out"), *arguments]) == 1
    said = capsys.readouterr().err
    assert error in said
    assert "warm-up" not in said  # of the progress bar


def test_demo_without_a_checkpoint_where_it_was_named(tmp_path, capsys):
    assert main(["demo", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "has no config.json, vocab.json, model.pth; expected the folder of an XTTS v2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["speak"], ["demo", "--codes", "0"], ["demo", "--codes", "many"], ["demo", "--seed", f"{2**64}"]]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: neuron-xtts" in capsys.readouterr().err


def pictures(folder):
    """The names of PNG files."""
    files = sorted(folder.glob("*.png"))
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    return [file.name for file in files]


@pytest.mark.slow
def test_bench_stream(tmp_path, capsys):
    """Table, samples and picture of the same figures."""
    files = tmp_path / "stream.json", tmp_path / "stream.png"
    command = ["bench", "stream", "--small", "--rounds", "2", "--codes", "30", "50", "--chunk", "10"]
    assert main([*command, "--json", str(files[0]), "--png", str(files[1])]) == 0
    out = capsys.readouterr().out
    results = json.loads(files[0].read_text())
    for codes in ("30", "50"):
        whole = int(int(codes) * 4 * 24000 / 22050)
        chunks = int(codes) // 10 + 1
        for variant in ("coqui-tts", "neuron_xtts"):
            samples = results["samples"][codes][variant]
            assert [len(sample["chunks"]) for sample in samples] == [chunks] * 2
            asked = sum(int(10 * i * 4 * 24000 / 22050) for i in range(1, chunks)) + whole
            assert {sample["frames"] for sample in samples} == {asked}
            totals = sorted(sum(sample["chunks"]) for sample in samples)
            assert results["medians"][codes][variant]["whole stream"] == pytest.approx(sum(totals) / 2)
            assert f"{results['medians'][codes][variant]['TTFA']:.3f} s" in out
        assert whole <= results["worked"][codes] <= whole + 40 * chunks
    assert torch.__version__.startswith(results["machine"]["torch"])
    assert pictures(tmp_path) == ["stream-timeline-neuron_xtts.png", "stream.png"]


@pytest.mark.slow
def test_bench_batch(tmp_path, capsys):
    """Callers at once, with figures made of what each heard."""
    files = tmp_path / "batch.json", tmp_path / "batch.png"
    command = [
        "bench",
        "batch",
        "--small",
        "--rounds",
        "1",
        "--codes",
        "45",
        "--callers",
        "1",
        "3",
        "--precisions",
        "fp32",
    ]
    command += ["--rate", "20", "--json", str(files[0]), "--png", str(files[1])]
    assert main(command) == 0
    out = capsys.readouterr().out
    results = json.loads(files[0].read_text())
    # What would be cross-faded into the next chunk, though there is none.
    withheld = 1024 if Version(version("coqui-tts")) < Version("0.28") else 0
    assert list(results["samples"]) == ["whole", "streams", "within a second", "arrivals"]
    for scene, by_callers in results["samples"].items():
        assert list(by_callers["3"]) == ["coqui-tts", "fp32"]
        assert list(by_callers["3"]["coqui-tts"]) == ["one by one"]
        for variant, how in (("coqui-tts", "one by one"), ("fp32", "one by one"), ("fp32", "together")):
            (performance,) = by_callers["3"][variant][how]
            found = results["medians"][f"{scene}, 3"][f"{variant}, {how}"]
            audio = [sum(samples for _, samples in heard["chunks"]) for heard in performance["heard"]]
            whole = int(45 * 4 * 24000 / 22050) * 256
            assert audio == [whole if scene == "whole" else whole - withheld] * 3
            assert {len(heard["chunks"]) for heard in performance["heard"]} == ({1} if scene == "whole" else {3})
            assert all(44 <= heard["codes"] <= 46 for heard in performance["heard"])
            assert found["aggregate RTF"] == pytest.approx(performance["seconds"] * 24000 / sum(audio))
            first = sorted(heard["chunks"][0][0] for heard in performance["heard"])
            assert found["TTFA p50"] == pytest.approx(first[1])
            assert f"{found['aggregate RTF']:.3f}" in out
            assert (found["rows a step"] == 0) == (variant == "coqui-tts")
        assert results["medians"][f"{scene}, 3"]["fp32, one by one"]["rows a step"] == 1
    assert results["medians"]["whole, 3"]["fp32, together"]["rows a step"] > 1.5
    assert results["fallbacks"] == {"fp32": {}}
    assert pictures(tmp_path) == ["batch-timeline-fp32.png", "batch.png"]


@pytest.mark.slow
def test_bench_serve(capsys, tmp_path):
    """The server gives as much audio as the library, and what is later is said of medians and of rounds."""
    file = tmp_path / "serve.json"
    command = [
        "bench",
        "serve",
        "--small",
        "--rounds",
        "3",
        "--codes",
        "25",
        "--callers",
        "1",
        "2",
        "--json",
        str(file),
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    results = json.loads(file.read_text())
    for callers in (1, 2):
        first = {}
        for who in ("library", "server"):
            crowds = results["samples"][str(callers)][who]
            assert [len(crowd["first"]) for crowd in crowds] == [callers] * 3
            assert all(0 < second < crowd["seconds"] for crowd in crowds for second in crowd["first"])
            first[who] = np.array([np.median(crowd["first"]) for crowd in crowds])
            assert results["medians"][str(callers)][who]["TTFA"] == pytest.approx(np.median(first[who]))
        audio = {crowd["audio"] for crowds in results["samples"][str(callers)].values() for crowd in crowds}
        assert audio == {callers * results["samples"]["1"]["library"][0]["audio"]}
        low, middle, high = 1e3 * np.quantile(first["server"] - first["library"], (0.25, 0.5, 0.75))
        assert f"{middle:+.0f} ({low:+.0f} to {high:+.0f}) ms" in out


def test_silence():
    """A listener plays the first chunk at once, and waits where the next is late."""
    second = 24000
    assert Heard(0, [(1.0, second), (1.9, second), (2.9, second)]).silence == 0
    assert Heard(0, [(1.0, second), (2.5, second), (3.4, second)]).silence == pytest.approx(0.5)
    assert Heard(0, [(1.0, second), (2.5, second), (4.0, second)]).silence == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--codes", "1", "2"], "one number of --codes"), (["--rate", "0"], "--rate 0; expected calls a second")],
)
def test_bench_batch_refuses(arguments, says, capsys):
    assert main(["bench", "batch", "--small", *arguments]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_bench(tmp_path, capsys):
    """Every stage and figure, of samples that were taken."""
    files = [tmp_path / f"sentence.{kind}" for kind in ("json", "png", "md")]
    command = ["bench", "--small", "--rounds", "2", "--codes", "15", "30", "--precisions", "fp32", "int8"]
    command += ["--json", str(files[0]), "--png", str(files[1]), "--markdown", str(files[2])]
    assert main(command) == 0
    out = capsys.readouterr().out
    results = json.loads(files[0].read_text())
    variants = ["coqui-tts", "fp32", "int8"]
    for codes in ("15", "30"):
        assert list(results["samples"][codes]) == variants
        for variant, samples in results["samples"][codes].items():
            assert len(samples) == 2
            for sample in samples:
                parts = sum(sample[stage] for stage in ("codes", "latents", "vocoder"))
                assert 0 < parts < sample["sentence"]
                assert 0 < sample["one code"] < sample["codes"]
                assert sample["bandwidth"] > 1e8
                patched = variant != "coqui-tts"
                assert (0 < sample["sampling and loop"] < sample["codes"] / int(codes)) == patched
            median = sum(sample["sentence"] for sample in samples) / 2
            found = results["medians"][codes][variant]
            assert found["sentence"] == pytest.approx(median)
            assert found["RTF"] == pytest.approx(median / (int(codes) * 1024 / 22050))
            assert found["codes per second"] == pytest.approx(int(codes) / found["codes"])
    fp32, int8 = (results["accuracy"][name]["snr"] for name in ("fp32", "int8"))
    assert fp32 > 90
    assert fp32 > int8 > 10
    assert results["accuracy"]["fp32"]["latents"] > results["accuracy"]["int8"]["latents"] > 0.99
    assert all(2**28 < results["memory"][variant] < 2**33 for variant in variants)
    assert list(results["first_audio"]) == variants
    for variant, seconds in results["first_audio"].items():
        assert f"| {variant} | {1e3 * sum(seconds) / 2:.0f} ms | " in files[2].read_text()
    assert "peak memory" in out
    assert pictures(tmp_path) == ["sentence-timeline-fp32.png", "sentence-timeline-int8.png", "sentence.png"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sentence", "stream"])
def test_bench_until_sentences_end(what, tmp_path, miniature):
    """Trained weights, as many codes as it takes."""
    texts = ["Good morning.", "The dog ran after the cat, and the cat ran after the mouse."]
    (tmp_path / "texts.txt").write_text("\n".join([*texts, ""]))
    command = ["bench", what, "--checkpoint", str(miniature), "--speaker-wav", str(miniature / "f5.wav")]
    command += ["--texts", str(tmp_path / "texts.txt"), "--rounds", "1", "--precisions", "fp32"]
    assert main([*command, "--json", str(tmp_path / "bench.json")]) == 0
    samples = json.loads((tmp_path / "bench.json").read_text())["samples"]
    assert list(samples) == texts
    if what == "sentence":
        lengths = [{sample["length"] for taken in samples[text].values() for sample in taken} for text in texts]
    else:
        lengths = [{sample["samples"] for taken in samples[text].values() for sample in taken} for text in texts]
    assert [len(length) for length in lengths] == [1, 1]  # the same, patched and plain
    assert max(lengths[0]) < max(lengths[1])


@pytest.mark.parametrize(
    ("lines", "arguments", "error"),
    [
        ("\n\n", [], "has no text; expected one sentence a line"),
        ("One dog.\nTwo dogs.\nOne dog.", [], "'One dog.' is there 2 times; leave it in once"),
        ("One dog.", ["methods"], "bench methods takes no --texts"),
        ("One dog.", ["--json", "none/a.json"], "there is no folder none; make it first"),
    ],
)
def test_texts_that_cannot_be_measured(tmp_path, capsys, lines, arguments, error):
    (tmp_path / "texts.txt").write_text(lines)
    assert main(["bench", *arguments, "--small", "--texts", str(tmp_path / "texts.txt")]) == 1
    assert error in capsys.readouterr().err


def test_sentences_share_no_audio():
    """One that begins like another would be vocoded only from where they differ."""
    xtts, voice = Subject(small=True).prepare()
    windows = []
    with neuron_xtts.patched(xtts):
        for codes in (20, 40):
            speak(xtts, voice, exactly(codes))
            windows.append(sum(counts.used for counts in neuron_xtts.report(xtts).graphs["vocoder"].values()))
    assert windows == [int(20 * 4 * 24000 / 22050), int(20 * 4 * 24000 / 22050) + int(40 * 4 * 24000 / 22050)]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["methods", "graphs"])  # by its name, and by the one that it had before
def test_bench_methods(what, tmp_path, capsys):
    """The figures are those of the samples, of which there are as many as asked for."""
    files = [tmp_path / f"methods.{kind}" for kind in ("json", "png", "md")]
    command = ["bench", what, "--small", "--iterations", "12", "--warm-up", "2", "--precisions", "fp32"]
    command += ["--json", str(files[0]), "--png", str(files[1]), "--markdown", str(files[2])]
    assert main(command) == 0
    out = capsys.readouterr().out
    results = json.loads(files[0].read_text())
    assert list(results["samples"]) == ["GPT.forward", "vocoder", "GPT.generate"]
    for method, by_variant in results["samples"].items():
        assert list(by_variant) == ["coqui-tts", "fp32"]
        for variant, samples in by_variant.items():
            assert len(samples) == (1 if method == "GPT.generate" else 12)
            figures = results["medians"][method][variant]
            assert figures["mean"] == pytest.approx(sum(samples) / len(samples))
            squares = sum((sample - figures["mean"]) ** 2 for sample in samples)
            assert figures["sd"] == pytest.approx((squares / max(len(samples) - 1, 1)) ** 0.5)
            text = f"{1e3 * figures['mean']:.2f} ms (sd {1e3 * figures['sd']:.2f})"
            assert text in files[2].read_text()
            assert text in out
    assert pictures(tmp_path) == ["methods-timeline-fp32.png", "methods.png"]


def test_methods_are_timed_on_new_inputs():
    """What is known would be handed over, in no time."""
    xtts, voice = Subject(small=True).prepare()
    with neuron_xtts.patched(xtts, strict=True), torch.inference_mode():
        for make in make_calls(xtts, voice, 50, 100).values():
            make()()
            make()()
        report = neuron_xtts.report(xtts)
    served = {name: (counts.served, counts.handed_over) for name, counts in report.routes.items() if counts.served}
    assert served == {"GPT.forward": (2, 0), "HifiDecoder.forward": (2, 0), "GPT.generate": (2, 0)}


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["speak"], 2)])
def test_the_package_is_the_command(arguments, status):
    """``python -m neuron_xtts`` does what ``neuron-xtts`` does, and goes by that name."""
    command = [sys.executable, "-m", "neuron_xtts", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == status
    if status:
        assert "usage: neuron-xtts" in done.stderr
    else:
        assert done.stdout.strip() == neuron_xtts.__version__


def test_the_doctor_says_how_to_try_it(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--canary try it: compile a graph of two small layers, and run it where there is a device" in out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == neuron_xtts.__version__
