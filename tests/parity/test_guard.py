"""The guard against tails: speech is capped, said once more, trimmed and counted; without one nothing changes."""

import copy
import gc
import threading

import numpy as np
import pytest
import torch
from helpers import (
    all_fallbacks,
    assert_identical,
    assert_same_chunks,
    assert_same_speech,
    dicts,
    failing,
    fallbacks,
    speak,
    stop_after,
    stream,
    text_of,
)

import neuron_xtts
from neuron_xtts import BucketPlan, Guard, QueueFullError
from neuron_xtts.coqui.models import load_tts
from neuron_xtts.decoding.call import Call
from neuron_xtts.decoding.scheduler import Scheduler
from neuron_xtts.patching.dispatch import DISABLE_VARIABLE
from neuron_xtts.report import GuardCounts
from neuron_xtts.routes.tails import Tails
from neuron_xtts.runner import Runner

TEXT = text_of(12)
CAP = 3 + 12  # of `SHORT`, for `TEXT`
SHORT = Guard(codes_per_token=1, spare=3, trim=None)
ONCE = Guard(codes_per_token=1, spare=3, trim=None, retry=False)
THEIRS = {"typical_p": 0.9}  # no argument of the decode loop: coqui-tts serves the call
TRIM = Guard(keep=0.0)
LOUD = 4000  # samples of a sentence before its tail, see `fade`


def fade(xtts):
    """Have what is spoken be quiet from sample `LOUD` on: random weights are as loud all over."""
    whole, chunked = xtts.inference, xtts.inference_stream

    def inference(*args, **kwargs):
        result = whole(*args, **kwargs)
        result["wav"][LOUD:] *= 1e-4
        return result

    @torch.inference_mode()
    def inference_stream(*args, **kwargs):
        given = 0
        for chunk in chunked(*args, **kwargs):
            chunk[max(LOUD - given, 0) :] *= 1e-4
            given += len(chunk)
            yield chunk

    xtts.inference, xtts.inference_stream = inference, inference_stream


def guard_of(model):
    return neuron_xtts.report(model).guard


def codes_of(result):
    return result["gpt_latents"].shape[1]


def chosen(xtts, count):
    """Have the model stop only in its ``count``-th generation."""
    generations, start = 0, Runner.run

    def bias(value):
        with torch.no_grad():
            xtts.gpt.mel_head.bias[xtts.gpt.stop_audio_token] = value

    def run(self, graph, *args):
        nonlocal generations
        if graph == "prefill":
            generations += 1
            bias(1e4 if generations == count else -1e4)
        return start(self, graph, *args)

    return run


@pytest.mark.parametrize("guard", ["yes", None, 1, 8.0])
def test_what_is_no_guard(xtts, guard):
    with pytest.raises(TypeError, match=f"True or False, got a {type(guard).__name__}"):
        neuron_xtts.patch(xtts, guard=guard)
    assert not neuron_xtts.is_patched(xtts)


def test_without_a_guard(xtts, voice):
    """Nothing is on the methods whose speech it would finish, and nothing is cut off."""
    options = {"max_new_tokens": 60, **stop_after(xtts, None)}
    theirs, their_chunks = speak(xtts, voice, TEXT, **options), stream(xtts, voice, TEXT, **options)
    neuron_xtts.patch(xtts, strict=True)
    assert not {"inference", "inference_stream"} & set(vars(xtts))
    assert_same_speech(speak(xtts, voice, TEXT, **options), theirs)
    assert_same_chunks(stream(xtts, voice, TEXT, **options), their_chunks)
    assert guard_of(xtts) is None


def test_speech_that_ends_by_itself(xtts, voice):
    options = stop_after(xtts, CAP - 1)
    theirs, their_chunks = speak(xtts, voice, TEXT, **options), stream(xtts, voice, TEXT, **options)
    neuron_xtts.patch(xtts, strict=True, guard=SHORT)
    assert_same_speech(speak(xtts, voice, TEXT, **options), theirs)
    assert_same_chunks(stream(xtts, voice, TEXT, **options), their_chunks)
    assert guard_of(xtts) == GuardCounts()


