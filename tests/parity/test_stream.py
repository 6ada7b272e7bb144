"""Streams, patched against unpatched, chunk by chunk; faults in the middle; streams side by side."""

import copy
import gc
import io
import os
import re
import shutil
import wave
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    all_fallbacks,
    assert_same_chunks,
    assert_same_speech,
    failing,
    fallbacks,
    speak,
    stop_after,
    stream,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parity import PLANS
from torch import nn

import neuron_xtts
from neuron_xtts import BucketPlan
from neuron_xtts.backends.host.backend import CpuBackend, HostState
from neuron_xtts.backends.host.rows import Rows
from neuron_xtts.backends.neuron.tracing import traceable
from neuron_xtts.coqui.hooks import is_hooked, without_recorders
from neuron_xtts.coqui.recognise import make_graphs
from neuron_xtts.coqui.surface import Networks
from neuron_xtts.patching.patch import find_patch
from neuron_xtts.runner import Runner

TEXT = "the band plays an old song."


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("codes", [1, 2, 19, 20, 21, 90])
def test_same_chunks(xtts, voice, plan, codes):
    """To the stop code, at every place it may have in a chunk."""
    options = {"max_new_tokens": 200, **stop_after(xtts, codes)}
    theirs = stream(xtts, voice, **options)
    neuron_xtts.patch(xtts, buckets=PLANS[plan], strict=True)
    assert_same_chunks(stream(xtts, voice, **options), theirs)
    report = neuron_xtts.report(xtts)
    assert report.routes["GPT.get_generator"].served == 1
    assert sum(counts.runs for counts in report.graphs.get("decode", {}).values()) == codes - 1
    assert all_fallbacks(xtts) == {}


@pytest.fixture(scope="module")
def models(tts_original):
    """One as it is, one patched; both stop as soon as they may."""
    plain = copy.deepcopy(tts_original.synthesizer.tts_model)
    stop_after(plain, 1)
    patched = copy.deepcopy(plain)
    return plain, neuron_xtts.patch(patched, strict=True)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 100),
    overlap=st.integers(256, 4096),
    codes=st.integers(1, 60),
    speed=st.just(1.0) | st.floats(0.7, 1.5),
    split=st.booleans(),
    sample=st.booleans(),
    stops=st.booleans(),
)
def test_any_stream(models, voice, seed, size, overlap, codes, speed, split, sample, stops):
    options = {
        "stream_chunk_size": size, "overlap_wav_len": overlap, "speed": speed, "enable_text_splitting": split,
        "do_sample": sample, "max_new_tokens": 100 if stops else codes, "min_new_tokens": codes - stops,
    }  # fmt: skip
    results = []
    for model in models:
        try:
            results.append(stream(model, voice, seed=seed, **options))
        except Exception as error:  # coqui-tts has inputs of its own that it cannot do
            results.append((type(error), str(error)))
    theirs, ours = results
    if isinstance(theirs[0], type):
        assert ours == theirs
    else:
        assert_same_chunks(ours, theirs)


@pytest.mark.parametrize(("owner", "method", "at"), [(CpuBackend, "run", 0), (Runner, "step", 0), (Runner, "step", 33)])
def test_a_fault_in_the_middle(xtts, voice, monkeypatch, owner, method, at):
    """coqui-tts's generator goes on where ours stopped: no chunk is lost, none comes twice."""
    options = {"max_new_tokens": 50, **stop_after(xtts, None)}
    theirs = stream(xtts, voice, **options)
    neuron_xtts.patch(xtts)
    with monkeypatch.context() as patching:
        patching.setattr(owner, method, failing(getattr(owner, method), at))
        assert_same_chunks(stream(xtts, voice, **options), theirs)
    assert all_fallbacks(xtts) == {"GPT.get_generator": {"RuntimeError: the device is gone": 1}}
    assert_same_chunks(stream(xtts, voice, **options), theirs)
    assert neuron_xtts.report(xtts).routes["GPT.get_generator"].served == 1


def test_a_bucket_that_is_outgrown(xtts, voice):
    options = {"max_new_tokens": 40, **stop_after(xtts, None)}
    theirs = stream(xtts, voice, **options)
    neuron_xtts.patch(xtts, buckets=BucketPlan(decode=(80,)))
    assert_same_chunks(stream(xtts, voice, **options), theirs)
    assert fallbacks(xtts, "GPT.get_generator") == {"larger than the largest decode bucket (80)": 1}


