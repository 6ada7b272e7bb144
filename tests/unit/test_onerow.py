"""Decoding of one row on the host: the program against the decode graph."""

import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2Model

import neuron_xtts
from neuron_xtts import BucketPlan
from neuron_xtts.backends.host import kernels, onerow, programs
from neuron_xtts.backends.host.backend import CpuBackend, HostState
from neuron_xtts.backends.host.onerow import OneRow
from neuron_xtts.backends.neuron.verification import correlation
from neuron_xtts.graphs.transformer import Decode, KeysAndValues, Trunk
from neuron_xtts.patching.patch import find_patch
from neuron_xtts.precision import HOST

PRECISIONS = [
    precision
    for precision in HOST
    if precision == "fp32" or "fbgemm" in torch.backends.quantized.supported_engines
]  # fmt: skip


def decode_graph(heads, channels, blocks, seed=0, queries=1.0):
    """A decode graph with random weights; ``queries`` scales its attention scores."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=1, n_positions=1, n_embd=heads * channels, n_layer=blocks, n_head=heads)
    gpt2 = GPT2Model(config)
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for block in gpt2.h:
            block.attn.c_attn.weight[:, : heads * channels] *= queries
    trunk = Trunk(gpt2.eval(), torch.nn.LayerNorm(heads * channels), heads)
    return Decode(trunk, torch.nn.Linear(heads * channels, 26))


def states(decode, precision, positions=1):
    """The program and the graph, with nothing in their caches."""
    backend = CpuBackend({"decode": decode}, None, HOST[precision])
    one = backend.new_state(1, positions)
    assert type(one) is OneRow
    return one, HostState(decode, 1, positions)


def compare(pair, length, steps, close):
    """Fill both with the same prefix and feed them the same embeddings."""
    one, graph = pair
    blocks, heads, channels = len(graph._decode.trunk.h), graph._data.shape[2], graph._data.shape[4]
    # 3: padding of a bucket
    prefix = KeysAndValues.split([torch.randn(1, heads, length + 3, channels) for _ in range(2 * blocks)])
    for state in pair:
        state.fill(0, prefix, length)
    for position in range(length, length + steps):
        for state in pair:
            if position >= state.capacity:
                state.grow(position + 1)
        embeds, at = torch.randn(1, 1, heads * channels), torch.tensor([position], dtype=torch.int32)
        mask = torch.zeros(1, 1, 1, position + 1)
        for ours, expected in zip(one.step(embeds, at, mask), graph.step(embeds, at, mask), strict=True):
            close(ours, expected)
    ours, expected = (state.cached(0, length + steps) for state in pair)
    for mine, others in zip(ours, expected, strict=True):
        for a, b in zip(mine, others, strict=True):
            assert a.dtype == torch.float32
            close(a, b)


@settings(max_examples=30, deadline=None)
@given(
    heads=st.integers(1, 4), channels=st.sampled_from([4, 8, 12]), blocks=st.integers(1, 3),
    length=st.integers(1, 200), steps=st.integers(1, 70), growth=st.sampled_from([64, 128, 1152]),
    threads=st.integers(1, 3), seed=st.integers(0, 2**31),
)  # fmt: skip
@torch.no_grad()
def test_any_length(heads, channels, blocks, length, steps, growth, threads, seed):
    """Wherever chunks of keys begin and end, and the cache grows."""
    before, held = torch.get_num_threads(), kernels.GROWTH
    torch.set_num_threads(threads)
    kernels.GROWTH = growth
    try:
        pair = states(decode_graph(heads, channels, blocks, seed), "fp32", length)
        compare(pair, length, steps, lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5))
    finally:
        torch.set_num_threads(before)
        kernels.GROWTH = held


@pytest.mark.parametrize("queries", [1.0, 12.0])
@torch.no_grad()
def test_what_the_cache_in_fp16_costs(queries):
    """Next to int8 nothing, next to fp16 weights little, even where attention is nearly a choice of one position."""
    exact = HostState(decode_graph(4, 64, 4, queries=queries), 1, 1)
    pairs = {precision: states(decode_graph(4, 64, 4, queries=queries), precision) for precision in PRECISIONS[1:]}
    prefix = KeysAndValues.split([torch.randn(1, 4, 100, 64) for _ in range(8)])
    for state in (exact, *(state for pair in pairs.values() for state in pair)):
        state.fill(0, prefix, 100)
    errors = {precision: torch.zeros(2) for precision in pairs}  # of the program and the graph, 1 - correlation
    for position in range(100, 180):
        inputs = torch.randn(1, 1, 256), torch.tensor([position], dtype=torch.int32), torch.zeros(1, 1, 1, position + 1)
        expected = exact.step(*inputs)[0]
        for precision, pair in pairs.items():
            errors[precision] += torch.tensor([1 - correlation(state.step(*inputs)[0], expected) for state in pair])
    for precision, (ours, graph) in errors.items():
        assert ours / 80 <= (1e-4 if precision == "bf16" else 1.25 * graph / 80)


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_a_slot_is_written_again(precision):
    """A step leaves nothing behind that a later one at the same position could see."""
    decode = decode_graph(heads=2, channels=8, blocks=2)
    one, _ = states(decode, precision)
    inputs = torch.randn(2, 1, 1, 16)
    at, mask = torch.tensor([0], dtype=torch.int32), torch.zeros(1, 1, 1, 1)
    first = one.step(inputs[0], at, mask)
    one.step(inputs[1], at, mask)
    for a, b in zip(one.step(inputs[0], at, mask), first, strict=True):
        assert torch.equal(a, b)


def test_when_it_is_taken(xtts):
    """For one row in exact shapes; a bucket plan keeps to the graph."""
    for plan, rows, kind in (
        (None, 1, OneRow),
        (BucketPlan(), 1, OneRow),
        (None, 2, HostState),
        (BucketPlan.static(), 1, HostState),
    ):
        neuron_xtts.patch(xtts, backend="cpu", buckets=plan)
        assert type(find_patch(xtts).runner.backend.new_state(rows, 512)) is kind


class Scaled(torch.nn.Module):
    """A layer of another kind."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def hook(block, path, calls):
    block.get_submodule(path).register_forward_hook(lambda *_: calls.append(path))


