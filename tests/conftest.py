"""Real coqui-tts models with random weights: small, so that parity can be tried at every length."""

import copy
import logging

import pytest
import torch
from hypothesis import settings

from neuron_xtts.demo import random_tts, write_reference

torch.set_num_threads(2)
# The same examples in every run: two codes whose probabilities differ by less than rounding are one draw in a million.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")
logging.getLogger("transformers").setLevel(logging.ERROR)
logging.getLogger("TTS").setLevel(logging.CRITICAL)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A recording to clone."""
    path = tmp_path_factory.mktemp("reference") / "voice.wav"
    write_reference(path, seconds=3)
    return path


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