# What inference_stream does not pass, straight to the generator: arguments, and the reason.
REASONS = {
    "beams": ({"num_beams": 2, "do_sample": True}, "argument num_beams"),
    "typical": ({"typical_p": 0.5, "do_sample": True}, "argument typical_p"),
    "several rows": ({"num_return_sequences": 2, "do_sample": True}, "a stream of several rows"),
}


@pytest.mark.parametrize("name", REASONS)
def test_arguments_that_fall_back(xtts, voice, name):
    arguments, reason = REASONS[name]

    def pairs():
        ids = xtts.gpt.compute_embeddings(voice[0], torch.arange(1, 10)[None])
        torch.manual_seed(1)
        steps = xtts.gpt.get_generator(
            fake_inputs=ids, output_hidden_states=True, return_dict_in_generate=True, max_new_tokens=5, **arguments
        )
        return [(code, latents) for code, latents in steps]

    theirs = pairs()
    neuron_xtts.patch(xtts)
    for (our_code, ours), (their_code, latents) in zip(pairs(), theirs, strict=True):
        assert torch.equal(our_code, their_code)
        assert torch.equal(ours, latents)
    assert fallbacks(xtts, "GPT.get_generator") == {reason: 1}


def test_states_that_fall_back(xtts, voice):
    neuron_xtts.patch(xtts)
    ids = xtts.gpt.compute_embeddings(voice[0], torch.arange(1, 10)[None])
    common = {"max_new_tokens": 3, "return_dict_in_generate": True}
    xtts.gpt.get_generator(fake_inputs=ids, **common)
    xtts.gpt.get_generator(fake_inputs=ids[:, 1:], output_hidden_states=True, **common)
    ids = xtts.gpt.compute_embeddings(voice[0].double(), torch.arange(1, 10)[None])
    xtts.gpt.get_generator(fake_inputs=ids, output_hidden_states=True, **common)
    assert fallbacks(xtts, "GPT.get_generator") == {
        "argument output_hidden_states=False": 1,
        "ids that do not fit the prefix on the model": 1,
        "a prefix of torch.float64": 1,
    }


@pytest.mark.parametrize("fault", [None, 12])
def test_streams_side_by_side(xtts, voice, monkeypatch, fault):
    """Pulled in turns, each is what it would be alone; even if one of them goes on with coqui-tts's generator."""
    options = {"max_new_tokens": 45, "top_k": 1, **stop_after(xtts, None)}  # no draw depends on whose turn it is
    texts = ("one.", "another one, which is longer.")
    alone = [stream(xtts, voice, text, **options)[0] for text in texts]
    neuron_xtts.patch(xtts)
    if fault:
        monkeypatch.setattr(Runner, "step", failing(Runner.step, fault))
    streams = [xtts.inference_stream(text, "en", *voice, **options) for text in texts]
    together = list(zip(*streams, strict=True))
    for ours, theirs in zip(zip(*together, strict=True), alone, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a.numpy(), b, rtol=0, atol=1e-5)
    assert sum(fallbacks(xtts, "GPT.get_generator").values()) == (1 if fault else 0)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 1, "typical_p": 0.9}], ids=["served", "fallback"])
def test_streams_that_begin_at_once(xtts, voice, arguments):
    """coqui-tts has one place for a stream's prefix; here two have put theirs there before either goes on."""
    text, voices = torch.arange(1, 10)[None], (voice[0], -voice[0])
    options = {
        "output_hidden_states": True,
        "return_dict_in_generate": True,
        "max_new_tokens": 12,
        "do_sample": True,
        "top_k": 1,
    }

    def latents(ids):
        return torch.cat([step for _, step in xtts.gpt.get_generator(fake_inputs=ids, **options, **arguments)])

    alone = [latents(xtts.gpt.compute_embeddings(own, text)) for own in voices]
    assert not torch.allclose(*alone, atol=1e-2)
    neuron_xtts.patch(xtts)
    begun = [xtts.gpt.compute_embeddings(own, text) for own in voices]
    for ids, expected in zip(begun, alone, strict=True):
        torch.testing.assert_close(latents(ids), expected, rtol=0, atol=1e-5)
    assert sum(fallbacks(xtts, "GPT.get_generator").values()) == (2 if arguments else 0)
    del begun, ids
    gc.collect()
    prefixes = find_patch(xtts).dispatcher.engines.first.prefixes
    assert not prefixes


def test_an_abandoned_stream_frees_its_state(xtts, voice, monkeypatch):
    states = []
    new_state = CpuBackend.new_state
    monkeypatch.setattr(
        CpuBackend, "new_state", lambda *args: states.append(weakref.ref(state := new_state(*args))) or state
    )
    neuron_xtts.patch(xtts, strict=True)
    for _ in range(3):
        chunks = xtts.inference_stream(TEXT, "en", *voice, max_new_tokens=60, min_new_tokens=60)
        next(chunks)
        assert states[-1]() is not None
        chunks.close()
        assert states[-1]() is None  # at once, not when somebody collects garbage
    gc.collect()
    assert neuron_xtts.report(xtts).routes["GPT.get_generator"].served == 3


