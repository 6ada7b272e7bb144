"""Several codes in one call of the decode graph, from end to end on the double: the same speech as one by one."""

import copy
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import neuron_double
import pytest
import torch
from helpers import (
    all_fallbacks,
    assert_same_chunks,
    assert_same_speech,
    failing,
    fallbacks,
    speak,
    stream,
    text_of,
    unpatched_copy,
)

import neuron_xtts
from neuron_xtts import BucketPlan
from neuron_xtts.backends.neuron.backend import LoadedGraph
from neuron_xtts.backends.neuron.store import Store
from neuron_xtts.patching.patch import find_patch
from neuron_xtts.tools.bench import sentence

pytest.importorskip("torch_xla")

PLAN = BucketPlan(prefill=(64,), decode=(80, 128), slots=(3,), latents=(), vocoder=(), conditioning=(), steps=4)


@pytest.fixture(scope="module")
def original(tts_original):
    """A model that ends by itself, at one code in ten."""
    model = copy.deepcopy(tts_original).synthesizer.tts_model
    with torch.no_grad():
        model.gpt.mel_head.bias[model.gpt.stop_audio_token] += 4
    return model


@pytest.fixture
def xtts(original):
    return unpatched_copy(original)


@pytest.fixture(scope="module")
def several(original, neuron_root, tmp_path_factory):
    """A store with the graphs of `PLAN`."""
    store = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for _ in neuron_double.on_neuron(neuron_root, monkeypatch):
            summary = neuron_xtts.compile(original, backend="neuron", buckets=PLAN, store=store, progress=False)
            assert summary.ok, summary
            assert {entry.reason for entry in summary.entries} == {None}, summary
    return store


@pytest.fixture
def patch(neuron, several):
    def run(model, **options):
        return neuron_xtts.patch(model, **{"backend": "neuron", "store": several, "buckets": PLAN, **options})

    return run


def at_most(codes):
    return {"max_new_tokens": codes, "min_new_tokens": codes}


WAYS = {
    "coqui-tts's own": at_most(50),
    "not a multiple": at_most(41),
    "one": at_most(1),
    "two": at_most(2),
    "wherever it ends": {"max_new_tokens": 60, "temperature": 1.5},
    "likeliest": {**at_most(30), "do_sample": False},
    "few": {**at_most(30), "top_k": 3, "top_p": 0.4, "repetition_penalty": 2.0, "temperature": 0.6},
    "up to the end of the last bucket": {**at_most(72), "text": text_of(20)},
}


