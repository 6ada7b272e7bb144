"""The guard against hallucinated tails: limits, another try, ends without silence; without it nothing changes."""

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neuron_xtts
from neuron_xtts.guard import Guard, Tail

TEXT = "the band plays."


@pytest.fixture
def endless(xtts):
    """A model that never ends a sentence."""
    with torch.no_grad():
        xtts.gpt.mel_head.bias[xtts.gpt.stop_audio_token] = -1e4
    return xtts


def tokens(xtts, text=TEXT):
    return len(xtts.tokenizer.encode(text, lang="en"))


def limit(xtts, text=TEXT):
    return int(10 * tokens(xtts, text) + 5)


GUARD = Guard(codes_per_token=10, spare=5, trim=False)


def codes_of(result):
    return result["gpt_latents"].shape[1]


def test_what_it_may_be(xtts):
    for wrong in (1, "yes", None):
        with pytest.raises(ValueError, match="expected True, False or a neuron_xtts"):
            neuron_xtts.patch(xtts, guard=wrong)
    for wrong in ({"spare": -1}, {"codes_per_token": "3"}, {"silence": float("nan")}):
        with pytest.raises(ValueError, match=f"Guard\\({next(iter(wrong))}="):
            Guard(**wrong)
    neuron_xtts.patch(xtts)
    assert neuron_xtts.report(xtts).guard is None
    neuron_xtts.patch(xtts, guard=True)
    assert neuron_xtts.report(xtts).guard.capped == 0
    neuron_xtts.unpatch(xtts)
    assert "inference" not in vars(xtts)
    assert "inference_stream" not in vars(xtts)


def test_a_sentence_that_does_not_end(endless, voice):
    """Its limit is met exactly, it is drawn once more, and that is counted; without a guard it goes on to the end."""
    neuron_xtts.patch(endless, guard=GUARD)
    found = endless.inference(TEXT, "en", *voice, seed=1)
    assert codes_of(found) == limit(endless)
    counts = neuron_xtts.report(endless).guard
    assert (counts.capped, counts.retried, counts.ended) == (1, 1, 0)
    assert not neuron_xtts.report(endless).routes["GPT.generate"].fallbacks
    neuron_xtts.patch(endless, guard=Guard(codes_per_token=10, spare=5, retry=False, trim=False))
    once = endless.inference(TEXT, "en", *voice, seed=1)
    assert np.array_equal(once["wav"], found["wav"])  # the first try, since the second did not end, either
    assert neuron_xtts.report(endless).guard.retried == 0
    neuron_xtts.patch(endless)
    assert codes_of(endless.inference(TEXT, "en", *voice, seed=1, max_new_tokens=limit(endless) + 9)) > limit(endless)


def test_another_try(xtts, voice):
    """It goes on with the draws of the first, ends by itself, and is what is heard."""
    with torch.no_grad():  # ends after some dozen codes, at random
        xtts.gpt.mel_head.bias[xtts.gpt.stop_audio_token] += 2.0
    neuron_xtts.patch(xtts)
    lengths = {seed: codes_of(xtts.inference(TEXT, "en", *voice, seed=seed)) for seed in range(12)}
    most = sorted(lengths.values())[6]  # so that about half of them meet it
    neuron_xtts.patch(xtts, guard=Guard(codes_per_token=0, spare=most, trim=False))
    saved = 0
    for seed, length in lengths.items():
        before = neuron_xtts.report(xtts).guard
        found = codes_of(xtts.inference(TEXT, "en", *voice, seed=seed))
        counts = neuron_xtts.report(xtts).guard
        if length < most:
            assert (found, counts) == (length, before)
        elif counts.ended > before.ended:
            saved += 1
            assert found < most or found == most
            assert counts.retried == before.retried + 1
        assert found <= most
        assert codes_of(xtts.inference(TEXT, "en", *voice, seed=seed)) == found  # a seed is one speech
    assert saved


def test_in_company(endless, voice):
    """Whoever speaks beside it, a seed is the same speech, second tries included."""
    neuron_xtts.patch(endless, guard=GUARD)
    alone = [endless.inference(TEXT, "en", *voice, seed=seed)["gpt_latents"] for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(endless.inference, TEXT, "en", *voice, seed=seed) for seed in range(4)]
        together = [call.result()["gpt_latents"] for call in calls]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
    assert neuron_xtts.report(endless).guard.capped == 8


def test_a_stream_that_does_not_end(endless, voice):
    neuron_xtts.patch(endless, guard=GUARD)
    heard = sum(len(chunk) for chunk in endless.inference_stream(TEXT, "en", *voice, seed=1))
    assert heard / 24000 == pytest.approx(limit(endless) * 1024 / 22050, abs=0.1)
    counts = neuron_xtts.report(endless).guard
    assert (counts.capped, counts.retried) == (1, 0)
    stream = endless.inference_stream(TEXT, "en", *voice, seed=1)
    next(stream)
    stream.close()
    assert neuron_xtts.report(endless).guard.capped == 1
    assert neuron_xtts.report(endless).batch.decoding == 0