def replace_forward(block, path, calls):
    layer = block.get_submodule(path)
    own = layer.forward
    layer.forward = lambda x: calls.append(path) or own(x)


def replace(block, path, calls):
    owner, _, name = path.rpartition(".")
    layer = Scaled(block.get_submodule(path))
    setattr(block.get_submodule(owner), name, layer)
    hook(block, path, calls)


@pytest.mark.parametrize("how", [hook, replace_forward, replace])
@pytest.mark.parametrize("path", ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"])
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_layers_that_it_does_not_know(precision, path, how, caplog):
    """The graph calls them, and the log says so."""
    caplog.set_level("INFO", logger="neuron_xtts")
    decode, calls = decode_graph(2, 8, 2), []
    how(decode.trunk.h[1], path, calls)
    state = CpuBackend({"decode": decode}, None, HOST[precision]).new_state(1, 1)
    assert type(state) is HostState
    assert "operator by operator, which is slower: a " in caplog.text
    state.step(torch.randn(1, 1, 16), torch.tensor([0], dtype=torch.int32), torch.zeros(1, 1, 1, 1))
    assert calls == [path]


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_without_torchscript(precision, monkeypatch, caplog):
    """The same functions run as Python, bit for bit."""
    for cache in (onerow._program, kernels._product):
        cache.cache_clear()
    with monkeypatch.context() as patching:
        patching.delattr(torch.jit, "script")
        slow = states(decode_graph(2, 8, 2), precision)[0]
        product = kernels._product(precision.replace("bf16", "fp16"))
    assert "slower than it could be without TorchScript" in caplog.text
    for cache in (onerow._program, kernels._product):
        cache.cache_clear()
    fast = states(decode_graph(2, 8, 2), precision)[0]
    assert inspect.isfunction(slow._run)
    assert inspect.isfunction(product)
    assert not inspect.isfunction(fast._run)
    for position in range(70):
        inputs = torch.randn(1, 1, 16), torch.tensor([position], dtype=torch.int32), torch.zeros(1, 1, 1, position + 1)
        for a, b in zip(slow.step(*inputs), fast.step(*inputs), strict=True):
            assert torch.equal(a, b)
    x, layer = torch.randn(1, 1, 16), fast._layers[0]
    assert torch.equal(product(x, layer), kernels._product(precision.replace("bf16", "fp16"))(x, layer))


def test_without_sources(caplog):
    """TorchScript reads source files; where they were not installed, the function runs as Python."""
    namespace = {}
    exec("def double(x): return 2 * x", namespace)
    double = programs.scripted(namespace["double"])
    assert double is namespace["double"]
    assert "slower than it could be without TorchScript" in caplog.text


@torch.no_grad()
def test_changed_weights():
    """In fp32 it computes with the model's own parameters."""
    decode, other = decode_graph(2, 8, 2, seed=1), decode_graph(2, 8, 2, seed=2)
    pair = states(decode, "fp32")
    before = copy.deepcopy(decode.trunk.h.state_dict())
    decode.load_state_dict(other.state_dict())
    assert not torch.equal(before["0.mlp.c_fc.weight"], decode.trunk.h[0].mlp.c_fc.weight)
    compare(pair, 5, 3, lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5))