@pytest.mark.parametrize("extra", [{}, THEIRS, {"do_sample": False}], ids=["graphs", "coqui-tts", "greedy"])
@pytest.mark.parametrize("guard", [SHORT, ONCE], ids=["retry", "once"])
def test_a_model_that_never_stops(xtts, voice, guard, extra):
    """It has exactly as many codes as the guard lets it have, whoever serves the call, and is said twice if it may."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, guard=guard)
    result, _ = speak(xtts, voice, TEXT, **extra)
    assert codes_of(result) == CAP
    retried = int(guard.retry and extra.get("do_sample", True))
    assert guard_of(xtts) == GuardCounts(capped=1, retried=retried)
    assert (all_fallbacks(xtts) != {}) == (extra == THEIRS)
    steps = neuron_xtts.report(xtts).batch.steps
    assert steps[1] == (0 if extra == THEIRS else (1 + retried) * (CAP - 1))


def test_the_defaults(xtts, voice):
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, strict=True, guard=True)
    codes = xtts.gpt.generate(voice[0], torch.arange(1, 4)[None], do_sample=True, seed=1)
    assert codes.shape == (1, 64 + 8 * 3)


def test_a_cap_that_limits_nothing(xtts, voice):
    """Whoever asks for fewer codes, or for more than the cap at least, gets them; neither is a tail."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, guard=SHORT)
    for extra in ({}, THEIRS):
        assert codes_of(speak(xtts, voice, TEXT, max_new_tokens=CAP, **extra)[0]) == CAP
        assert codes_of(speak(xtts, voice, TEXT, max_new_tokens=4, **extra)[0]) == 4
        assert guard_of(xtts) == GuardCounts()
    for extra in ({}, THEIRS):
        assert codes_of(speak(xtts, voice, TEXT, min_new_tokens=CAP + 5, **extra)[0]) == CAP + 5
    assert guard_of(xtts) == GuardCounts(capped=2, retried=2)


def test_what_ends_early(xtts, voice):
    """By a limit of the caller's that coqui-tts alone knows: that is no tail."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, guard=SHORT)
    assert codes_of(speak(xtts, voice, TEXT, max_time=1e-9)[0]) == 1
    stream(xtts, voice, TEXT, max_time=1e-9)
    assert fallbacks(xtts, "GPT.get_generator") == {"argument max_time": 1}
    assert guard_of(xtts) == GuardCounts()


def test_a_full_queue(xtts, voice, monkeypatch):
    """Refuses no second attempt: what was begun is brought to its end."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, strict=True, guard=SHORT, buckets=BucketPlan(slots=(1,)), queue=0)
    run, other = Scheduler.run, xtts.inference_stream(text_of(60), "en", *voice, stream_chunk_size=4)

    def crowded(self, call):
        if guard_of(xtts).capped == 0 and neuron_xtts.report(xtts).batch.calls == 1:
            next(other)
            with pytest.raises(QueueFullError):
                self._begin(Call(call.rows, call.prefix, call.identity))
        return run(self, call)

    monkeypatch.setattr(Scheduler, "run", crowded)
    assert codes_of(speak(xtts, voice, TEXT)[0]) == CAP
    assert guard_of(xtts) == GuardCounts(capped=1, retried=1)
    assert neuron_xtts.report(xtts).batch.refused == 1
    other.close()


def test_the_second_ends_by_itself(xtts, voice, monkeypatch):
    """Then it is the result, and its latents are those that are handed over."""
    neuron_xtts.patch(xtts, strict=True, guard=SHORT)
    monkeypatch.setattr(Runner, "run", chosen(xtts, 2))
    result, _ = speak(xtts, voice, TEXT)
    assert codes_of(result) == 1
    assert guard_of(xtts) == GuardCounts(capped=1, retried=1, ended=1)
    assert neuron_xtts.report(xtts).routes["GPT.generate"].served == 1
    assert neuron_xtts.report(xtts).routes["GPT.forward"].handed_over == 1


