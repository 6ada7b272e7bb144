"""What several tests say about a model."""

import copy
import itertools

import numpy as np
import torch

import neuron_xtts


def text_of(tokens):
    """A text of exactly ``tokens`` text tokens: the language tag, then letters that the vocabulary does not merge."""
    return "z" * (tokens - 1)


def stop_after(xtts, codes):
    """Make ``xtts`` end every generation with its ``codes``-th code; None: never. Returns arguments for it."""
    with torch.no_grad():
        xtts.gpt.mel_head.bias[xtts.gpt.stop_audio_token] = -1e4 if codes is None else 1e4
    return {} if codes is None else {"min_new_tokens": codes - 1}


def speak(xtts, voice, text="the band plays an old song.", seed=3, **options):
    """``Xtts.inference`` with a seed, and the random state it leaves behind."""
    torch.manual_seed(seed)
    result = xtts.inference(text, "en", *voice, **options)
    return result, torch.get_rng_state()


def assert_same_speech(ours, theirs, rounding=1e-5, audio=1e-5):
    """Same codes (as many draws, latents within ``rounding``) and the same audio, within ``audio``."""
    (ours, our_state), (theirs, their_state) = ours, theirs
    assert torch.equal(our_state, their_state)
    assert ours["gpt_latents"].shape == theirs["gpt_latents"].shape
    np.testing.assert_allclose(ours["gpt_latents"], theirs["gpt_latents"], rtol=0, atol=rounding)
    assert ours["wav"].shape == theirs["wav"].shape
    np.testing.assert_allclose(ours["wav"], theirs["wav"], rtol=0, atol=audio)
    assert np.abs(theirs["wav"]).max() > 1e-3  # silence would equal silence


def assert_identical(ours, theirs):
    """Bit for bit the same speech and random state."""
    assert torch.equal(ours[1], theirs[1])
    np.testing.assert_array_equal(ours[0]["gpt_latents"], theirs[0]["gpt_latents"])
    np.testing.assert_array_equal(ours[0]["wav"], theirs[0]["wav"])


def fallbacks(model, route):
    """The fallbacks of a route, by reason."""
    return dict(neuron_xtts.report(model).routes[route].fallbacks)


def all_fallbacks(model):
    """The fallbacks of every route that had any."""
    routes = neuron_xtts.report(model).routes
    return {name: dict(counts.fallbacks) for name, counts in routes.items() if counts.fallbacks}


def dicts(model):
    """Every module's ``__dict__``, by the identity of what it holds."""
    return [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]


def unpatched_copy(model):
    """A copy to ask what coqui-tts itself does."""
    return copy.deepcopy(model)


def failing(original, at, error=None):
    """``original``, but its call number ``at`` raises."""
    calls = itertools.count()

    def run(*args, **kwargs):
        if next(calls) == at:
            raise error or RuntimeError("the device is gone")
        return original(*args, **kwargs)

    return run


def stream(xtts, voice, text="the band plays an old song.", seed=3, **options):
    """The chunks of ``Xtts.inference_stream`` with a seed, and the random state they leave behind."""
    torch.manual_seed(seed)
    chunks = [chunk.numpy() for chunk in xtts.inference_stream(text, "en", *voice, **options)]
    return chunks, torch.get_rng_state()


def assert_same_chunks(ours, theirs, audio=1e-5):
    """As many draws, and the same chunks, within ``audio``."""
    assert torch.equal(ours[1], theirs[1])
    assert [len(chunk) for chunk in ours[0]] == [len(chunk) for chunk in theirs[0]]
    for a, b in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=audio)
    samples = np.concatenate(theirs[0])  # none at all, if there is less than what chunks overlap
    assert not len(samples) or np.abs(samples).max() > 1e-4
