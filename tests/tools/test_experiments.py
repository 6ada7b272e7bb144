"""The scripts that made the miniature, each with a step or two on few sentences."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch

from neuron_xtts.coqui.models import load_tts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "miniature"
LAYERS = 4  # not the number that model.py has


def run(script, *arguments, status=0):
    """Run a script; returns the lines that it wrote to stderr."""
    command = [sys.executable, FOLDER / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == status, done.stderr
    return done.stderr.splitlines()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A data set with its codes."""
    work = tmp_path_factory.mktemp("spoken")
    run("data.py", work, "--sentences", 800)
    run("codes.py", work, "--steps", 1, 1)
    return work


@pytest.fixture(scope="module")
def trained(spoken, tmp_path_factory):
    """The same, and what was trained on it."""
    work = tmp_path_factory.mktemp("trained") / "work"
    shutil.copytree(spoken, work, copy_function=os.link)
    run("gpt.py", work, "--layers", LAYERS, "--steps", 1)
    run("vocoder.py", work, "--hidden", 64, "--steps", 1, "--batch", 2)
    return work


def test_plain_coqui_tts_speaks_what_is_exported(trained, tmp_path):
    """With as many layers as were trained, and these."""
    run("export.py", trained, tmp_path / "out")
    tts = load_tts(tmp_path / "out")
    gpt, saved = tts.synthesizer.tts_model.gpt, torch.load(trained / "gpt.pt")["gpt"]
    assert len(gpt.gpt.h) == LAYERS
    for number, block in enumerate(gpt.gpt.h):
        weight = saved[f"gpt.h.{number}.mlp.c_fc.weight"]
        torch.testing.assert_close(block.mlp.c_fc.weight, weight, rtol=2**-6, atol=1e-6)
    sentences = (tmp_path / "out" / "sentences.txt").read_text().splitlines()
    assert len(sentences) == 600
    assert not {text for text, _ in json.loads((trained / "texts.json").read_text())}.intersection(sentences)
    for voice in ("f5", "klatt"):
        audio = tts.tts(
            sentences[0], speaker_wav=str(tmp_path / "out" / f"{voice}.wav"), language="en", max_new_tokens=8
        )
        assert torch.tensor(audio).abs().max() > 0


def test_training_is_seeded(trained, spoken, tmp_path):
    """Merges that the text tokenizer leaves out, too."""
    again = tmp_path / "again"
    shutil.copytree(spoken, again, copy_function=os.link)
    run("gpt.py", again, "--layers", LAYERS, "--steps", 1)
    first, second = (torch.load(work / "gpt.pt")["gpt"] for work in (trained, again))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_merges_that_are_left_out(trained, monkeypatch):
    """None of them: the tokens of the tokenizer. All: characters."""
    monkeypatch.syspath_prepend(FOLDER)
    from gpt import Data

    data = Data.load(trained)
    for row, text in enumerate(data.texts):
        assert data.tokens(row, 0.0, Random(1)) == data.tokens(row)
        assert len(data.tokens(row, 1.0, Random(1))) == len(text) + 3  # start, language, stop
    lengths = [sum(len(data.tokens(row, share, Random(row))) for row in range(100)) for share in (0, 0.15, 0.5, 1)]
    assert lengths == sorted(set(lengths))


@pytest.mark.parametrize(
    ("script", "arguments", "error"),
    [
        ("data.py", ["--sentences", "799"], "'799' is not a whole number from 800 on"),
        ("data.py", ["--processes", "0"], "'0' is not a whole number from 1 on"),
        ("gpt.py", ["--steps", "0"], "'0' is not a whole number from 1 on"),
        ("gpt.py", ["--layers", "2"], "'2' is not a whole number from 3 on"),
        ("gpt.py", ["--minutes", "0"], "'0' is not a number above zero"),
        ("gpt.py", ["--dropout", "15"], "'15' is not a number from 0 to 1"),
        ("vocoder.py", ["--hidden", "1024"], "'1024' is not a whole number from 1 to 512"),
    ],
)
def test_arguments_that_are_refused(script, arguments, error, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert error in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "missing", "remedy"),
    [
        ("codes.py", "texts.json", "data.py"),
        ("gpt.py", "codes.npy", "codes.py"),
        ("vocoder.py", "gpt.pt", "gpt.py"),
        ("export.py", "vocoder.pt", "vocoder.py"),
    ],
)
def test_scripts_in_another_order(trained, script, missing, remedy, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(trained, work, copy_function=os.link)
    (work / missing).unlink()
    out = [tmp_path / "out"] if script == "export.py" else []
    assert run(script, work, *out, status=1)[-1] == f"{work} has no {missing}: run {remedy} first"
    assert not (tmp_path / "out").exists()


def test_other_sentences_have_other_codes(trained, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(trained, work)
    run("data.py", work, "--sentences", 820)
    assert run("gpt.py", work, status=1)[-1] == f"{work} has no mels.npy: run codes.py first"
    run("codes.py", work)
    assert "--layers asks for 3, and none can be taken away" in run("gpt.py", work, "--layers", 3, status=1)[-1]
    assert "--hidden asks for 32, and none can be taken away" in run("vocoder.py", work, "--hidden", 32, status=1)[-1]


@pytest.mark.parametrize(
    ("name", "part", "odd", "error"),
    [
        ("gpt.pt", "gpt", "gpt.ln_f.weight", "gpt.pt does not fit model.py and vocab.json"),
        ("vocoder.pt", "network", "conv_pre.bias", "vocoder.pt is wider than coqui-tts's: conv_pre.bias"),
    ],
)
def test_weights_that_no_checkpoint_holds(trained, name, part, odd, error, tmp_path):
    """Nothing is left of the export."""
    work = tmp_path / "work"
    shutil.copytree(trained, work, copy_function=os.link)
    saved = torch.load(work / name)
    saved[part][odd] = torch.zeros(1024)
    (work / name).unlink()
    torch.save(saved, work / name)
    assert error in run("export.py", work, tmp_path / "out", status=1)[-1]
    assert not (tmp_path / "out").exists()