def test_neither_ends_by_itself(xtts, voice):
    """The first is the result, with latents that are handed over; what the second drew has been drawn."""
    stop_after(xtts, None)
    theirs, _ = speak(xtts, voice, TEXT, max_new_tokens=CAP)
    torch.manual_seed(3)
    for _ in range(2 * CAP):
        torch.multinomial(torch.ones(1, 1026), 1)
    state = torch.get_rng_state()
    neuron_xtts.patch(xtts, strict=True, guard=SHORT)
    assert_same_speech(speak(xtts, voice, TEXT), (theirs, state))
    assert neuron_xtts.report(xtts).routes["GPT.forward"].handed_over == 1


@pytest.mark.parametrize("extra", [{}, THEIRS], ids=["graphs", "coqui-tts"])
def test_several_rows(xtts, voice, extra):
    """All are said again, and taken if all of them stopped."""
    stop_after(xtts, None)
    text = torch.arange(1, 13)[None]
    options = {"do_sample": True, "num_return_sequences": 2, **extra}
    with torch.no_grad():
        xtts.gpt.mel_head.bias[xtts.gpt.stop_audio_token] = 2.5  # some stop
    neuron_xtts.patch(xtts, guard=SHORT)
    plain = copy.deepcopy(xtts)
    neuron_xtts.patch(plain, guard=ONCE)
    stop = xtts.gpt.stop_audio_token
    taken = 0
    for seed in range(12):
        first = plain.gpt.generate(voice[0], text, seed=seed, **options)
        before = guard_of(xtts)
        ours = xtts.gpt.generate(voice[0], text, seed=seed, **options)
        after = guard_of(xtts)
        all_stopped = (ours == stop).any(1).all()
        if (first == stop).any(1).all():
            assert before == after
            assert torch.equal(ours, first)
        else:
            assert (after.capped, after.retried) == (before.capped + 1, before.retried + 1)
            assert after.ended - before.ended == int(all_stopped)
            assert all_stopped or torch.equal(ours, first)
            taken += int(all_stopped)
    assert taken
    assert taken < guard_of(xtts).retried


def test_its_cache(xtts, voice, monkeypatch):
    """Of what was chosen."""
    neuron_xtts.patch(xtts, strict=True, guard=SHORT)
    monkeypatch.setattr(Runner, "run", chosen(xtts, 2))
    text = torch.arange(1, 13)[None]
    codes, generated = xtts.gpt.generate(voice[0], text, do_sample=True, return_dict_in_generate=True)
    assert codes.shape == (1, 1)
    assert generated.sequences[0, -1] == codes[0, 0]
    assert generated.past_key_values.get_seq_length() == generated.sequences.shape[1] - 1