@pytest.mark.slow
@pytest.mark.parametrize("codes", [25, 36, 37, 73, 84, 85])
def test_the_cache_of_a_call_that_ends_where_a_bucket_does(xtts, voice, patch, codes):
    """No step that nobody wants any more has written over what is its last position."""
    text, options = torch.arange(1, 9)[None], {"do_sample": True, "return_dict_in_generate": True, **at_most(codes)}

    def generate():
        torch.manual_seed(4)
        drawn, output = xtts.gpt.generate(voice[0], text, **options)
        return drawn, output.past_key_values

    theirs, cache = generate()
    patch(xtts)
    ours, our_cache = generate()
    assert torch.equal(ours, theirs)
    for a, b in zip(our_cache.layers, cache.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.values, b.values, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_cache_that_does_not_grow(xtts, voice, patch, monkeypatch):
    """As when the write into the next bucket fails: nobody decodes on what may be some of both."""
    ways = {1: 70, 2: 20, 3: 20, 4: 34}

    def say(seed):
        return xtts.gpt.generate(voice[0], torch.arange(1, 12)[None], do_sample=True, seed=seed, **at_most(ways[seed]))

    patch(xtts)
    alone = {seed: say(seed) for seed in ways}
    write, failed = LoadedGraph.write, []

    def fail_once(self, contents, first=0):
        if self.recipe.bucket == (3, 128) and self.recipe.graph == "codes" and not failed:
            failed.append(write(self, contents[:2], first))
            raise RuntimeError("NRT_EXEC: once")
        return write(self, contents, first)

    monkeypatch.setattr(LoadedGraph, "write", fail_once)
    with ThreadPoolExecutor(4) as pool:
        for seed, codes in zip(ways, pool.map(say, ways), strict=True):
            assert torch.equal(codes, alone[seed])
    assert failed
    assert set(fallbacks(xtts, "GPT.generate")) <= {
        "RuntimeError: NRT_EXEC: once",
        "another call took over the decode graph",
    }


@pytest.mark.slow
def test_beyond_the_positions_that_there_are(xtts, voice, patch, monkeypatch):
    """A device would take the last one over and over: coqui-tts says what it says of that."""
    patch(xtts)
    monkeypatch.setattr(xtts.gpt.mel_pos_embedding.emb, "num_embeddings", 20)
    xtts.gpt.generate(voice[0], torch.arange(1, 9)[None], **at_most(20))
    assert fallbacks(xtts, "GPT.generate") == {}
    xtts.gpt.generate(voice[0], torch.arange(1, 9)[None], **at_most(22))
    assert fallbacks(xtts, "GPT.generate") == {"more audio codes than the model has positions": 1}


@pytest.mark.slow
def test_nan_behind_the_end(xtts, voice, patch, monkeypatch):
    """In steps of which nobody takes the codes: nothing of it is heard, nor left for whoever has the slot next."""
    expected = speak(xtts, voice, seed=1, **at_most(30))
    patch(xtts)
    keeper = xtts.inference_stream("an old song.", "en", *voice, seed=9, **at_most(60))
    next(keeper)
    original, spoiled = LoadedGraph.__call__, []

    def run(graph, *inputs):
        outputs = original(graph, *inputs)
        if graph.recipe.graph == "codes" and not spoiled:
            spoiled.append(outputs[2][1, -1].fill_(torch.nan))
        return outputs

    monkeypatch.setattr(LoadedGraph, "__call__", run)
    speak(xtts, voice, seed=1, **at_most(3))
    assert spoiled
    assert_same_speech(speak(xtts, voice, seed=1, **at_most(30)), expected)
    assert fallbacks(xtts, "GPT.generate") == {}
    keeper.close()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_same_speech(xtts, voice, patch, way):
    """Codes, latents and audio, and as many draws of the global generator."""
    options = WAYS[way]
    theirs = [speak(xtts, voice, seed=seed, **options) for seed in (1, 2)]
    patch(xtts)
    ours = [speak(xtts, voice, seed=seed, **options) for seed in (1, 2)]
    for a, b in zip(ours, theirs, strict=True):
        assert_same_speech(a, b)
    report = neuron_xtts.report(xtts)
    assert report.routes["GPT.generate"].fallbacks == {}
    assert "decode" not in report.graphs
    if way == "coqui-tts's own":
        # The first code is prefill's.
        assert sum(counts.runs for counts in report.graphs["codes"].values()) == 2 * 13
        assert set(report.graphs["codes"]) == {"3x80", "3x128"}


@pytest.mark.slow
def test_ends_that_the_model_finds(xtts, voice, patch):
    """At each of the codes of a call; what is drawn behind them is not heard, and the generator knows nothing of it."""
    options = {"max_new_tokens": 60, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    theirs = [speak(xtts, voice, seed=seed, **options) for seed in range(12)]
    assert {said["gpt_latents"].shape[1] % 4 for said, _ in theirs} == {0, 1, 2, 3}
    patch(xtts)
    for seed, expected in enumerate(theirs):
        assert_same_speech(speak(xtts, voice, seed=seed, **options), expected)
    assert all_fallbacks(xtts).keys() <= {"HifiDecoder.forward"}  # the plan has no vocoder


@pytest.mark.slow
def test_streams(xtts, voice, patch):
    theirs = [stream(xtts, voice, seed=seed, stream_chunk_size=7, **at_most(45)) for seed in (3, 4)]
    patch(xtts)
    for seed, expected in zip((3, 4), theirs, strict=True):
        assert_same_chunks(stream(xtts, voice, seed=seed, stream_chunk_size=7, **at_most(45)), expected)
    assert neuron_xtts.report(xtts).routes["GPT.get_generator"].fallbacks == {}


@pytest.mark.slow
def test_a_guard(original, xtts, voice, patch):
    """Caps within a step, and says anew: as on the host, which decodes one by one."""
    guard = neuron_xtts.Guard(codes_per_token=0.25, spare=0, trim=None)
    host = unpatched_copy(original)
    neuron_xtts.patch(host, backend="cpu", guard=guard)
    patch(xtts, guard=guard)
    for seed in range(8):
        assert_same_speech(speak(xtts, voice, seed=seed), speak(host, voice, seed=seed))
        assert_same_chunks(*(stream(each, voice, seed=seed, stream_chunk_size=7) for each in (xtts, host)))
    counts = neuron_xtts.report(xtts).guard
    assert counts == neuron_xtts.report(host).guard
    assert 0 < counts.retried < counts.capped  # streams are said once
    assert all_fallbacks(xtts).keys() <= {"HifiDecoder.forward"}  # the plan has no vocoder


@pytest.mark.slow
def test_rows_of_one_call(xtts, voice, patch):
    """Which end where they end, and go on with stop codes until all have."""
    text = torch.arange(1, 9)[None]
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 3, "max_new_tokens": 60}

    def generate():
        torch.manual_seed(3)
        codes, output = xtts.gpt.generate(voice[0], text, return_dict_in_generate=True, **options)
        return codes, output.past_key_values, torch.get_rng_state()

    codes, cache, state = generate()
    ends = {row.index(xtts.gpt.stop_audio_token) for row in codes.tolist()}
    assert len(ends) == 3
    patch(xtts)
    ours, our_cache, our_state = generate()
    assert torch.equal(ours, codes)
    assert torch.equal(our_state, state)
    for block in range(2):
        for name in ("keys", "values"):
            a, b = (getattr(each.layers[block], name) for each in (our_cache, cache))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_many_callers(xtts, voice, patch):
    """More than there are slots, with seeds and settings of their own, whole and streamed; each as alone."""
    ways = [way for way in WAYS.values() if "text" not in way]

    def say(number):
        options = {"seed": number, **ways[number % len(ways)]}
        if number % 3:
            return [torch.as_tensor(xtts.inference("an old song.", "en", *voice, **options)["gpt_latents"])]
        return list(xtts.inference_stream("an old song.", "en", *voice, stream_chunk_size=9, **options))

    patch(xtts)
    alone = [say(number) for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(say, range(12)))
    for ours, theirs in zip(together, alone, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    report = neuron_xtts.report(xtts)
    assert max(report.batch.steps) == 3
    assert all_fallbacks(xtts).keys() <= {"HifiDecoder.forward"}
    assert report.batch.decoding == 0


@pytest.mark.slow
def test_numbers_that_are_not_finite(xtts, voice, patch):
    """In one of several rows: it alone is coqui-tts's, its draws are undone, and its slot is of use to the next."""
    patch(xtts)
    alone = [speak(xtts, voice, seed=seed, **at_most(30)) for seed in range(3)]
    step = find_patch(xtts).runner.backend._loaded["codes", (3, 80)]
    original, calls = type(step).__call__, []

    def spoiled(graph, *inputs):
        outputs = original(graph, *inputs)
        if graph.recipe.graph == "codes":
            calls.append(graph)
            if len(calls) == 3:
                outputs[2][:, 1] = torch.nan
        return outputs

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(type(step), "__call__", spoiled)
        assert_same_speech(speak(xtts, voice, seed=1, **at_most(30)), alone[1])
    assert fallbacks(xtts, "GPT.generate") == {"logits that are not finite": 1}
    assert_same_speech(speak(xtts, voice, seed=2, **at_most(30)), alone[2])


@pytest.mark.slow
def test_an_error(xtts, voice, patch):
    """What was drawn ahead of the call that failed is drawn again by coqui-tts."""
    expected = speak(xtts, voice, seed=6, **at_most(30))
    patch(xtts)
    backend = find_patch(xtts).runner.backend
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(backend, "call", failing(backend.call, 5))
        assert_same_speech(speak(xtts, voice, seed=6, **at_most(30)), expected)
    ((reason, times),) = fallbacks(xtts, "GPT.generate").items()
    assert ("the device is gone" in reason, times) == (True, 1)


@pytest.mark.slow
def test_tables_that_change(xtts, voice, patch):
    """Codes are embedded on the device: what is changed of that falls back, with a reason, and sounds as it should."""
    patch(xtts)
    hook = xtts.gpt.mel_embedding.register_forward_hook(lambda module, inputs, output: output * 1.5)
    ours = speak(xtts, voice, **at_most(20))
    hook.remove()
    original = xtts.gpt.mel_embedding
    xtts.gpt.mel_embedding = copy.deepcopy(original)
    with torch.no_grad():
        xtts.gpt.mel_embedding.weight *= 1.5
    assert_same_speech(speak(xtts, voice, **at_most(20)), ours, rounding=1e-4, audio=1e-4)
    xtts.gpt.mel_embedding = original
    with torch.no_grad():
        original.weight *= 1.5
    assert_same_speech(speak(xtts, voice, **at_most(20)), ours, rounding=1e-4, audio=1e-4)
    found = fallbacks(xtts, "GPT.generate")
    assert {"the model's modules were replaced after patch()": 1, "weights changed": 1}.items() <= found.items()
    assert len(found) == 3


@pytest.mark.slow
def test_a_device_that_draws_wrongly(xtts, voice, several, neuron, tmp_path, monkeypatch):
    """Is found by verification, and nothing of it is heard."""
    expected = speak(xtts, voice, **at_most(20))
    store = Store(shutil.copytree(several, tmp_path / "store"))
    for artifact in store:
        artifact.record(verification=None, rehearsed=None)
    original = LoadedGraph.__call__

    def run(graph, *inputs):
        codes, *others = original(graph, *inputs)
        return ((codes + (graph.recipe.bucket == (3, 80))) if graph.recipe.graph == "codes" else codes, *others)

    monkeypatch.setattr(LoadedGraph, "__call__", run)
    neuron_xtts.patch(xtts, backend="neuron", store=store.root, buckets=PLAN)
    missing = neuron_xtts.report(xtts).missing
    assert missing.keys() == {"codes 3x80"}
    assert missing["codes 3x80"].startswith("wrong results in call 1 after the first write of its state: error inf")
    assert_same_speech(speak(xtts, voice, **at_most(20)), expected)
    assert set(neuron_xtts.report(xtts).graphs["codes"]) == {"3x128"}


@pytest.mark.slow
def test_the_host_decodes_one_by_one(xtts, voice):
    """Whatever the plan says: there is nothing to be saved."""
    expected = speak(xtts, voice, **at_most(20))
    neuron_xtts.patch(xtts, backend="cpu", buckets=BucketPlan(steps=4))
    assert_same_speech(speak(xtts, voice, **at_most(20)), expected)
    assert set(neuron_xtts.report(xtts).graphs) == {"prefill", "decode", "vocoder"}


@pytest.mark.slow
def test_tools(xtts, voice, patch):
    """Of which some count codes by a hook, where the host embeds them."""
    patch(xtts)
    figures = sentence.speak(xtts, voice, replace(sentence.exactly(21), text="an old song."))
    assert figures["length"] == 21
    assert figures["one code"] == figures["codes"] / 21
    assert fallbacks(xtts, "GPT.generate") == {}
