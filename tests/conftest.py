"""Real coqui-tts models with random weights: small, so that parity can be tried at every length."""

import copy
import logging
import os
from pathlib import Path

import neuron_double
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from hypothesis.internal.conjecture import providers

import neuron_xtts
from neuron_xtts import BucketPlan
from neuron_xtts.backends.neuron import device
from neuron_xtts.coqui.models import random_tts
from neuron_xtts.coqui.recordings import write_reference

torch.set_num_threads(2)
# Programs of the environment are found, as where it is activated.
os.environ["PATH"] = device.scripts_on_path()
# The same examples in every run: two codes whose probabilities differ by less than rounding are one draw in a million.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")
if hasattr(providers, "_get_local_constants"):  # or they would hold constants of what was imported before
    providers._get_local_constants = lambda: providers._local_constants
logging.getLogger("transformers").setLevel(logging.ERROR)
logging.getLogger("TTS").setLevel(logging.CRITICAL)


# Fixtures that take long to make: the tests that need one are slow.
LONG = ("compiled", "distribution", "wide")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Mark what `LONG` fixtures make slow."""
    for item in items:
        if not set(LONG).isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A recording to clone."""
    path = tmp_path_factory.mktemp("reference") / "voice.wav"
    write_reference(path, seconds=3)
    return path


@pytest.fixture(scope="session")
def miniature():
    """A folder with a small trained XTTS: its checkpoint, a recording of each of its voices, and sentences.txt."""
    return Path(os.environ.get("NEURON_XTTS_MINIATURE", Path(__file__).parents[1] / "miniature"))


@pytest.fixture(scope="session")
def tts_original(tmp_path_factory):
    """Never patch this one: `tts` copies it."""
    return random_tts(tmp_path_factory.mktemp("small"), small=True)


@pytest.fixture(scope="session")
def voice(tts_original, reference):
    """Conditioning latents and speaker embedding of the reference."""
    return tts_original.synthesizer.tts_model.get_conditioning_latents(str(reference))


@pytest.fixture
def tts(tts_original):
    """A ``TTS.api.TTS`` of its own for a test."""
    return copy.deepcopy(tts_original)


@pytest.fixture
def xtts(tts):
    """The ``Xtts`` inside `tts`."""
    return tts.synthesizer.tts_model


@pytest.fixture(scope="session")
def small_plan():
    """Few buckets, but two of decode and of the vocoder; 259 frames are the reference's 3 s."""
    return BucketPlan(
        prefill=(64,), decode=(80, 128), slots=(1,), latents=(128,), vocoder=(64, 96), conditioning=(259,)
    )


@pytest.fixture(scope="session")
def neuron_root(tmp_path_factory):
    """The doubles of Neuron's packages in ``site``, and a machine with one device in ``root``."""
    folder = tmp_path_factory.mktemp("neuron")
    neuron_double.install(folder / "site")
    neuron_double.machine(folder / "root")
    return folder


@pytest.fixture
def neuron(neuron_root, tmp_path, monkeypatch):
    """This process on that machine, in an empty folder: the compiler leaves some where it is started."""
    yield from neuron_double.on_neuron(neuron_root, monkeypatch)


@pytest.fixture(scope="session")
def compiled(tts_original, neuron_root, small_plan, tmp_path_factory):
    """A store with every graph of `small_plan` for `tts_original`, compiled and verified. Copy it to spoil it.

    Processes that run tests side by side share it: whoever needs it first makes it, while the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    store = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    with FileLock(f"{store}.lock"), pytest.MonkeyPatch.context() as monkeypatch:
        if not store.exists():
            for _ in neuron_double.on_neuron(neuron_root, monkeypatch):
                summary = neuron_xtts.compile(
                    tts_original, backend="neuron", buckets=small_plan, store=store, jobs=2, progress=False
                )
                assert summary.ok, summary
                assert {entry.reason for entry in summary.entries} == {None}, summary
    return store