@pytest.mark.parametrize("extra", [{}, THEIRS], ids=["graphs", "coqui-tts"])
def test_seeds(xtts, voice, extra):
    """Repeatable, other than what an unseeded call draws, and torch's global generator stays as it is."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, guard=SHORT)
    options = {"do_sample": True, **extra}
    text, before = torch.arange(1, 13)[None], torch.get_rng_state()
    first = xtts.gpt.generate(voice[0], text, seed=5, **options)
    assert torch.equal(xtts.gpt.generate(voice[0], text, seed=5, **options), first)
    assert not torch.equal(xtts.gpt.generate(voice[0], text, seed=6, **options), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_in_company(xtts, voice):
    """What a seed says does not depend on who else speaks, and no second attempt is refused a place."""
    with torch.no_grad():
        xtts.gpt.mel_head.bias[xtts.gpt.stop_audio_token] = 2.0  # some are capped, some of those end then
    neuron_xtts.patch(xtts, strict=True, guard=SHORT, buckets=BucketPlan(slots=(2,)), queue=2)
    texts = torch.arange(1, 13)[None]

    def say(seed):
        return xtts.gpt.generate(voice[0], texts, do_sample=True, seed=seed)

    alone = [say(seed) for seed in range(16)]
    counts = guard_of(xtts)
    assert counts.ended
    assert counts.retried > counts.ended
    together = {}

    def work(first):
        for seed in range(first, 16, 4):
            together[seed] = say(seed)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(16):
        assert torch.equal(together[seed], alone[seed])
    twice = GuardCounts(2 * counts.capped, 2 * counts.retried, 2 * counts.ended)
    assert guard_of(xtts) == twice


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("at", [3, CAP + 3])
def test_a_fault(xtts, voice, monkeypatch, seed, at):
    """In either attempt: coqui-tts makes both, with the same draws."""
    stop_after(xtts, None)
    options = {} if seed is None else {"seed": seed}
    neuron_xtts.patch(xtts, guard=SHORT)
    expected = speak(xtts, voice, TEXT, **options)
    counts = guard_of(xtts)
    neuron_xtts.patch(xtts, guard=SHORT)
    with monkeypatch.context() as patching:
        patching.setattr(Runner, "step", failing(Runner.step, at))
        assert_same_speech(speak(xtts, voice, TEXT, **options), expected)
    assert fallbacks(xtts, "GPT.generate") == {"RuntimeError: the device is gone": 1}
    assert guard_of(xtts) == counts == GuardCounts(capped=1, retried=1)


@pytest.mark.parametrize("plan", [BucketPlan(), BucketPlan.none()], ids=["graphs", "coqui-tts"])
def test_streams(xtts, voice, plan):
    """End at the cap, are counted, and nothing is said twice."""
    options = stop_after(xtts, None) | {"stream_chunk_size": 4}
    theirs = stream(xtts, voice, TEXT, max_new_tokens=CAP, **options)
    neuron_xtts.patch(xtts, guard=SHORT, buckets=plan)
    assert_same_chunks(stream(xtts, voice, TEXT, **options), theirs)
    assert guard_of(xtts) == GuardCounts(capped=1)
    stream(xtts, voice, TEXT, max_new_tokens=CAP, **options)
    assert guard_of(xtts) == GuardCounts(capped=1)
    stop_after(xtts, CAP)
    assert_same_chunks(
        stream(xtts, voice, TEXT, min_new_tokens=CAP - 1, stream_chunk_size=4),
        stream(xtts, voice, TEXT, min_new_tokens=CAP - 1, max_new_tokens=CAP, stream_chunk_size=4),
    )
    assert guard_of(xtts) == GuardCounts(capped=1)  # its last code is the stop code


def test_a_fault_in_a_stream(xtts, voice, monkeypatch):
    options = stop_after(xtts, None) | {"stream_chunk_size": 4}
    theirs = stream(xtts, voice, TEXT, max_new_tokens=CAP, **options)
    neuron_xtts.patch(xtts, guard=SHORT)
    monkeypatch.setattr(Runner, "step", failing(Runner.step, 6))
    assert_same_chunks(stream(xtts, voice, TEXT, **options), theirs)
    assert guard_of(xtts) == GuardCounts(capped=1)


def test_disabled(xtts, voice, monkeypatch):
    fade(xtts)
    options = {"max_new_tokens": 40, **stop_after(xtts, None)}
    theirs, chunks = speak(xtts, voice, TEXT, **options), stream(xtts, voice, TEXT, **options)
    neuron_xtts.patch(xtts, guard=Guard(codes_per_token=1, spare=3, keep=0.0))
    monkeypatch.setenv(DISABLE_VARIABLE, "1")
    assert_identical(speak(xtts, voice, TEXT, **options), theirs)
    assert_same_chunks(stream(xtts, voice, TEXT, **options), chunks, audio=0)
    assert guard_of(xtts) == GuardCounts()


@pytest.mark.slow
def test_trained_speech(miniature):
    """Of a model that was trained is the same speech up to where its voice ends, and no less."""
    tts = load_tts(miniature)
    xtts = tts.synthesizer.tts_model
    voice = xtts.get_conditioning_latents(str(miniature / "f5.wav"))
    texts = (miniature / "sentences.txt").read_text().splitlines()[:4]
    settings = {"temperature": 0.3, "top_k": 5}
    theirs = [speak(xtts, voice, text, **settings) for text in texts]
    neuron_xtts.patch(tts, strict=True, guard=True)
    cut = 0
    for text, (their, state) in zip(texts, theirs, strict=True):
        ours, our_state = speak(xtts, voice, text, **settings)
        end = len(ours["wav"])
        assert_same_speech((ours, our_state), ({**their, "wav": their["wav"][:end]}, state), 1e-4, 1e-4)
        assert np.abs(their["wav"][end:]).max(initial=0) < 0.05 * np.abs(their["wav"]).max()
        cut += len(their["wav"]) - end
    counts = guard_of(tts)
    assert (counts.capped, counts.retried) == (0, 0)
    assert round(counts.seconds * 24000) == cut > 0


def test_trimmed(xtts, voice):
    """The audio of coqui-tts up to an end; the latents are those of all codes."""
    fade(xtts)
    options = {"max_new_tokens": 60, **stop_after(xtts, None)}
    theirs, state = speak(xtts, voice, TEXT, **options)
    neuron_xtts.patch(xtts, strict=True, guard=TRIM)
    whole = Tails(TRIM).trimmed(theirs["wav"])
    assert LOUD <= len(whole) < LOUD + 512 < len(theirs["wav"])
    assert_same_speech(speak(xtts, voice, TEXT, **options), (theirs | {"wav": whole}, state))
    cut_off = (len(theirs["wav"]) - len(whole)) / 24000
    assert guard_of(xtts) == GuardCounts(trimmed=1, seconds=cut_off)
    assert not {"Xtts.inference", "Xtts.inference_stream"} & neuron_xtts.report(xtts).routes.keys()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("size", [3, 20])
def test_a_trimmed_stream(xtts, voice, size, split):
    fade(xtts)
    options = {
        "max_new_tokens": 40,
        "stream_chunk_size": size,
        "enable_text_splitting": split,
        **stop_after(xtts, None),
    }
    text = "the band plays an old song. " * 12 if split else TEXT
    theirs, state = stream(xtts, voice, text, **options)
    neuron_xtts.patch(xtts, strict=True, guard=TRIM)
    ours, our_state = stream(xtts, voice, text, **options)
    joined = np.concatenate(theirs)
    whole = Tails(TRIM).trimmed(joined)
    assert LOUD <= len(whole) < LOUD + 512 < len(joined)
    np.testing.assert_allclose(np.concatenate(ours), whole, rtol=0, atol=1e-5)
    assert all(len(chunk) for chunk in ours)
    assert torch.equal(our_state, state)
    assert guard_of(xtts).trimmed == 1


def test_tensors_of_a_stream(xtts, voice):
    """Are of the kind that coqui-tts gives."""
    fade(xtts)
    options = {"max_new_tokens": 30, "stream_chunk_size": 4, **stop_after(xtts, None)}
    (theirs, *_) = xtts.inference_stream(TEXT, "en", *voice, **options)
    neuron_xtts.patch(xtts, strict=True, guard=TRIM)
    for chunk in xtts.inference_stream(TEXT, "en", *voice, **options):
        assert (chunk.dtype, chunk.ndim, chunk.is_inference()) == (theirs.dtype, 1, theirs.is_inference())
        assert not torch.is_inference_mode_enabled()


def test_a_stream_that_is_closed(xtts, voice):
    """Its row leaves at once; one that is never pulled computes nothing."""
    options = {"stream_chunk_size": 4, **stop_after(xtts, None)}
    neuron_xtts.patch(xtts, strict=True, guard=True)
    xtts.inference_stream(TEXT, "en", *voice, **options).close()
    xtts.inference_stream(TEXT, "en", *voice, **options)
    assert not neuron_xtts.report(xtts).graphs
    chunks = xtts.inference_stream(TEXT, "en", *voice, **options)
    gc.disable()
    try:
        next(chunks)
        assert neuron_xtts.report(xtts).batch.decoding == 1
        chunks.close()
        batch = neuron_xtts.report(xtts).batch
        assert (batch.decoding, batch.cancelled) == (0, 1)
    finally:
        gc.enable()
    assert guard_of(xtts) == GuardCounts()


def test_a_stream_that_others_hold(xtts, voice):
    """It is closed with the stream that the caller has, and not when it is collected."""
    stop_after(xtts, None)
    theirs, held = xtts.inference_stream, []

    def inference_stream(*args, **kwargs):
        held.append(theirs(*args, **kwargs))
        return held[-1]

    xtts.inference_stream = inference_stream
    neuron_xtts.patch(xtts, strict=True, guard=True)
    chunks = xtts.inference_stream(TEXT, "en", *voice)
    next(chunks)
    chunks.close()
    assert next(held[0], None) is None
    assert neuron_xtts.report(xtts).batch.decoding == 0


def test_errors_pass(xtts, voice):
    neuron_xtts.patch(xtts, guard=True)
    with pytest.raises(TypeError):
        xtts.inference(TEXT, "en")
    with pytest.raises(AssertionError, match="400 tokens"):
        xtts.inference(text_of(500), "en", *voice)
    with pytest.raises(AssertionError, match="400 tokens"):
        next(xtts.inference_stream(text_of(500), "en", *voice))


def test_texts_of_several_sentences(tts, xtts, reference):
    """Each sentence is capped and trimmed by itself, by whichever way coqui-tts cuts a text."""
    fade(xtts)
    stop_after(xtts, None)
    options = {"speaker_wav": str(reference), "language": "en"}
    neuron_xtts.patch(tts, strict=True, guard=Guard(codes_per_token=1, spare=3, retry=False, keep=0.0))
    tts.tts("the band plays. the band plays.", **options)
    assert (guard_of(tts).capped, guard_of(tts).trimmed) == (2, 2)
    text = "the band plays an old song. " * 12  # more than coqui-tts says at once
    tts.tts(text, split_sentences=False, enable_text_splitting=True, **options)
    after = guard_of(tts)
    assert after.capped > 3
    assert after.trimmed == 3  # the text as a whole


def test_patched_again_and_unpatched(xtts, voice):
    fade(xtts)
    options = {"max_new_tokens": 40, **stop_after(xtts, None)}
    theirs = speak(xtts, voice, TEXT, **options)
    before = dicts(xtts)
    neuron_xtts.patch(xtts, guard=TRIM)
    assert vars(xtts)["inference"] is not vars(xtts)["inference"].__wrapped__
    kept = xtts.inference
    neuron_xtts.patch(xtts)
    assert dicts(xtts)[0].items() >= {name: before[0][name] for name in ("inference", "inference_stream")}.items()
    assert guard_of(xtts) is None
    assert neuron_xtts.is_patched(xtts)
    assert neuron_xtts.report(xtts).gone == []
    torch.manual_seed(3)
    assert len(kept(TEXT, "en", *voice, **options)["wav"]) == len(theirs[0]["wav"])  # it is off
    neuron_xtts.patch(xtts, guard=TRIM)
    assert len(speak(xtts, voice, TEXT, **options)[0]["wav"]) < len(theirs[0]["wav"])
    neuron_xtts.unpatch(xtts)
    assert dicts(xtts) == before
    assert_identical(speak(xtts, voice, TEXT, **options), theirs)


def test_a_copy(xtts, voice):
    """Has no guard."""
    options = {"max_new_tokens": 40, **stop_after(xtts, None)}
    theirs = speak(xtts, voice, TEXT, **options)
    neuron_xtts.patch(xtts, guard=SHORT)
    assert_identical(speak(copy.deepcopy(xtts), voice, TEXT, **options), theirs)
    assert guard_of(xtts) == GuardCounts()


def test_networks_that_were_replaced(xtts, voice):
    """A model that is not patched any more has no guard, though its own methods still have proxies."""
    fade(xtts)
    options = {"max_new_tokens": 40, **stop_after(xtts, None)}
    theirs, chunks = speak(xtts, voice, TEXT, **options), stream(xtts, voice, TEXT, **options)
    other = copy.deepcopy(xtts)
    neuron_xtts.patch(xtts, guard=TRIM)
    xtts.gpt, xtts.hifigan_decoder = other.gpt, other.hifigan_decoder
    assert_identical(speak(xtts, voice, TEXT, **options), theirs)
    assert_same_chunks(stream(xtts, voice, TEXT, **options), chunks, audio=0)
    assert "Xtts.inference" in neuron_xtts.report(xtts).gone