def resident():
    """Bytes of memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.slow
def test_a_thousand_abandoned_streams(xtts, voice):
    """Texts and voices of their own, each given up after its first chunk: nothing piles up."""
    neuron_xtts.patch(xtts, strict=True)
    find_patch(xtts).dispatcher.engines.first.audio._size = 2**20  # what is remembered on purpose, of 800 streams 8 MB
    held = {}
    for i in range(1001):
        if i in (200, 1000):
            gc.collect()
            held[i] = resident()
        torch.manual_seed(i)
        chunks = xtts.inference_stream("a" * (1 + i % 9), "en", *voice, stream_chunk_size=2, max_new_tokens=50)
        next(chunks)
        del chunks
    assert held[1000] - held[200] < 8 * 2**20
    assert not [state for state in gc.get_objects() if type(state) in (Rows, HostState)]
    assert neuron_xtts.report(xtts).routes["GPT.get_generator"].served == 1001


@pytest.mark.skipif(not shutil.which("ffplay"), reason="ffplay is not installed")
def test_the_recipes(tts, reference, tmp_path, monkeypatch):
    """The code of docs/streaming.md, as it stands there; the first block loads weights that are not to be had here."""
    page = Path(__file__).parents[2] / "docs" / "streaming.md"
    _, play, write, stop = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDL_AUDIODRIVER", "dummy")
    xtts = tts.synthesizer.tts_model
    stop_after(xtts, None)
    voice = xtts.get_conditioning_latents(str(reference))
    neuron_xtts.patch(tts, strict=True)
    monkeypatch.setattr(xtts, "inference_stream", partial(xtts.inference_stream, max_new_tokens=50))
    names = {"xtts": xtts, "voice": voice}
    exec(play, names)
    assert names["player"].returncode == 0
    lengths = []
    original = wave.Wave_write.writeframes

    def writeframes(self, data):
        original(self, data)
        with wave.open("speech.wav") as file:  # what a reader finds meanwhile
            lengths.append(len(file.readframes(10**9)) // 2)

    monkeypatch.setattr(wave.Wave_write, "writeframes", writeframes)
    exec(write, names)
    assert lengths == sorted(lengths)
    assert len(lengths) == 3
    assert lengths[-1] > 50 * 1024
    exec(stop, names)
    assert 24000 < names["spoken"] < 50 * 1024
    assert neuron_xtts.report(tts).routes["GPT.get_generator"].served == 3


def test_hooks_that_transformers_leaves(xtts, voice):
    """From version 5 on, a stream of plain coqui-tts leaves hooks that record: graphs serve all the same."""
    stream(xtts, voice, max_new_tokens=5)
    theirs = stream(xtts, voice, max_new_tokens=10)
    neuron_xtts.patch(xtts, strict=True)
    assert_same_chunks(stream(xtts, voice, max_new_tokens=10), theirs)
    assert_same_speech(speak(xtts, voice, max_new_tokens=10), speak(copy.deepcopy(xtts), voice, max_new_tokens=10))
    graphs, _ = make_graphs(Networks.of(xtts))
    torch.save(traceable(graphs), io.BytesIO())  # as compile() hands them to its workers


def test_recorders_are_told_apart():
    def recorder(*_):
        return None

    recorder.__module__ = "transformers.utils.output_capturing"
    inner = nn.Linear(3, 3)
    module = nn.Sequential(inner)
    inner.register_forward_hook(recorder)
    assert not is_hooked(inner)
    copied = without_recorders(module)
    assert not copied[0]._forward_hooks
    assert copied[0].weight is inner.weight
    assert inner._forward_hooks
    inner.register_forward_pre_hook(lambda *_: None)
    assert is_hooked(inner)
    assert is_hooked(without_recorders(module)[0])


def test_disabled(xtts, voice, monkeypatch):
    theirs = stream(xtts, voice, max_new_tokens=10)
    neuron_xtts.patch(xtts, strict=True)
    monkeypatch.setenv("NEURON_XTTS_DISABLE", "1")
    ours = stream(xtts, voice, max_new_tokens=10)
    assert_same_chunks(ours, theirs)
    assert fallbacks(xtts, "GPT.get_generator") == {"NEURON_XTTS_DISABLE is set": 1}
