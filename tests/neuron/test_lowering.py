"""The graphs on the real XLA frontend, and graphs that it must refuse."""

import copy
import json
import math
import os
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neuron_xtts import BucketPlan, FrontendMissingError, Precision
from neuron_xtts.backends.host.operators import HostOperators
from neuron_xtts.backends.neuron import jobs
from neuron_xtts.backends.neuron.compiler import lower_all
from neuron_xtts.backends.neuron.lowering import Program, frontend, lower
from neuron_xtts.backends.neuron.tracing import traceable
from neuron_xtts.buckets import bucket_name
from neuron_xtts.coqui.recognise import make_graphs
from neuron_xtts.coqui.surface import Networks
from neuron_xtts.coqui.weights import tensors_of
from neuron_xtts.graphs.operators import PLAIN, Graph, states_of
from neuron_xtts.graphs.transformer import RoundedLinear, StatefulDecode
from neuron_xtts.graphs.vocoder import Vocoder, fold_weight_norm
from neuron_xtts.tools.cli import main

torch_xla = pytest.importorskip("torch_xla")

PLAN = BucketPlan(prefill=(40,), decode=(48,), slots=(1, 3), latents=(50,), vocoder=(32,), conditioning=(29,))


@pytest.fixture(scope="module")
def graphs(tts_original):
    xtts = tts_original.synthesizer.tts_model
    graphs, missing = make_graphs(Networks.of(xtts))
    assert not missing
    return graphs


SEVERAL = BucketPlan(prefill=(), decode=(48,), slots=(1, 3), latents=(), vocoder=(), conditioning=(), steps=3)


def on_device(graphs, plan, names=None, rounded=()):
    """Every graph of a plan in the form that is compiled, on the XLA device."""
    prepared = traceable(graphs, rounded=rounded)
    for name in names or prepared:
        for bucket in plan.buckets(name):
            graph = copy.deepcopy(prepared[name])
            sizes = (*bucket, *plan.room(name, bucket))
            module, inputs = graph.in_bucket(*sizes), graph.example(*sizes)
            yield name, bucket, module.to(torch_xla.device()), inputs


def test_every_graph_lowers(graphs):
    lowered = {}
    for name, bucket, module, inputs in on_device(graphs, PLAN):
        lowered[name, bucket] = lower(name, bucket_name(bucket), module, inputs)
    assert set(lowered) == {
        ("prefill", (40,)), ("decode", (1, 48)), ("decode", (3, 48)), ("latents", (50,)), ("vocoder", (32,)),
        ("conditioning", (29,)), ("move", (1, 48, 3, 48)),
    }  # fmt: skip
    for lowering in lowered.values():
        assert lowering.problems == [], lowering
        assert lowering.operators["parameter"] > 3
    assert lowered["prefill", (40,)].operators["concatenate"] >= 4  # what is kept of its cache
    assert lowered["decode", (1, 48)].operators["scatter"] == 4  # keys and values of two blocks
    assert lowered["vocoder", (32,)].operators["convolution"] == 83


def test_several_codes_lower(graphs):
    """Without a sort, and with nothing that the compiler counts in 64 bits."""
    for rounded in ((), ("codes",)):
        found = [lower(name, "", *rest) for name, _, *rest in on_device(graphs, SEVERAL, ["codes"], rounded)]
        assert [lowering.problems for lowering in found] == [[], []]
        for lowering in found:
            assert lowering.operators["scatter"] == 3 * 4
            assert {"sort", "rng", "rng-bit-generator"}.isdisjoint(lowering.operators)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [PLAN, SEVERAL], ids=["one", "several"])
@torch.no_grad()
def test_what_was_lowered_computes_the_same(graphs, plan):
    """Each graph on XLA's CPU device against the same graph on the host, state included."""
    for name, bucket, module, inputs in on_device(graphs, plan):
        host = copy.deepcopy(graphs[name])
        host.use(HostOperators())
        host = host.in_bucket(*bucket, *plan.room(name, bucket))
        for ours, theirs in zip(states_of(host), states_of(module), strict=True):
            ours.normal_()
            theirs.copy_(ours)
        expected = host(*inputs.values())
        outputs = module(*(tensor.to(torch_xla.device()) for tensor in inputs.values()))
        assert len(outputs) == len(expected)
        for ours, theirs in zip(outputs, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-5)


