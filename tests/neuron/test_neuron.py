"""The Neuron backend from end to end, on the double of torch_neuronx that executes what was lowered."""

import gc
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import neuron_double
import numpy as np
import pytest
import torch
from helpers import all_fallbacks, assert_identical, assert_same_speech, failing, fallbacks, speak, unpatched_copy

import neuron_xtts
from neuron_xtts import BucketPlan
from neuron_xtts.backends.neuron.backend import LoadedGraph, NeuronBackend, NeuronState
from neuron_xtts.backends.neuron.store import MANIFEST, MODEL, Store
from neuron_xtts.coqui.recordings import write_reference
from neuron_xtts.errors import ArtifactError, Fallback
from neuron_xtts.routes import vocoder as routes_vocoder
from neuron_xtts.routes.memo import AudioMemo
from neuron_xtts.tools import bench, demo
from neuron_xtts.tools.bench import accuracy as accuracy_module
from neuron_xtts.tools.bench import device as device_bench
from neuron_xtts.tools.bench.methods import bench_methods
from neuron_xtts.tools.bench.sentence import bench_sentence
from neuron_xtts.tools.bench.stream import bench_stream
from neuron_xtts.tools.cli import main

pytest.importorskip("torch_xla")

CODES = 55  # 24 positions of the prefix below and 32 of conditioning: both sizes of decode are used


def exactly(codes):
    """Options for so many codes; a model changed to speak on would not be the one that was compiled."""
    return {"min_new_tokens": codes, "max_new_tokens": codes}


@pytest.fixture
def patch(neuron, compiled, small_plan):
    """Patches with the compiled store."""

    def run(model, **options):
        return neuron_xtts.patch(model, **{"backend": "neuron", "store": compiled, "buckets": small_plan, **options})

    return run


@pytest.fixture
def spoiled(compiled, tmp_path):
    """A copy of the compiled store."""
    return Store(shutil.copytree(compiled, tmp_path / "store"))


def artifact(store, name):
    (found,) = [a for a in store if a.folder.name.startswith(f"{name}-")]
    return found


def test_the_same_audio(tts, reference, patch):
    """Through ``tts.tts``, with every graph in use, and nothing left to coqui-tts."""
    xtts = tts.synthesizer.tts_model
    options = {"speaker_wav": str(reference), "language": "en", "split_sentences": False, **exactly(CODES)}

    def say():
        torch.manual_seed(5)
        return np.array(tts.tts("the band plays an old song.", **options))

    # 6 s at a time, so that the reference is one chunk of 259 frames.
    xtts.config.gpt_cond_chunk_len = 6
    theirs = say()
    patch(tts, strict=True)
    ours = say()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.abs(theirs).max() > 1e-3
    report = neuron_xtts.report(tts)
    assert (report.backend, report.precision, report.missing, report.over_host) == ("neuron", "fp32", {}, None)
    assert set(report.graphs) == {"conditioning", "prefill", "decode", "vocoder"}  # moves are part of decoding
    assert set(report.graphs["decode"]) == {"1x80", "1x128"}
    assert set(report.graphs["vocoder"]) == {"64", "96"}  # the last window is a smaller one
    assert all_fallbacks(tts) == {}
    neuron_xtts.unpatch(tts)
    assert not neuron_xtts.is_patched(tts)


def test_parity_at_every_stage(xtts, voice, patch):
    """Codes, latents, audio and the random state, several times in a row on the same states."""
    theirs = [speak(xtts, voice, seed=seed, **exactly(codes)) for seed, codes in ((1, 50), (2, 3), (3, 55))]
    patch(xtts, strict=True)
    ours = [speak(xtts, voice, seed=seed, **exactly(codes)) for seed, codes in ((1, 50), (2, 3), (3, 55))]
    for a, b in zip(ours, theirs, strict=True):
        assert_same_speech(a, b)


def chunks_of(xtts, voice, text="the band plays an old song."):
    return xtts.inference_stream(text, "en", *voice, top_k=1, **exactly(CODES))


