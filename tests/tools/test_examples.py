"""The examples, as users start them, with a small checkpoint in place of the real one."""

import re
import runpy
import subprocess
import sys
import wave
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock, call

import neuron_double
import numpy as np
import pytest
import torch
import TTS.api
from packaging.version import Version

from neuron_xtts.backends.neuron.store import Store
from neuron_xtts.coqui.models import random_tts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TEXT = "the band plays."
CODES = 21  # what coqui-tts makes of gpt_max_audio_tokens=24, if no stop code comes before
FRAMES = int(CODES * 4 * 24000 / 22050)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as coqui-tts downloads it. Its speech always has `CODES` codes; its vocoder is of real width."""
    folder = tmp_path_factory.mktemp("checkpoint")
    random_tts(folder, small=True, gpt_max_audio_tokens=24)
    weights = torch.load(folder / "model.pth")
    weights["model"]["gpt.mel_head.bias"][1025] = -1e4  # no stop code
    torch.save(weights, folder / "model.pth")
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Where the examples are started: an empty folder; they import this checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def run(example, *arguments, status=0, **environment):
    """Run an example; returns what it wrote to stdout and stderr."""
    command = [sys.executable, ROOT / "examples" / example, *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **environment)
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def check_speech(path, samples):
    with wave.open(path) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24000, 1, 2)
        heard = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
    assert len(heard) == samples
    assert np.abs(heard).max() > 100
    return heard.astype(int)


def row(text, name):
    """The cells of a table's row, without its name."""
    return next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1:]


def test_speak(checkpoint, reference):
    out, _ = run("speak.py", reference, TEXT, "--checkpoint", checkpoint, "--out", "hello.wav")
    check_speech("hello.wav", FRAMES * 256 + 10000)  # coqui-tts appends silence
    assert "neuron_xtts: backend cpu, precision fp32" in out
    for route in ("GPT.generate", "HifiDecoder.forward"):
        assert row(out, route)[:4] == ["1", "1", "0", "0"]  # calls, computed, handed over, fallbacks


def test_many(checkpoint, reference, tmp_path):
    """A file for each line, in the order of the lines, whatever was said first."""
    (tmp_path / "lines.txt").write_text(f"{TEXT}\n\nsing\n{TEXT}\n")
    run("many.py", reference, "lines.txt", "--checkpoint", checkpoint, "--seed", "5", "--out", "spoken")
    files = sorted(path.name for path in Path("spoken").iterdir())
    assert files == ["0001.wav", "0002.wav", "0003.wav"]
    said = [check_speech(f"spoken/{name}", FRAMES * 256 + 10000) for name in files]
    assert (said[0] != said[1]).any()
    assert (said[0] != said[2]).any()  # of another seed
    run("many.py", reference, "lines.txt", "--checkpoint", checkpoint, "--seed", "7", "--out", "again")
    again = check_speech("again/0001.wav", FRAMES * 256 + 10000)
    assert np.abs(again - said[2]).max() <= 1  # the same text and seed in other company


def test_speak_in_lower_precision(checkpoint, reference):
    out, _ = run("speak.py", reference, TEXT, "--checkpoint", checkpoint, "--precision", "int8")
    check_speech("speech.wav", FRAMES * 256 + 10000)
    assert "neuron_xtts: backend cpu, precision int8" in out


def test_stream(checkpoint, reference):
    """One chunk of 20 codes, less the samples that are held back for the next, and one of the rest."""
    out, _ = run("stream.py", reference, TEXT, "--checkpoint", checkpoint)
    chunks = [re.fullmatch(r"after (\d+\.\d\d) s: (\d+\.\d\d) s of audio", line) for line in out.splitlines()]
    seconds, audio = zip(*[map(float, chunk.groups()) for chunk in chunks], strict=True)
    first = int(20 * 4 * 24000 / 22050) * 256 - 1024
    whole = FRAMES * 256 - (0 if Version(version("coqui-tts")) >= Version("0.28") else 1024)  # kept for good
    assert audio == (pytest.approx(first / 24000, abs=0.005), pytest.approx(whole / 24000, abs=0.005))
    assert 0 < seconds[0] < seconds[1]
    check_speech("speech.wav", whole)


def test_compile_for_neuron(checkpoint, neuron_root):
    """With the doubles of Neuron's packages, and no device."""
    pytest.importorskip("torch_xla")
    arguments = ["--checkpoint", checkpoint, "--target", "inf2", "--store", "store", "--only", "latents"]
    out, _ = run("compile_for_neuron.py", *arguments, env=neuron_double.environment(neuron_root / "site"))
    assert row(out, "latents")[:2] == ["1044", "compiled"]
    assert [artifact.manifest["recipe"]["target"] for artifact in Store("store")] == ["inf2"]


def test_compile_for_neuron_without_its_packages(checkpoint):
    out, error = run("compile_for_neuron.py", "--checkpoint", checkpoint, "--store", "store", status=1)
    assert not out
    assert error.splitlines()[-1].startswith("backend='neuron': torch-neuronx is not installed: pip install ")
    assert "Traceback" not in error


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_without_a_checkpoint(example, monkeypatch):
    """It is coqui-tts that downloads one."""
    made = Mock()
    monkeypatch.setattr(TTS.api, "TTS", made)
    load = runpy.run_path(str(example))["load"]
    assert load(None) is load("xtts") is made.return_value
    assert made.call_args_list == [
        call("tts_models/multilingual/multi-dataset/xtts_v2"),
        call(model_path="xtts", config_path="xtts/config.json"),
    ]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_small_enough_to_copy(example):
    assert len(example.read_text().splitlines()) < 50