def test_plain_operators_are_compiled(graphs):
    """Whatever the graphs that are handed over compute with, which they go on with."""
    theirs = copy.deepcopy(graphs)
    for graph in theirs.values():
        graph.use(HostOperators())
    for graph in traceable(theirs, fill=True).values():
        assert all(module.operators is PLAIN for module in graph.modules() if isinstance(module, Graph))
    assert all(type(graph.operators) is HostOperators for graph in theirs.values())


@torch.no_grad()
def test_weights_in_bf16(graphs):
    """Those of the trunk's linear layers, once for all its graphs; whatever else, and the model's own, are in fp32."""
    names = ("prefill", "decode", "latents")
    made = traceable(graphs, rounded=names)
    kept = {name: [m for m in made[name].modules() if isinstance(m, RoundedLinear)] for name in names}
    assert [len(layers) for layers in kept.values()] == [8, 8, 8]  # four of each of two blocks
    assert len({layer.weight.data_ptr() for layers in kept.values() for layer in layers}) == 8
    rounded = {id(layer.weight) for layers in kept.values() for layer in layers}

    def dtypes(graphs):
        found = {id(tensor): tensor for graph in graphs.values() for tensor in tensors_of(graph)}
        return {tensor.dtype for key, tensor in found.items() if tensor.is_floating_point() and key not in rounded}

    assert dtypes(made) == dtypes(graphs) == {torch.float32}
    embeds = graphs["latents"].example(50)["embeds"]
    exact, ours = graphs["latents"](embeds)[0], made["latents"](embeds)[0]
    assert 1e-6 < (exact - ours).abs().max() / exact.abs().max() < 1e-2
    for name, bucket, module, inputs in on_device(graphs, PLAN, names, rounded=names):
        lowering = lower(name, bucket_name(bucket), module, inputs)
        assert lowering.problems == [], lowering


@torch.no_grad()
def test_folding_leaves_the_model_alone(tts_original):
    decoder = tts_original.synthesizer.tts_model.hifigan_decoder
    latents, speaker = torch.randn(1, 5, 64), torch.randn(1, 512, 1)
    before, names = decoder(latents, g=speaker), list(decoder.state_dict())
    vocoder = Vocoder(decoder.waveform_decoder)
    folded = fold_weight_norm(vocoder)
    frames = torch.randn(1, 64, 9)
    torch.testing.assert_close(folded(frames, speaker), vocoder(frames, speaker), rtol=0, atol=1e-6)
    assert not any("parametrizations" in name for name in folded.state_dict())
    assert list(decoder.state_dict()) == names
    assert torch.equal(decoder(latents, g=speaker), before)


def test_flops_and_bytes(graphs):
    """Against counting by hand: the products of the trunk, and everything that goes in and out."""
    ((name, bucket, module, inputs),) = on_device(graphs, PLAN, ["latents"])
    lowering = lower(name, bucket_name(bucket), module, inputs)
    length, channels, blocks = 50, 64, 2
    products = 2 * length * 12 * channels**2 + 2 * 2 * length**2 * channels  # linear layers; scores and their use
    assert lowering.flops == blocks * products
    weights = sum(parameter.numel() for parameter in graphs["latents"].parameters())
    ends = weights + 2 * length * channels
    assert lowering.bytes == pytest.approx(4 * ends, rel=0.01)  # and a few scalars

    conv = nn.ConvTranspose1d(6, 4, 16, stride=8, padding=4)
    lowering = lower_one(conv, torch.randn(1, 6, 10))
    assert lowering.flops == 2 * 80 * 4 * 6 * 16 // 8  # of 16 taps every eighth meets an input