def test_where_coqui_serves(endless, voice):
    """The limit holds for what falls back, too; with everything turned off, nothing of the guard is left."""
    neuron_xtts.patch(endless, guard=GUARD)
    fallen = endless.inference(TEXT, "en", *voice, seed=1, output_scores=True)
    assert neuron_xtts.report(endless).routes["GPT.generate"].fallbacks
    assert codes_of(fallen) == limit(endless)
    longer = limit(endless) + 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEURON_XTTS_DISABLE", "1")
        assert codes_of(endless.inference(TEXT, "en", *voice, seed=1)) > longer


def test_limits_of_the_caller(endless, voice):
    """A smaller limit of the caller's own holds, and is no tail; a least length goes before the guard's limit."""
    neuron_xtts.patch(endless, guard=GUARD)
    assert codes_of(endless.inference(TEXT, "en", *voice, seed=1, max_new_tokens=20)) == 20
    assert neuron_xtts.report(endless).guard.capped == 0
    least = limit(endless) + 10
    assert codes_of(endless.inference(TEXT, "en", *voice, seed=1, min_new_tokens=least)) == least


def test_off_is_as_before(tts_original, voice):
    """Bit for bit, and with a guard that has nothing to do, too."""
    found = []
    for guard in (False, Guard(trim=False)):
        xtts = copy.deepcopy(tts_original).synthesizer.tts_model
        neuron_xtts.patch(xtts, guard=guard)
        torch.manual_seed(3)
        whole = xtts.inference(TEXT, "en", *voice, max_new_tokens=40)["wav"]
        stream = torch.cat(list(xtts.inference_stream(TEXT, "en", *voice, seed=3, max_new_tokens=40)))
        found.append((whole, stream.numpy(), torch.get_rng_state()))
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)


def test_a_silent_end(xtts, voice, monkeypatch):
    """It is cut off, of whole calls and of streams, up to what is to be kept; nothing else is."""
    neuron_xtts.patch(xtts)
    plain = xtts.inference(TEXT, "en", *voice, seed=3, max_new_tokens=40)["wav"]
    silent = np.concatenate([plain, np.zeros(24000, np.float32)])
    neuron_xtts.unpatch(xtts)
    whole = dict(xtts.inference(TEXT, "en", *voice, max_new_tokens=4), wav=silent)
    monkeypatch.setattr(xtts, "inference", lambda *_, **__: whole)
    parts = [torch.from_numpy(part) for part in np.array_split(silent, 7)]
    monkeypatch.setattr(xtts, "inference_stream", lambda *_, **__: (part for part in parts))
    neuron_xtts.patch(xtts, guard=Guard(keep=0.1))
    found = xtts.inference(TEXT, "en", *voice)["wav"]
    assert len(plain) - 480 <= len(found) <= len(plain) + 2400 + 480
    assert np.array_equal(found, silent[: len(found)])
    streamed = torch.cat(list(xtts.inference_stream(TEXT, "en", *voice))).numpy()
    assert np.array_equal(streamed, found)
    counts = neuron_xtts.report(xtts).guard
    assert counts.trimmed == 2
    assert counts.seconds == pytest.approx(2 * (len(silent) - len(found)) / 24000)
    assert "trimmed" in str(neuron_xtts.report(xtts))
    assert neuron_xtts.report(xtts).to_dict()["guard"]["trimmed"] == 2


LOUD = st.sampled_from([0.0, 0.0, 1e-5, 0.01, 0.5])


@settings(max_examples=200, deadline=None)
@given(
    frames=st.lists(st.tuples(LOUD, st.integers(1, 2000)), max_size=8),
    cuts=st.lists(st.integers(0, 9000), max_size=8),
)
def test_held_back(frames, cuts):
    """However audio is cut into chunks, what is given is its beginning, up to its last voiced sample at least."""
    generator = torch.Generator().manual_seed(0)
    parts = [level * (2 * torch.rand(size, generator=generator) - 1) for level, size in frames]
    audio = torch.cat([torch.zeros(0), *parts])
    places = [0, *sorted(min(cut, len(audio)) for cut in cuts), len(audio)]
    tail, given = Tail(Guard(keep=0.05), 24000), []
    for start, end in itertools.pairwise(places):
        given.append(tail.give(audio[start:end]))
    rest, cut = tail.rest()
    found = torch.cat([*given, rest])
    assert len(found) + cut == len(audio)
    assert torch.equal(found, audio[: len(found)])
    levels = [level for level, _ in frames]
    if max(levels, default=0) > 0:
        ends = np.cumsum([size for _, size in frames])
        voiced = [end for end, level in zip(ends, levels, strict=True) if level >= 0.01]
        assert len(found) >= max(voiced, default=0)
        if voiced and levels[-1] == 0:
            # Where silence follows, at most what is kept of it and two frames that are not whole.
            last = max(end for end, level in zip(ends, levels, strict=True) if level > 0)
            assert len(found) <= last + 1200 + 960
    else:
        assert len(found) == len(audio)