def test_a_stream(xtts, voice, patch):
    theirs = list(chunks_of(xtts, voice))
    patch(xtts, strict=True)
    for a, b in zip(chunks_of(xtts, voice), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert neuron_xtts.report(xtts).routes["GPT.get_generator"].served == 1


def test_a_guard(xtts, voice, patch):
    """Caps, says anew and trims as on the host, and everything on graphs."""
    guard = neuron_xtts.Guard(codes_per_token=1, spare=7, trim=1.0, keep=0.0)
    host = unpatched_copy(xtts)
    neuron_xtts.patch(host, backend="cpu", guard=guard)
    patch(xtts, guard=guard, strict=True)
    assert_same_speech(speak(xtts, voice), speak(host, voice))
    streams = (each.inference_stream("an old song.", "en", *voice, seed=3) for each in (xtts, host))
    for a, b in zip(*streams, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    counts = neuron_xtts.report(xtts).guard
    assert counts == neuron_xtts.report(host).guard
    assert (counts.capped, counts.retried) == (2, 1)
    assert counts.trimmed


def test_two_streams_on_one_decode_graph(xtts, voice, patch):
    """The cache of the one that is overtaken waits on the host: both are what they would be alone."""
    texts = ("one.", "another one.")
    alone = [list(chunks_of(xtts, voice, text)) for text in texts]
    patch(xtts, strict=True)
    together = list(zip(*(chunks_of(xtts, voice, text) for text in texts), strict=True))
    for ours, theirs in zip(zip(*together, strict=True), alone, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert neuron_xtts.report(xtts).routes["GPT.get_generator"].served == 2


def test_rows_that_join(xtts, voice, neuron, tmp_path):
    """Three streams in two slots: whoever joins leaves the other as it is, and whoever made room goes on as before."""
    plan = BucketPlan(prefill=(64,), decode=(80,), slots=(2,), latents=(), vocoder=(), conditioning=())
    options = {"backend": "neuron", "buckets": plan, "store": tmp_path}
    assert neuron_xtts.compile(xtts, **options, progress=False).ok
    texts = [torch.arange(1, size)[None] for size in (9, 14, 6)]
    generate = {"top_k": 3, "do_sample": True, **exactly(30)}
    alone = []
    for seed, text in enumerate(texts):
        torch.manual_seed(seed)
        alone.append(xtts.gpt.generate(voice[0], text, **generate)[0].tolist())
    neuron_xtts.patch(xtts, **options, strict=True)

    def begin(seed):
        fake = xtts.gpt.compute_embeddings(voice[0], texts[seed])
        options = {"output_hidden_states": True, "return_dict_in_generate": True, "seed": seed, **generate}
        return xtts.gpt.get_generator(fake_inputs=fake, **options)

    found = [[], [], []]
    streams = [begin(0)]
    for turn in range(40):
        if turn in (3, 7):
            streams.append(begin(len(streams)))
        for codes, stream in zip(found, streams, strict=False):
            codes += [int(code) for code, _ in itertools.islice(stream, 1)]
    assert found == alone
    assert neuron_xtts.report(xtts).graphs["decode"]["2x80"].runs < 90


def test_weights_in_bf16(xtts, voice, neuron, tmp_path, compiled):
    """Less than the artifacts in fp32, off by rounding and no more, and it speaks."""
    plan = BucketPlan(prefill=(64,), decode=(80,), slots=(1,), latents=(), vocoder=(), conditioning=())
    options = {"backend": "neuron", "buckets": plan, "store": tmp_path, "precision": "bf16"}
    summary = neuron_xtts.compile(xtts, **options, progress=False)
    assert summary.ok, summary
    exact = {found.folder.name.partition("-")[0]: found.manifest["bytes"] for found in Store(compiled)}
    for found in Store(tmp_path):
        assert found.manifest["recipe"]["precision"] == "bf16"
        assert found.manifest["bytes"] < 0.8 * exact[found.folder.name.partition("-")[0]]
        assert found.manifest["verification"]["error"] < 2e-3  # against the same rounding
        found.record(verification=None)
    neuron_xtts.patch(xtts, **options)
    for found in Store(tmp_path):
        assert 1e-5 < found.manifest["verification"]["error"] < 0.02  # against the model, of the 0.1 that there may be
    said, _ = speak(xtts, voice, **exactly(20))
    assert np.isfinite(said["wav"]).all()
    report = neuron_xtts.report(xtts)
    assert (report.precision, report.routes["GPT.generate"].served) == ("bf16", 1)


def test_abandoned_streams(xtts, voice, patch):
    """Each leaves the decode graph to the next, at once."""
    patch(xtts, strict=True)
    graph = backend_of(xtts)._loaded["decode", (1, 80)]
    for _ in range(20):
        chunks = chunks_of(xtts, voice)
        next(chunks)
        assert graph.owner is not None
        chunks.close()
        assert graph.owner is None
    assert neuron_xtts.report(xtts).routes["GPT.get_generator"].served == 20


def test_the_latents_graph(xtts, voice, patch):
    """Codes from elsewhere."""
    text, codes = torch.ones(1, 9, dtype=torch.long), torch.arange(100, 140)[None]
    arguments = (text, torch.tensor([9]), codes, torch.tensor([40 * 1024]))
    with torch.no_grad():
        theirs = xtts.gpt(*arguments, cond_latents=voice[0], return_latent=True)
        patch(xtts, strict=True)
        ours = xtts.gpt(*arguments, cond_latents=voice[0], return_latent=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert neuron_xtts.report(xtts).graphs["latents"]["128"].runs == 1


def test_the_cache_of_a_generation(xtts, voice, patch):
    """``return_dict_in_generate`` reads it back from the device, in the right order."""
    options = {**exactly(30), "return_dict_in_generate": True}
    text = torch.arange(1, 12)[None]
    codes, theirs = xtts.gpt.generate(voice[0], text, **options)
    patch(xtts, strict=True)
    our_codes, ours = xtts.gpt.generate(voice[0], text, **options)
    assert torch.equal(our_codes, codes)
    for a, b in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        length = a.keys.shape[2]
        torch.testing.assert_close(a.keys, b.keys[:, :, :length], rtol=0, atol=1e-5)
        torch.testing.assert_close(a.values, b.values[:, :, :length], rtol=0, atol=1e-5)


NEW_PROCESS = """
import json, sys
from pathlib import Path
import torch
import neuron_xtts, neuron_xtts.backends.neuron.device
assert "torch_neuronx" not in sys.modules and "TTS" not in sys.modules
neuron_xtts.backends.neuron.device.ROOT = Path(sys.argv[1])
from neuron_xtts.coqui.models import random_tts
tts = random_tts(Path(sys.argv[2]), small=True)
plan = neuron_xtts.BucketPlan(**json.loads(sys.argv[4]))
options = dict(speaker_wav=sys.argv[5], language="en", split_sentences=False, max_new_tokens=30, min_new_tokens=30)
def say():
    torch.manual_seed(9)
    return torch.tensor(tts.tts("hello there.", **options))
theirs = say()
neuron_xtts.patch(tts, store=sys.argv[3], buckets=plan)
ours = say()
report = neuron_xtts.report(tts)
print(json.dumps({"difference": float((ours - theirs).abs().max()), "peak": float(theirs.abs().max()),
                  "report": report.to_dict()}))
"""


def test_a_new_process(neuron, compiled, small_plan, reference, tmp_path):
    """compile -> store -> new process -> patch -> tts.tts; ``backend="auto"`` finds the device."""
    arguments = [neuron / "root", tmp_path / "model", compiled, json.dumps(small_plan.to_dict()), reference]
    done = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, *map(str, arguments)],
        env=neuron_double.environment(neuron / "site", neuron / "root"),
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["difference"] < 1e-4 < result["peak"]
    assert result["report"]["backend"] == "neuron"
    routes = {name: route["fallbacks"] for name, route in result["report"]["routes"].items() if route["fallbacks"]}
    # coqui-tts cuts the reference into 4 s at a time; the small plan has no graph for that length.
    assert routes == {} or set(routes) == {"GPT.get_style_emb"}
    assert result["report"]["routes"]["GPT.generate"]["served"] == 1
    assert result["report"]["routes"]["HifiDecoder.forward"]["served"] == 1


# What is done to the store before patch(), for which graph, and the reason it gives.
def corrupt(found):
    data = bytearray((found.folder / MODEL).read_bytes())
    data[len(data) // 2] ^= 255
    (found.folder / MODEL).write_bytes(data)


def truncate(found):
    data = (found.folder / MODEL).read_bytes()
    (found.folder / MODEL).write_bytes(data[: len(data) // 2])


def change_manifest(found):
    recipe = found.manifest["recipe"] | {"precision": "bf16"}
    (found.folder / MANIFEST).write_text(json.dumps(found.manifest | {"recipe": recipe}))


SPOILED = {
    "corrupt": (corrupt, "is corrupt: its checksum is not that of its manifest"),
    "truncated": (truncate, "is corrupt: its checksum is not that of its manifest"),
    "no file": (lambda found: (found.folder / MODEL).unlink(), "is corrupt: its checksum is not that of its manifest"),
    "no manifest": (lambda found: (found.folder / MANIFEST).unlink(), "not compiled"),
    "half a manifest": (lambda found: (found.folder / MANIFEST).write_text('{"schema": 1, "re'), "not compiled"),
    "another manifest": (change_manifest, "compiled for something else: another precision"),
    "quarantined": (lambda found: found.record(quarantined="wrong results: so it says"), "wrong results: so it says"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_spoiled_artifact(xtts, voice, patch, spoiled, fault):
    spoil, reason = SPOILED[fault]
    theirs = speak(xtts, voice, max_new_tokens=12)
    spoil(artifact(spoiled, "prefill-64"))
    plan = BucketPlan(prefill=(64,), decode=(80,), slots=(1,), latents=(), vocoder=(), conditioning=())
    patch(xtts, store=spoiled.root, buckets=plan)
    assert reason in neuron_xtts.report(xtts).missing["prefill 64"]
    assert_identical(speak(xtts, voice, max_new_tokens=12), theirs)
    # Unless it is there and must not be used, compile() makes it again.
    left = [found.folder.name for found in spoiled if found.folder.name.startswith("prefill-64-")]
    assert len(left) == (fault in ("quarantined", "another manifest"))


def test_missing_graphs_are_named(xtts, voice, patch, tmp_path, caplog, small_plan):
    theirs = speak(xtts, voice, max_new_tokens=12)
    with caplog.at_level(logging.WARNING, logger="neuron_xtts"):
        patch(xtts, store=tmp_path / "empty")
    (record,) = [record for record in caplog.records if record.name == "neuron_xtts.backends.neuron.backend"]
    assert "8 of 8 graphs are not to be had" in record.getMessage()
    assert "neuron_xtts.compile(model), or neuron-xtts compile --checkpoint DIR" in record.getMessage()
    assert_identical(speak(xtts, voice, max_new_tokens=12), theirs)
    assert all_fallbacks(xtts) == {
        "GPT.generate": {"no decode graph: not compiled": 1},
        "GPT.forward": {"no latents graph: not compiled": 1},
        "HifiDecoder.forward": {"no vocoder graph: not compiled": 1},
    }


def test_the_next_window(xtts, voice, patch, spoiled):
    """One window of the vocoder is missing: the other serves."""
    theirs = speak(xtts, voice, max_new_tokens=30)
    shutil.rmtree(artifact(spoiled, "vocoder-96").folder)
    patch(xtts, store=spoiled.root)
    assert_same_speech(speak(xtts, voice, max_new_tokens=30), theirs)
    report = neuron_xtts.report(xtts)
    assert set(report.graphs["vocoder"]) == {"64"}
    assert report.missing == {"vocoder 96": "not compiled"}
    assert all_fallbacks(xtts) == {}


def test_other_versions(xtts, voice, compiled, small_plan, tmp_path, monkeypatch, neuron):
    """What another compiler made is not used, and it is said why."""
    neuron_double.install(tmp_path / "site", neuronx_cc="2.25.3371.0")
    monkeypatch.syspath_prepend(tmp_path / "site")
    theirs = speak(xtts, voice, max_new_tokens=12)
    neuron_xtts.patch(xtts, backend="neuron", store=compiled, buckets=small_plan)
    assert_identical(speak(xtts, voice, max_new_tokens=12), theirs)
    assert fallbacks(xtts, "GPT.generate") == {"no decode graph: compiled for something else: other versions": 1}


def test_other_weights(xtts, voice, patch):
    """Changed before patch()."""
    with torch.no_grad():
        xtts.gpt.gpt.h[0].mlp.c_fc.weight[0, 0] += 1
    theirs = speak(xtts, voice, max_new_tokens=12)
    patch(xtts)
    assert_same_speech(speak(xtts, voice, max_new_tokens=12), theirs)
    assert fallbacks(xtts, "GPT.generate") == {"no decode graph: compiled for something else: weights changed": 1}
    assert fallbacks(xtts, "HifiDecoder.forward") == {}  # whose weights are the same


def test_weights_changed(xtts, voice, patch):
    """Changed under the patch, and changed back."""
    patch(xtts)
    before = unpatched_copy(xtts).state_dict()
    with torch.no_grad():
        xtts.gpt.gpt.ln_f.weight *= 1.5
    ours = speak(xtts, voice, max_new_tokens=12)
    assert fallbacks(xtts, "GPT.generate") == fallbacks(xtts, "GPT.forward") == {"weights changed": 1}
    assert_same_speech(ours, speak(unpatched_copy(xtts), voice, max_new_tokens=12))
    xtts.load_state_dict(before)
    assert_same_speech(speak(xtts, voice, max_new_tokens=12), speak(unpatched_copy(xtts), voice, max_new_tokens=12))
    assert fallbacks(xtts, "GPT.generate") == {"weights changed": 1}  # not once more


def test_hooks_on_inner_layers(xtts, voice, patch):
    """A compiled program calls no Python: hooks that the host backend honours make it fall back."""
    patch(xtts)
    xtts.gpt.gpt.h[0].mlp.c_fc.register_forward_hook(lambda module, inputs, output: output * 1.5)
    ours = speak(xtts, voice, max_new_tokens=12)
    assert_same_speech(ours, speak(unpatched_copy(xtts), voice, max_new_tokens=12))
    assert fallbacks(xtts, "GPT.generate") == {"forward hooks": 1}


# At run time: the fault, the route that meets it, and its reason
FAULTS = {
    "NaN while decoding": ("nan:decode", "GPT.generate", "logits that are not finite"),
    "NaN in the vocoder": ("nan:vocoder", "HifiDecoder.forward", "audio that is not finite"),
    "device error at prefill": ("exec@0:prefill", "GPT.generate", "RuntimeError: "),
    "device error at the first step": ("exec@0:decode", "GPT.generate", "RuntimeError: "),
    "device error at step 9": ("exec@9:decode", "GPT.generate", "RuntimeError: "),
    "device error after growing": ("exec@40:decode", "GPT.generate", "RuntimeError: "),
    "device error in the vocoder": ("exec@1:vocoder", "HifiDecoder.forward", "RuntimeError: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_on_the_device(xtts, voice, patch, monkeypatch, fault):
    theirs = speak(xtts, voice, **exactly(CODES))
    patch(xtts)
    what, route, reason = FAULTS[fault]
    import torch_neuronx

    torch_neuronx._reset()
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", what)
    assert_same_speech(speak(xtts, voice, **exactly(CODES)), theirs)
    ((name, counted),) = all_fallbacks(xtts).items()
    ((counted_reason, count),) = counted.items()
    assert (name, count) == (route, 1)
    assert counted_reason.startswith(reason)
    monkeypatch.delenv("NEURON_DOUBLE_FAULT")
    assert_same_speech(speak(xtts, voice, **exactly(CODES)), theirs)
    assert sum(sum(counts.values()) for counts in all_fallbacks(xtts).values()) == 1


@pytest.mark.parametrize("fault", ["busy", "oom"])
def test_no_room_on_the_core(xtts, voice, patch, monkeypatch, fault):
    """At load: nothing is to be had, and coqui-tts speaks."""
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", fault)
    theirs = speak(xtts, voice, max_new_tokens=12)
    patch(xtts)
    assert_identical(speak(xtts, voice, max_new_tokens=12), theirs)
    message = {"busy": "not available", "oom": "Failed to allocate"}[fault]
    (reason,) = fallbacks(xtts, "GPT.generate")
    assert message in reason


def test_a_graph_that_keeps_failing_is_given_up(xtts, voice, patch, monkeypatch, caplog):
    """Three sentences pay for the error, three more for that of the next bucket; then there is no such graph."""
    patch(xtts)
    import torch_neuronx

    for i in range(7):
        torch_neuronx._reset()
        monkeypatch.setenv("NEURON_DOUBLE_FAULT", "exec@0:decode")
        speak(xtts, voice, seed=i, max_new_tokens=5)
    counted = fallbacks(xtts, "GPT.generate")
    assert sorted(counted.values()) == [1, 6]
    (given_up,) = [reason for reason, count in counted.items() if count == 1]
    assert given_up.startswith("no decode graph: given up after 3 errors in a row: RuntimeError")


def test_a_state_that_keeps_failing_is_given_up(xtts, voice, patch, monkeypatch):
    """What cannot be written costs every sentence a prefill: as with a graph that fails, three are enough."""
    patch(xtts)
    graph = loaded_on(xtts, 0)

    def fail(*args):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(graph, "write", fail)
    for seed in range(4):
        speak(xtts, voice, seed=seed, max_new_tokens=5)
    assert fallbacks(xtts, "GPT.generate") == {"RuntimeError: the device is gone": 3}
    assert neuron_xtts.report(xtts).missing == {
        "decode 1x80": "given up after 3 errors in a row: RuntimeError: the device is gone"
    }
    assert neuron_xtts.report(xtts).graphs["decode"]["1x128"].runs == 4


def test_first_load_on_a_device(xtts, voice, patch, spoiled):
    """What was compiled elsewhere is verified when it is loaded first, and never again."""
    for found in spoiled:
        found.record(verification=None)
    patch(xtts, store=spoiled.root, strict=True)
    assert neuron_xtts.report(xtts).missing == {}
    notes = {found.folder.name: found.manifest["verification"] for found in spoiled}
    assert len(notes) == 8
    assert all(note["error"] < 1e-4 and note["pcc"] > 0.9999 for note in notes.values())
    assert all(note["machine"] == "inf2.xlarge" for note in notes.values())
    neuron_xtts.patch(xtts, backend="neuron", store=spoiled.root, buckets=BucketPlan.static())
    assert {found.folder.name: found.manifest["verification"] for found in spoiled} == notes


def test_wrong_results_at_first_load(xtts, voice, patch, spoiled, monkeypatch):
    """They are quarantined, for good."""
    artifact(spoiled, "vocoder-96").record(verification=None)
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", "nan:vocoder-96")
    theirs = speak(xtts, voice, max_new_tokens=30)
    patch(xtts, store=spoiled.root)
    reason = neuron_xtts.report(xtts).missing["vocoder 96"]
    assert reason.startswith("wrong results in call 1")
    monkeypatch.delenv("NEURON_DOUBLE_FAULT")
    patch(xtts, store=spoiled.root)
    assert neuron_xtts.report(xtts).missing == {"vocoder 96": reason}
    assert_same_speech(speak(xtts, voice, max_new_tokens=30), theirs)
    assert set(neuron_xtts.report(xtts).graphs["vocoder"]) == {"64"}


@pytest.mark.parametrize(
    ("world", "found"),
    [
        ("frozen", "wrong results in call 1 after the first write of its state: "),
        ("once", "wrong results in call 1 after the second write of its state: "),
    ],
)
def test_a_device_that_does_not_see_what_is_written(xtts, voice, patch, spoiled, monkeypatch, world, found):
    """From the second sentence on, or from the first, nothing would be right; so nothing is decoded there."""
    for decode in (artifact(spoiled, "decode-1x80"), artifact(spoiled, "decode-1x128")):
        decode.record(verification=None)
    theirs = [speak(xtts, voice, seed=seed, **exactly(CODES)) for seed in range(2)]
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", f"{world}:decode")
    patch(xtts, store=spoiled.root)
    missing = neuron_xtts.report(xtts).missing
    assert missing.keys() == {"decode 1x80", "decode 1x128"}
    assert all(reason.startswith(found) for reason in missing.values()), missing
    for seed, said in enumerate(theirs):
        assert_same_speech(speak(xtts, voice, seed=seed, **exactly(CODES)), said)


def test_what_stays_on_the_device(xtts, voice, patch, spoiled, monkeypatch):
    """Prefill's cache and a growing one. Where they come out wrong they go by way of the host, for good."""
    theirs = speak(xtts, voice, **exactly(CODES))
    names = ("decode-1x80", "decode-1x128")
    assert {artifact(spoiled, name).manifest["rehearsed"]["over host"] for name in names} == {None}
    patch(xtts, store=spoiled.root, strict=True)
    read, on_host = LoadedGraph.read, []
    monkeypatch.setattr(LoadedGraph, "read", lambda self: on_host.append(self.recipe.name) or read(self))
    assert_same_speech(speak(xtts, voice, **exactly(CODES)), theirs)
    assert on_host == []
    write = LoadedGraph.write

    def spoil(self, contents, first=0):
        write(self, [content * (1 if content.device.type == "cpu" else 1.5) for content in contents], first)

    for name in names:
        artifact(spoiled, name).record(rehearsed=None)
    with monkeypatch.context() as patched:
        patched.setattr(LoadedGraph, "write", spoil)
        patch(xtts, store=spoiled.root, strict=True)
        assert neuron_xtts.report(xtts).missing == {}
        assert_same_speech(speak(xtts, voice, **exactly(CODES)), theirs)
        found = {artifact(spoiled, name).manifest["rehearsed"]["over host"] for name in names}
        assert {reason.partition(":")[0] for reason in found} == {"wrong results in a step on what prefill handed over"}
        assert neuron_xtts.report(xtts).over_host in found
        assert f"caches go by way of the host: {neuron_xtts.report(xtts).over_host}" in str(neuron_xtts.report(xtts))
        on_host.clear()
        patch(xtts, store=spoiled.root, strict=True)
        assert_same_speech(speak(xtts, voice, **exactly(CODES)), theirs)
        assert {name.partition("-")[0] for name in on_host} == {"decode"}  # prefill's are read tensor by tensor


def test_an_error_while_caches_are_tried(xtts, voice, patch, spoiled, monkeypatch):
    """They go over the host in this process; the next one tries again."""
    names = ("decode-1x80", "decode-1x128")
    for name in names:
        artifact(spoiled, name).record(rehearsed=None)
    with monkeypatch.context() as patched:
        patched.setattr(LoadedGraph, "write", failing(LoadedGraph.write, 0, RuntimeError("NRT_TIMEOUT: once")))
        patch(xtts, store=spoiled.root)
    assert neuron_xtts.report(xtts).over_host == "RuntimeError: NRT_TIMEOUT: once"
    assert neuron_xtts.report(xtts).missing == {}
    assert [artifact(spoiled, name).manifest["rehearsed"] for name in names] == [None, None]
    theirs = speak(unpatched_copy(xtts), voice, **exactly(CODES))
    assert_same_speech(speak(xtts, voice, **exactly(CODES)), theirs)
    patch(xtts, store=spoiled.root)
    assert neuron_xtts.report(xtts).over_host is None
    assert all(artifact(spoiled, name).manifest["rehearsed"] for name in names)


def test_another_patch_finds_the_device_empty(xtts, voice, patch):
    """Its graphs need the memory of those before; a stream that ran on them goes on without."""
    expected = list(chunks_of(xtts, voice))
    patch(xtts)
    stream = chunks_of(xtts, voice)
    found = [next(stream)]
    graphs = [weakref.ref(graph) for graph in backend_of(xtts).loaded]
    seen = []
    load = NeuronBackend._load

    def look(self, *arguments):
        seen.append(sum(graph() is not None for graph in graphs))
        return load(self, *arguments)

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(NeuronBackend, "_load", look)
            patch(xtts)
    finally:
        gc.enable()
    assert max(seen) <= 1  # that on which the stream's cache is
    found += stream
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_a_patch_draws_nothing(xtts, patch):
    """From torch's global generator, for whatever it tries its graphs on."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    patch(xtts)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_device_that_returns_everything_to_the_host(xtts, voice, patch, spoiled, monkeypatch):
    """Slower, and as right: the cache is kept on the device all the same."""
    for decode in (artifact(spoiled, "decode-1x80"), artifact(spoiled, "decode-1x128")):
        decode.record(verification=None)
    theirs = [speak(xtts, voice, seed=seed, **exactly(CODES)) for seed in range(2)]
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", "unaliased")
    patch(xtts, store=spoiled.root, strict=True)
    assert neuron_xtts.report(xtts).missing == {}
    for seed, said in enumerate(theirs):
        assert_same_speech(speak(xtts, voice, seed=seed, **exactly(CODES)), said)


def test_buckets_that_do_not_follow_each_other(xtts, voice, patch, spoiled, monkeypatch):
    """Each right by itself, but wrong one after another: that is tried, once, and quarantined by name."""
    manifests = {name: artifact(spoiled, name) for name in ("decode-1x80", "decode-1x128")}
    assert all(found.manifest["rehearsed"]["with"] for found in manifests.values())  # when they were compiled
    manifests["decode-1x80"].record(rehearsed=None)
    theirs = speak(xtts, voice, **exactly(CODES))
    grow = NeuronState.grow

    def spoil(self, slots, capacity, positions):
        grow(self, slots, capacity, positions)
        self._arrive([torch.zeros(shape) for shape in self._shapes])

    with monkeypatch.context() as patched:
        patched.setattr(NeuronState, "grow", spoil)
        patch(xtts, store=spoiled.root)
    (name, reason), *others = neuron_xtts.report(xtts).missing.items()
    assert (name, others) == ("decode 1x80", [])
    assert reason.startswith("wrong results in a step after the switch from decode 1x80: error ")
    patch(xtts, store=spoiled.root)
    assert neuron_xtts.report(xtts).missing == {name: reason}
    assert_same_speech(speak(xtts, voice, **exactly(CODES)), theirs)
    assert set(neuron_xtts.report(xtts).graphs["decode"]) == {"1x128"}


def test_an_error_while_buckets_are_tried(xtts, voice, patch, spoiled, monkeypatch):
    """It says nothing of the artifact, which the next process tries again."""
    found = artifact(spoiled, "decode-1x80")
    found.record(rehearsed=None)
    theirs = speak(xtts, voice, **exactly(CODES))

    def fail(*args):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patched:
        patched.setattr(NeuronState, "step", fail)
        patch(xtts, store=spoiled.root)
    assert neuron_xtts.report(xtts).missing == {"decode 1x80": "RuntimeError: the device is gone"}
    assert artifact(spoiled, "decode-1x80").quarantined is None
    patch(xtts, store=spoiled.root, strict=True)
    assert neuron_xtts.report(xtts).missing == {}
    assert_same_speech(speak(xtts, voice, **exactly(CODES)), theirs)


def test_a_store_that_cannot_be_written(xtts, patch, spoiled, monkeypatch, caplog):
    """One that many machines share: artifacts are verified, the result is not kept."""
    artifact(spoiled, "prefill-64").record(verification=None)

    def refuse(path, data):
        raise PermissionError(13, "read-only", str(path))

    monkeypatch.setattr("neuron_xtts.backends.neuron.store.write_json", refuse)
    with caplog.at_level(logging.WARNING, logger="neuron_xtts"):
        patch(xtts, store=spoiled.root)
    assert neuron_xtts.report(xtts).missing == {}
    assert "could not be updated" in caplog.text


def backend_of(xtts):
    from neuron_xtts.patching.patch import find_patch

    return find_patch(xtts).runner.backend


def engines_of(xtts):
    from neuron_xtts.patching.patch import find_patch

    return find_patch(xtts).dispatcher.engines


def loaded_on(xtts, number):
    """The decode graph of the first bucket, on one core."""
    return engines_of(xtts).contexts[number].runner.backend._loaded["decode", (1, 80)]


def test_states_that_take_turns(xtts, patch, monkeypatch):
    """On one graph: the earlier one's cache moves to the host and back. If that fails, it is told so."""
    patch(xtts)
    backend = backend_of(xtts)
    inputs = [torch.randn(1, 1, 64) for _ in range(6)]

    def run(state, position):
        return state.step((inputs[position],), [0], [position], 80)[0]

    alone = backend.new_state(1, 80)
    expected = [run(alone, position) for position in range(6)]
    states = [backend.new_state(1, 80) for _ in range(2)]
    for position in range(5):
        for state in states:
            torch.testing.assert_close(run(state, position), expected[position], rtol=0, atol=1e-6)
    first, second = states
    del alone, states, state
    graph = backend._loaded["decode", (1, 80)]
    monkeypatch.setattr(graph, "read", failing(graph.read, 0))
    torch.testing.assert_close(run(first, 5), expected[5], rtol=0, atol=1e-6)
    with pytest.raises(Fallback, match="another call took over the decode graph"):
        run(second, 5)
    last = backend.new_state(1, 80)
    run(last, 0)
    del last
    assert graph.owner is None  # nothing is copied to the host for a state that nobody needs


def test_shapes_are_checked_before_the_device_sees_them(xtts, patch):
    patch(xtts)
    with pytest.raises(ArtifactError, match=r"prefill was given .* it was compiled for"):
        backend_of(xtts).run("prefill", (64,), torch.randn(1, 63, 64), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ArtifactError, match="int64"):
        backend_of(xtts).run("prefill", (64,), torch.randn(1, 64, 64), torch.zeros(1, dtype=torch.int64))


def test_the_core(xtts, voice, patch, monkeypatch):
    """``neuron:1``, and what NEURON_RT_VISIBLE_CORES leaves."""
    import torch_neuronx

    torch_neuronx._reset()
    patch(xtts, backend="neuron:1")
    speak(xtts, voice, max_new_tokens=5)
    from torch_neuronx import _runtime

    assert {core for _, core in _runtime.executions} == {1}, _runtime.executions
    for backend in ("neuron:2", "neuron:0-2"):
        with pytest.raises(ValueError, match=f"'{backend}': this process may use 2 NeuronCores, counted from 0"):
            patch(xtts, backend=backend)
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "1")
    with pytest.raises(ValueError, match="'neuron:1': this process may use 1 NeuronCores"):
        patch(xtts, backend="neuron:1")


def test_a_service_without_the_environment_on_its_path(xtts, voice, patch, monkeypatch):
    """As where systemd starts ``venv/bin/python``: what the import of torch_neuronx runs is found."""
    monkeypatch.setenv("PATH", os.defpath)
    patch(xtts, strict=True)
    speak(xtts, voice, **exactly(5))
    assert neuron_xtts.report(xtts).missing == {}


def test_two_cores(xtts, voice, patch):
    """``neuron:0-1``: calls at the same time are spread over both, and none has anything of another's."""
    import torch_neuronx

    torch_neuronx._reset()
    texts = [torch.arange(1, size)[None] for size in (9, 14, 6, 11)]
    options = {"do_sample": True, "top_k": 3, **exactly(30)}
    alone = []
    for seed, text in enumerate(texts):
        torch.manual_seed(seed)
        alone.append(xtts.gpt.generate(voice[0], text, **options)[0].tolist())
    patch(xtts, strict=True, backend="neuron:0-1")
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda seed: xtts.gpt.generate(voice[0], texts[seed], seed=seed, **options), range(4))
        assert [codes[0].tolist() for codes in found] == alone
    from torch_neuronx import _runtime

    steps = Counter()
    for (tag, core), number in _runtime.executions.items():
        steps[core] += number if tag.startswith("decode") else 0
    assert steps.keys() == {0, 1}
    assert min(steps.values()) >= 29
    report = neuron_xtts.report(xtts)
    assert (report.batch.slots, report.batch.calls, report.missing) == (2, 4, {})
    assert sum(counts.runs for counts in report.graphs["decode"].values()) == report.batch.steps[1] == 4 * 29


def test_two_cores_in_the_flow(tts, reference, voice, patch):
    """Whole texts and streams through coqui-tts's own calls, at the same time: each what it is alone."""
    xtts = tts.synthesizer.tts_model
    texts = ("one.", "another one.", "the band plays on.", "it is late.")
    options = {"speaker_wav": str(reference), "language": "en", "split_sentences": False, **exactly(30)}

    def seeded(seed):
        torch.manual_seed(seed)
        return np.array(tts.tts(texts[seed], **options))

    whole, streamed = [seeded(seed) for seed in range(4)], [list(chunks_of(xtts, voice, text)) for text in texts[:2]]
    patch(tts, backend="neuron:0-1")
    with ThreadPoolExecutor(6) as pool:
        said = [pool.submit(tts.tts, text, seed=seed, **options) for seed, text in enumerate(texts)]
        heard = [pool.submit(lambda text: list(chunks_of(xtts, voice, text)), text) for text in texts[:2]]
        for ours, theirs in zip(said, whole, strict=True):
            np.testing.assert_allclose(ours.result(), theirs, rtol=0, atol=1e-4)
        for ours, theirs in zip(heard, streamed, strict=True):
            for a, b in zip(ours.result(), theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    counts = [context.scheduler.counts() for context in engines_of(xtts).contexts]
    assert sum(count.calls for count in counts) == 6
    assert all(count.calls >= 2 for count in counts), counts
    assert all_fallbacks(tts).keys() <= {"GPT.get_style_emb"}  # 4 s at a time, which the small plan has no graph for


def test_slots_on_two_cores(xtts, voice, neuron, tmp_path):
    """Two cores with two slots each: five calls at once, of which four decode."""
    plan = BucketPlan(prefill=(64,), decode=(80,), slots=(2,), latents=(), vocoder=(), conditioning=())
    options = {"backend": "neuron", "buckets": plan, "store": tmp_path}
    assert neuron_xtts.compile(xtts, **options, progress=False).ok
    texts = [torch.arange(1, size)[None] for size in (9, 14, 6, 11, 8)]
    generate = {"top_k": 3, "do_sample": True, **exactly(30)}
    alone = []
    for seed, text in enumerate(texts):
        torch.manual_seed(seed)
        alone.append(xtts.gpt.generate(voice[0], text, **generate)[0].tolist())
    neuron_xtts.patch(xtts, **{**options, "backend": "neuron:0-1"}, strict=True)
    barrier = threading.Barrier(5)

    def say(seed):
        barrier.wait()
        return xtts.gpt.generate(voice[0], texts[seed], seed=seed, **generate)[0].tolist()

    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(say, range(5))) == alone
    batch = neuron_xtts.report(xtts).batch
    assert (batch.slots, batch.calls) == (4, 5)
    assert batch.steps[2] > 20, batch.steps  # rows of two calls in one step, on a core


def test_a_stream_on_another_core_shortens_no_window(xtts, voice, patch, monkeypatch):
    """It waits for nobody there."""
    monkeypatch.setattr(routes_vocoder, "_SHORT", 64)
    patch(xtts, backend="neuron:0-1")
    engines, latents = engines_of(xtts), torch.randn(1, 40, 64)
    with engines.place(generates=True):  # so that the stream goes to the second core
        chunks = chunks_of(xtts, voice)
        next(chunks)
    audio = []
    for context, expected in zip(engines.contexts, ({"64", "96"}, {"64"}), strict=True):
        before = {size: counts.runs for size, counts in neuron_xtts.report(xtts).graphs["vocoder"].items()}
        alone = replace(context, audio=AudioMemo(context.runner.halo))
        audio.append(routes_vocoder.inference(alone, latents, voice[1]))
        found = neuron_xtts.report(xtts).graphs["vocoder"].items()
        assert {size for size, counts in found if counts.runs > before.get(size, 0)} == expected
    torch.testing.assert_close(*audio, rtol=0, atol=1e-5)
    chunks.close()


def test_a_core_waits_for_no_other(xtts, voice, patch, monkeypatch):
    """While a graph of the one runs, the other serves whole calls; a call of coqui-tts's own waits for both."""
    text = torch.arange(1, 10)[None]
    patch(xtts, backend="neuron:0-1")
    held, done, module = threading.Event(), threading.Event(), loaded_on(xtts, 0)._module

    def hold(*inputs):
        held.set()
        assert done.wait(60)
        return module(*inputs)

    monkeypatch.setattr(loaded_on(xtts, 0), "_module", hold)

    def generate(**options):
        return xtts.gpt.generate(voice[0], text, top_k=1, **exactly(10), **options)[0].tolist()

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(generate)
        assert held.wait(60)
        others = [generate() for _ in range(3)]  # each finds the second core idle, and the first at work
        assert not first.done()
        own = pool.submit(generate, typical_p=0.9, do_sample=True)
        time.sleep(0.3)
        assert not own.done()
        done.set()
        assert [first.result(60)] * 3 == others
        own.result(60)
    assert [context.scheduler.counts().calls for context in engines_of(xtts).contexts] == [1, 3]
    assert fallbacks(xtts, "GPT.generate") == {"argument typical_p": 1}


@pytest.mark.parametrize("alike", [True, False])
def test_the_queue_of_two_cores(xtts, voice, patch, monkeypatch, alike):
    """``queue`` calls wait in all, be it all at one core: one more is refused."""
    patch(xtts, backend="neuron:0-1", queue=3 if alike else 4)
    if not alike:
        engines_of(xtts).contexts[1].runner.backend.unavailable["vocoder", (64,)] = "gone"
    fake = xtts.gpt.compute_embeddings(voice[0], torch.arange(1, 10)[None])
    options = {"output_hidden_states": True, "return_dict_in_generate": True, **exactly(10)}
    go, begun = threading.Event(), threading.Semaphore(0)

    def hold(*inputs):
        begun.release()
        assert go.wait(60)
        raise RuntimeError("held")

    for core in range(2):
        monkeypatch.setattr(loaded_on(xtts, core), "_module", hold)
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(list, xtts.gpt.get_generator(fake_inputs=fake, **options)) for _ in range(2)]
        assert begun.acquire(timeout=60)
        if alike:
            assert begun.acquire(timeout=60)
        calls += [pool.submit(list, xtts.gpt.get_generator(fake_inputs=fake, **options)) for _ in range(3)]
        while neuron_xtts.report(xtts).batch.waiting < (3 if alike else 4):
            time.sleep(0.01)
        with pytest.raises(neuron_xtts.QueueFullError, match=r"2 rows decode and as many calls wait as may, [34]"):
            list(xtts.gpt.get_generator(fake_inputs=fake, **options))
        go.set()
        for call in calls:
            assert len(call.result(60)) == 10


def test_a_core_that_fails_gets_no_more_calls(xtts, voice, patch, monkeypatch):
    """Else it would get them all: where every call ends at once, there is always least to do."""
    text = torch.arange(1, 10)[None]
    patch(xtts, backend="neuron:0-1")

    def fail(*inputs):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(loaded_on(xtts, 0), "_module", fail)
    for _ in range(8):
        xtts.gpt.generate(voice[0], text, top_k=1, **exactly(3))
    assert sum(fallbacks(xtts, "GPT.generate").values()) == 3
    assert [context.scheduler.counts().steps.total() for context in engines_of(xtts).contexts] == [0, 10]
    assert neuron_xtts.report(xtts).missing == {
        "decode 1x80": "core 0: given up after 3 errors in a row: RuntimeError: the device is gone"
    }


def test_a_core_that_gives_no_numbers_rests(xtts, voice, patch, monkeypatch):
    """It ends calls as soon as one that fails, and nothing of it is missing."""
    text = torch.arange(1, 10)[None]
    patch(xtts, backend="neuron:0-1")
    prefill = engines_of(xtts).contexts[0].runner.backend._loaded["prefill", (64,)]
    module = prefill._module
    monkeypatch.setattr(prefill, "_module", lambda *inputs: tuple(item * torch.nan for item in module(*inputs)))
    for _ in range(8):
        xtts.gpt.generate(voice[0], text, top_k=1, **exactly(3))
    assert fallbacks(xtts, "GPT.generate") == {"logits that are not finite": 3}
    assert [context.scheduler.counts().steps.total() for context in engines_of(xtts).contexts] == [0, 10]


def test_a_core_is_not_busy_with_what_failed(xtts, voice, patch):
    """Though somebody keeps the error."""
    patch(xtts, backend="neuron:0-1", strict=True)
    fake = xtts.gpt.compute_embeddings(voice[0], torch.arange(1, 10)[None])
    errors = []
    for _ in range(2):
        with pytest.raises(neuron_xtts.FallbackError) as error:
            xtts.gpt.get_generator(fake_inputs=fake, num_beams=2)
        errors.append(error)
    assert [[len(calls) for calls in both] for both in engines_of(xtts)._calls] == [[0, 0], [0, 0]]


def test_what_is_made_in_the_first_turn_stays_there(xtts, patch):
    patch(xtts, backend="neuron:0-1")
    engines = engines_of(xtts)
    with engines.place(generates=False) as context:
        assert context is engines.contexts[0]
        with engines.turns.first.take(), engines.place(generates=False) as context:
            assert context is engines.contexts[0]
        with engines.place(generates=False) as context:
            assert context is engines.contexts[1]


def test_threads(xtts, voice, patch):
    """They take turns; the double refuses two calls at a time of a graph with a state."""
    text = torch.arange(1, 10)[None]
    (theirs,) = {tuple(xtts.gpt.generate(voice[0], text, **exactly(20))[0].tolist())}
    patch(xtts, strict=True)
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(tuple(xtts.gpt.generate(voice[0], text, **exactly(20))[0].tolist()))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [theirs] * 4


def test_the_demo(tts, neuron, compiled, small_plan, tmp_path):
    """Its progress bar and its stopwatch do not stand in the way of graphs."""
    options = {"backend": "neuron", "store": compiled, "buckets": small_plan}
    voice, files = tmp_path / "voice.wav", (tmp_path / "plain.wav", tmp_path / "patched.wav")
    write_reference(voice)
    text = demo.compare(tts, "the band plays an old song.", speaker_wav=voice, files=files, codes=20, options=options)
    difference = next(line for line in text.splitlines() if line.startswith("largest difference")).split()[-1]
    assert float(difference) < 1e-4
    assert "neuron_xtts: backend neuron, precision fp32" in text
    fallbacks_of = {line.split()[0] for line in text.partition("fallback of")[2].splitlines()[2:] if line[:1].isupper()}
    assert fallbacks_of == {"GPT.get_style_emb"}  # 4 s at a time, which the small plan has no graph for


def test_the_benchmarks(neuron, compiled, small_plan, monkeypatch):
    """As on the host; what falls back is not passed off as Neuron's."""
    for module in (accuracy_module, bench):
        monkeypatch.setattr(module, "SENTENCES", ("a short one.",))
    options = {"backend": "neuron", "store": compiled, "buckets": small_plan}
    subject = bench.Subject(small=True)
    streams = bench_stream(subject, lengths=(20,), size=10, rounds=1, options=options)
    assert streams.worked[20] >= int(20 * 4 * 24000 / 22050)
    common = {"precisions": ("fp32",), "options": options}
    sentences = bench_sentence(subject, lengths=(25,), rounds=1, memory=False, **common)
    assert sentences.accuracy["fp32"].latents > 0.99999
    assert sentences.accuracy["fp32"].snr > 80
    assert sentences.figures(25, "fp32")["latents"] > 0
    assert sentences.figures(25, "fp32")["sampling and loop"] > 0
    sizes = {"text": 20, "codes": 20, "iterations": 2, "warm_up": 1}
    methods = bench_methods(subject, **sizes, **common)
    for results in (streams, sentences, methods):
        assert not any(results.fallbacks.values()), results.fallbacks
        assert "fell back" not in str(results)
    sizes["codes"] = 90  # longer than the largest bucket of decode
    table = bench_methods(subject, **sizes, **common).markdown()
    assert "| fp32 | GPT.generate: larger than the largest decode bucket (128) | 2 |" in table


def test_the_benchmark_of_a_device(neuron, compiled, small_plan, monkeypatch, tmp_path, capsys):
    """One command from the doctor to streams: it answers what is not documented, and writes what can be sent."""
    monkeypatch.setattr(device_bench, "SENTENCES", (12,))
    monkeypatch.setattr(device_bench, "STREAMS", (20,))
    sizes = [f"{name}={','.join(map(str, found))}" for name, found in small_plan.to_dict().items() if name != "steps"]
    files = {name: tmp_path / f"found.{name}" for name in ("json", "markdown", "png")}
    command = ["bench", "device", "--small", "--precisions", "fp32", "--rounds", "1", "--iterations", "2"]
    command += [word for size in sizes for word in ("--sizes", size)]
    command += [word for name, file in files.items() for word in (f"--{name}", str(file))]
    assert main([*command, "--store", str(compiled)]) == 0
    out = capsys.readouterr().out
    assert (
        "Ready: a small graph was compiled for inf2, ran on one of the 2 NeuronCores that this process may use" in out
    )
    found = json.loads(files["json"].read_text())
    assert found["machine"]["instance"] == "inf2.xlarge"
    assert {status for _, status, *_ in found["compiled"]["fp32"]} == {"found"}
    times = {(times["graph"], times["bucket"]): times for times in found["graphs"]["fp32"]}
    assert len(times) == 8
    assert {times["returned"] for times in times.values()} == {None, "xla"}  # where the double keeps a state
    assert times["decode", "1x128"]["state"] == 4 * 4 * 128 * 64  # two blocks of keys and values in fp32
    assert all(len(times["run"]) == 2 and min(times["run"]) > 0 for times in times.values())
    assert found["medians"]["fp32"]["decode 1x80"]["GB/s to the device"] > 0
    assert found["over_host"] == {"fp32": None}
    assert found["sentence"]["samples"]["12"]["fp32"]
    assert found["stream"]["samples"]["20"]["neuron_xtts"]
    text = files["markdown"].read_text()
    assert "| decode 1x80 |" in text
    assert "neuronx-cc" in text
    assert files["png"].stat().st_size > 1000
    with monkeypatch.context() as patched:  # of a device that gives up in the middle there is what came before
        patched.setattr(LoadedGraph, "read", failing(LoadedGraph.read, 5))
        assert main([*command, "--store", str(compiled)]) == 0
    ended = json.loads(files["json"].read_text())
    assert ended["verdict"].endswith("The benchmark ended early: RuntimeError: the device is gone")
    assert 0 < len(ended["graphs"]["fp32"]) < 8
    assert "The benchmark ended early" in files["markdown"].read_text()
    monkeypatch.setenv("NEURON_DOUBLE_FAULT", "fail:canary")
    assert main([*command, "--store", str(tmp_path / "empty")]) == 0
    found = json.loads(files["json"].read_text())
    assert (found["graphs"], found["sentence"], found["stream"]) == ({}, None, None)
    assert "does not compile" in found["verdict"]


def test_the_benchmark_of_a_device_without_one(monkeypatch, capsys):
    assert main(["bench", "device", "--small", "--backend", "cpu"]) == 1
    assert "bench device measures a Neuron device" in capsys.readouterr().err