def test_products(graphs):
    """The matrix products of two blocks of 64 channels and two heads, and of convolutions, a tap at a time."""
    lowered = {
        name: lower(name, bucket_name(bucket), module, inputs)
        for name, bucket, module, inputs in on_device(graphs, replace(PLAN, slots=(3,)), ["latents", "decode"])
    }
    blocks, heads, channels, rows, length = 2, 2, 64, 3, 50
    layers = [(channels, 3 * channels), (channels, channels), (channels, 4 * channels), (4 * channels, channels)]
    assert {tuple(product) for product in lowered["latents"].products} == {
        *((blocks, length, *layer) for layer in layers),
        (blocks * heads, length, channels // heads, length),  # scores
        (blocks * heads, length, length, channels // heads),  # values
    }
    assert {tuple(product) for product in lowered["decode"].products} == {
        *((blocks, rows, *layer) for layer in layers),
        (blocks * heads * rows, 1, channels // heads, 48),
        (blocks * heads * rows, 1, 48, channels // heads),
        (1, rows, channels, 1026),  # the head
    }
    convolution = lower_one(nn.Conv1d(6, 4, 3, dilation=2, padding=2), torch.randn(1, 6, 10))
    assert convolution.products == [(3, 4, 6, 10)]
    transposed = lower_one(nn.ConvTranspose1d(6, 4, 16, stride=8, padding=4), torch.randn(1, 6, 10))
    assert transposed.products == [(16, 4, 6, 10)]


def test_what_a_call_takes_and_gives(graphs):
    ((name, bucket, module, inputs),) = on_device(graphs, replace(PLAN, slots=(3,)), ["decode"])
    lowering = lower(name, bucket_name(bucket), module, inputs)
    assert lowering.inputs == [4 * 3 * 64, 4 * 3, 4 * 3 * 48]  # embeddings, positions, mask
    assert lowering.results == [4 * 3 * 64, 4 * 3 * 1026]  # latents, logits
    assert lowering.states == [4 * 3 * 48 * 64] * 4
    weights = sum(parameter.numel() for parameter in graphs["decode"].parameters())
    moved = sum(lowering.inputs) + sum(lowering.results) + 2 * sum(lowering.states)
    assert lowering.bytes - moved == pytest.approx(4 * weights, rel=0.01)  # and a few scalars


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return (self.function(*inputs),)


def lower_one(function, *inputs):
    module = Module(function).to(torch_xla.device())
    return lower("bad", "1", module, {f"input {i}": tensor for i, tensor in enumerate(inputs)})


X = torch.randn(1, 4, 16)
NORMED = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))

UNLOWERED = {
    "linear interpolation": (lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"), "aten::upsample_linear1d"),
    "weight norm": (NORMED, "aten::_weight_norm_interface"),
    "spectrum": (lambda x: torch.fft.rfft(x).real, "aten::_fft_r2c"),
}


@pytest.mark.parametrize("name", UNLOWERED)
def test_unlowered_operators(name):
    function, operator = UNLOWERED[name]
    lowering = lower_one(function, X)
    assert operator in lowering.unlowered
    assert lowering.problems


def test_disconnected_inputs():
    """One that is not used, and one that an unlowered operator cuts off."""
    lowering = lower_one(lambda x, y: x * 2, X, X)
    assert lowering.disconnected == ["input 1"]
    assert lowering.problems
    lowering = lower_one(lambda x, y: F.interpolate(x, scale_factor=1.0, mode="linear") + y, X, X)
    assert lowering.disconnected == ["input 0"]


def test_disconnected_state(graphs):
    class Forgetful(StatefulDecode):
        def forward(self, *inputs):
            return self.decode(*inputs, *(torch.zeros_like(state) for state in self.states))

    module = copy.deepcopy(Forgetful(graphs["decode"], 1, 48)).to(torch_xla.device())
    lowering = lower("decode", "1x48", module, graphs["decode"].example(1, 48))
    assert lowering.disconnected == [f"states.{i}" for i in range(4)]


class Shifted(nn.Module):
    """Adds a constant to what it transposes."""

    def __init__(self, *shape):
        super().__init__()
        self.constant = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.constant + x.transpose(1, 2)


REJECTED = {
    "constant on a transpose": (Shifted(16, 4), "a constant added to what was transposed"),
    "sort": (lambda x: x.sort().values, "sort: "),
    "infinite mask": (lambda x: x.masked_fill(x > 0, -math.inf), "infinity as an operand"),
    "infinite constant": (lambda x: x + torch.full_like(x, math.inf), "infinity as an operand"),
    "dilated transposed convolution": (
        nn.ConvTranspose1d(4, 4, 4, stride=2, dilation=3),
        "convolution with dilated input and kernel (NCC_EVRF010)",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_patterns(name):
    function, finding = REJECTED[name]
    lowering = lower_one(function, X)
    assert any(found.startswith(finding) for found in lowering.rejected), lowering
    assert lowering.problems


def test_what_may_be_added_to_what_was_transposed():
    """An input, a bias, and a constant before it is transposed."""
    assert lower_one(lambda x, y: y + x.transpose(1, 2), X, torch.randn(16, 4)).problems == []
    assert lower_one(Shifted(1, 4), X).problems == []
    assert lower_one(lambda x: (x + torch.ones(4, 16, device=x.device)).transpose(1, 2), X).problems == []


def test_a_maximum_is_not_an_infinite_mask():
    assert lower_one(lambda x: torch.softmax(x, -1), X).problems == []


HLO = """
ENTRY %main (p0: f32[4,8], p1: f32[1,8], p2: s32[]) -> f32[4,8] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = f32[1,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = INSTRUCTION
}
"""
# What no operator of torch makes here, but the compiler documents.
BY_HAND = {
    "dynamic-update-slice at an index that is not constant": (
        "f32[4,8]{1,0} dynamic-update-slice(f32[4,8]{1,0} %p0, f32[1,8]{1,0} %p1, s32[] %p2, s32[] %zero)"
    ),
    "64-bit floats": "f64[4,8]{1,0} convert(f32[4,8]{1,0} %p0)",
    "64-bit integers that do not fit 32 bits": "s64[] constant(9223372036854775807)",
    "complex numbers": "c64[4,8]{1,0} complex(f32[4,8]{1,0} %p0, f32[4,8]{1,0} %p0)",
    "dynamic shapes": "f32[<=4,8]{1,0} set-dimension-size(f32[4,8]{1,0} %p0, s32[] %p2), dimensions={0}",
    "strided convolution with dilated input": (
        "f32[4,8]{1,0} convolution(f32[4,8]{1,0} %p0, f32[1,8]{1,0} %p1), "
        "window={size=1x3 stride=1x2 lhs_dilate=1x2}, dim_labels=bf_oi->bf"
    ),
}


@pytest.mark.parametrize("finding", BY_HAND)
def test_rejected_patterns_by_hand(finding):
    (found,) = Program(HLO.replace("INSTRUCTION", BY_HAND[finding])).rejected(())
    assert found.startswith(finding)


def test_dynamic_update_slice_at_a_constant():
    line = "f32[4,8]{1,0} dynamic-update-slice(f32[4,8]{1,0} %p0, f32[1,8]{1,0} %p1, s32[] %zero, s32[] %zero)"
    assert Program(HLO.replace("INSTRUCTION", line)).rejected(()) == []


def test_64_bit_integers_that_fit():
    assert Program(HLO.replace("INSTRUCTION", "s64[2]{0} constant({1025, -7})")).rejected(()) == []
    large = "u64[] constant(4294967296)"
    assert len(Program(HLO.replace("INSTRUCTION", large)).rejected(())) == 1


@pytest.mark.slow
def test_command(capsys):
    sizes = ["prefill=40", "decode=48", "latents=50", "vocoder=32", "conditioning=29"]
    assert main(["graphs", "--lower", "--small", "--json", *(f"--sizes={size}" for size in sizes)]) == 0
    lowered = json.loads(capsys.readouterr().out)
    assert {entry["graph"] for entry in lowered} == {"prefill", "decode", "latents", "vocoder", "conditioning"}
    assert all(entry["unlowered"] == entry["disconnected"] == entry["rejected"] == [] for entry in lowered)
    sizes = ["prefill=", "decode=", "latents=", "vocoder=32,40", "conditioning="]
    assert main(["graphs", "--lower", "--small", *(f"--sizes={size}" for size in sizes)]) == 0
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [["vocoder", "32"], ["vocoder", "40"]]
    assert all(row.rstrip().endswith("none") for row in rows)


@pytest.mark.slow
def test_a_process_that_dies(graphs, tmp_path, monkeypatch):
    """Its graph has a reason; the others are lowered."""
    monkeypatch.setattr(jobs, "traceable", lambda graphs, **how: {**traceable(graphs, **how), "latents": Dying()})
    plan = replace(BucketPlan.none(), latents=(50,), vocoder=(32,))
    latents, vocoder = lower_all(graphs, plan, Precision(), tmp_path, progress=False)
    assert (latents.graph, latents.bucket) == ("latents", "50")
    assert latents.problems[0].startswith("lower: died of SIGABRT\n")
    assert vocoder.problems == []


class Dying(Graph):
    def example(self, length):
        os.abort()


def test_no_frontend(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(FrontendMissingError, match=r"pip install torch-xla==\d"):
        frontend()
    assert main(["graphs", "--lower", "--small"]) == 1
    assert "pip install torch-xla" in capsys.readouterr().err
