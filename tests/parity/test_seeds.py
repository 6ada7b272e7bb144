"""A seed of a call's own: the codes of torch's global generator with that seed, which is left alone."""

import threading

import numpy as np
import pytest
import torch
from helpers import all_fallbacks, failing, fallbacks, speak, stop_after, stream

import neuron_xtts
from neuron_xtts.patching.dispatch import DISABLE_VARIABLE
from neuron_xtts.runner import Runner

TEXT = "the band plays an old song."
SEED = 7


@pytest.fixture
def limited(xtts):
    """Arguments with which a sentence has 24 codes."""
    return {"max_new_tokens": 60, **stop_after(xtts, 24)}


def alone(function, *args, **options):
    """The result of a call that draws nothing from torch's global generator."""
    torch.manual_seed(99)
    before = torch.get_rng_state()
    result = function(*args, **options)
    assert torch.equal(torch.get_rng_state(), before)
    return result


def chunks_of(xtts, voice, **options):
    return [chunk.numpy() for chunk in xtts.inference_stream(TEXT, "en", *voice, **options)]


def assert_same(ours, theirs):
    assert ours["gpt_latents"].shape == theirs["gpt_latents"].shape
    np.testing.assert_allclose(ours["gpt_latents"], theirs["gpt_latents"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours["wav"], theirs["wav"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [0, SEED, -3, 2**64 - 1])
def test_inference(xtts, voice, limited, seed):
    theirs, _ = speak(xtts, voice, seed=seed, **limited)
    neuron_xtts.patch(xtts, strict=True)
    assert_same(alone(xtts.inference, TEXT, "en", *voice, seed=seed, **limited), theirs)
    other = alone(xtts.inference, TEXT, "en", *voice, seed=seed ^ 1, **limited)
    assert not np.array_equal(other["gpt_latents"], theirs["gpt_latents"])
    speak(xtts, voice, seed=seed, **limited)  # without one it draws from the global generator, as ever
    assert all_fallbacks(xtts) == {}


def test_every_sentence_begins_with_the_seed(tts, xtts, reference, limited):
    """coqui-tts asks for one sentence after another, with the same arguments."""
    neuron_xtts.patch(tts, strict=True)
    options = {"speaker_wav": str(reference), "language": "en", "seed": SEED, **limited}
    one = np.array(alone(tts.tts, TEXT, **options))
    both = np.array(alone(tts.tts, f"{TEXT} {TEXT}", **options))
    np.testing.assert_array_equal(both[: len(one)], one)
    start = len(both) - len(one)  # coqui-tts puts silence behind a sentence
    assert start >= len(one)
    np.testing.assert_array_equal(both[start:], one)


def test_stream(xtts, voice, limited):
    theirs, _ = stream(xtts, voice, seed=SEED, **limited)
    neuron_xtts.patch(xtts, strict=True)
    ours = alone(chunks_of, xtts, voice, seed=SEED, **limited)
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_stream_that_others_interrupt(xtts, voice, limited):
    """A seed holds whatever is drawn between two chunks."""
    neuron_xtts.patch(xtts, strict=True)
    undisturbed = chunks_of(xtts, voice, seed=SEED, **limited)
    interrupted = []
    for chunk in xtts.inference_stream(TEXT, "en", *voice, seed=SEED, **limited):
        interrupted.append(chunk.numpy())
        speak(xtts, voice, seed=5, **limited)
    for a, b in zip(interrupted, undisturbed, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # windows may lie elsewhere


def test_several_sequences(xtts, voice, limited):
    """Rows of one call draw together, as Hugging Face's do."""
    arguments = voice[0], torch.arange(1, 10)[None]
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12}
    torch.manual_seed(SEED)
    theirs = xtts.gpt.generate(*arguments, **options)
    neuron_xtts.patch(xtts, strict=True)
    assert torch.equal(alone(xtts.gpt.generate, *arguments, seed=SEED, **options), theirs)


@pytest.mark.parametrize("options", [{"typical_p": 0.9}, {"epsilon_cutoff": 1e-3}], ids=str)
def test_fallback(xtts, voice, options):
    """What coqui-tts must serve itself it serves with the seed."""
    arguments = voice[0], torch.arange(1, 10)[None]
    options = {"do_sample": True, "max_new_tokens": 12, **options}
    torch.manual_seed(SEED)
    theirs = xtts.gpt.generate(*arguments, **options)
    neuron_xtts.patch(xtts)
    assert torch.equal(alone(xtts.gpt.generate, *arguments, seed=SEED, **options), theirs)
    (name,) = options.keys() - {"do_sample", "max_new_tokens"}
    assert fallbacks(xtts, "GPT.generate") == {f"argument {name}": 1}


@pytest.mark.parametrize("at", [0, 11])
def test_a_failing_step(xtts, voice, limited, monkeypatch, at):
    """coqui-tts draws the codes of the seed from the start, of a stream those that are still to come."""
    whole, _ = speak(xtts, voice, seed=SEED, **limited)
    chunks, _ = stream(xtts, voice, seed=SEED, **limited)
    neuron_xtts.patch(xtts)
    with monkeypatch.context() as patching:
        patching.setattr(Runner, "step", failing(Runner.step, at))
        assert_same(alone(xtts.inference, TEXT, "en", *voice, seed=SEED, **limited), whole)
    with monkeypatch.context() as patching:
        patching.setattr(Runner, "step", failing(Runner.step, at))
        ours = alone(chunks_of, xtts, voice, seed=SEED, **limited)
    for a, b in zip(ours, chunks, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    reason = {"RuntimeError: the device is gone": 1}
    assert all_fallbacks(xtts) == {"GPT.generate": reason, "GPT.get_generator": reason}


def test_disabled(xtts, voice, limited, monkeypatch):
    whole, _ = speak(xtts, voice, seed=SEED, **limited)
    chunks, _ = stream(xtts, voice, seed=SEED, **limited)
    neuron_xtts.patch(xtts)
    monkeypatch.setenv(DISABLE_VARIABLE, "1")
    ours = alone(xtts.inference, TEXT, "en", *voice, seed=SEED, **limited)
    np.testing.assert_array_equal(ours["wav"], whole["wav"])
    for a, b in zip(alone(chunks_of, xtts, voice, seed=SEED, **limited), chunks, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("disabled", [False, True])
def test_disabled_or_not_threads_keep_their_seeds(xtts, voice, limited, monkeypatch, disabled):
    if disabled:
        monkeypatch.setenv(DISABLE_VARIABLE, "1")
    neuron_xtts.patch(xtts)
    seeds = range(4)
    options = {"do_sample": True, "max_new_tokens": 12}
    arguments = voice[0], torch.arange(1, 10)[None]
    expected = [xtts.gpt.generate(*arguments, seed=seed, **options) for seed in seeds]
    found = {}

    def run(seed):
        found[seed] = [xtts.gpt.generate(*arguments, seed=seed, **options) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(codes, expected[seed]) for seed in seeds for codes in found[seed])


@pytest.mark.parametrize("seed", ["7", 7.0, True, 2**64, -(2**63) - 1, [7]])
@pytest.mark.parametrize("how", ["patched", "strict", "disabled"])
def test_no_seed(xtts, voice, limited, monkeypatch, seed, how):
    """It is the caller's mistake, so that nothing is tried and no fallback counted."""
    if how == "disabled":
        monkeypatch.setenv(DISABLE_VARIABLE, "1")
    neuron_xtts.patch(xtts, strict=how == "strict")
    for call in (xtts.inference, lambda *args, **options: list(xtts.inference_stream(*args, **options))):
        with pytest.raises(ValueError, match=r"seed=.*; expected a whole number from -2\*\*63 to 2\*\*64 - 1, or None"):
            call(TEXT, "en", *voice, seed=seed, **limited)
    assert all_fallbacks(xtts) == {}
