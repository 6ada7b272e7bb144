"""Decoding of rows on the host: the programs against the decode graph, and rows in company against rows alone."""

import copy
import inspect
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2Model

import neuron_xtts
from neuron_xtts import BucketPlan
from neuron_xtts.backends.host import kernels, programs, rows
from neuron_xtts.backends.host.backend import CpuBackend, HostState
from neuron_xtts.backends.host.rows import Rows
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


def states(decode, precision, slots=1, positions=1):
    """The program and the graph, with nothing in their caches."""
    backend = CpuBackend({"decode": decode}, None, HOST[precision])
    state = backend.new_state(slots, positions)
    assert type(state) is Rows
    return state, HostState(decode, slots, positions)


def random_prefix(decode, length):
    """Keys and values of a prefix, and of three positions of padding."""
    return KeysAndValues.split([torch.randn(shape) for shape in decode.trunk.cache_shapes(1, length + 3)])


def fill(states, slot, prefix):
    length = prefix.keys[0].shape[2] - 3
    for state in states:
        state.fill(slot, prefix, length)
    return length


def step(state, embeds, slots, positions):
    """One that grows the cache where it must."""
    if max(positions) >= state.capacity:
        state.grow(len(positions), max(positions) + 1, positions)
    return state.step((embeds,), slots, positions, max(positions) + 1)


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 4), channels=st.sampled_from([4, 8, 12]), blocks=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=6), steps=st.integers(1, 70),
    growth=st.sampled_from([64, 128, 1152]), threads=st.integers(1, 3), choices=st.randoms(use_true_random=False),
)  # fmt: skip
@torch.no_grad()
def test_any_rows(heads, channels, blocks, lengths, steps, growth, threads, choices):
    """Wherever chunks of keys begin and end, whichever rows step, in any order, and the cache grows."""
    before, held = torch.get_num_threads(), kernels.GROWTH
    torch.set_num_threads(threads)
    kernels.GROWTH = growth
    try:
        decode = decode_graph(heads, channels, blocks, seed=choices.getrandbits(32))
        pair = states(decode, "fp32", len(lengths), max(lengths))
        positions = [fill(pair, slot, random_prefix(decode, length)) for slot, length in enumerate(lengths)]
        for _ in range(steps):
            slots = choices.sample(range(len(lengths)), choices.randint(1, len(lengths)))
            embeds = torch.randn(len(slots), 1, heads * channels)
            outputs = (step(state, embeds, slots, positions) for state in pair)
            for ours, expected in zip(*outputs, strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
            for slot in slots:
                positions[slot] += 1
        for slot, length in enumerate(positions):
            for ours, expected in zip(*(state.cached(slot, length).together() for state in pair), strict=True):
                assert ours.dtype == torch.float32
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(before)
        kernels.GROWTH = held


def in_company(decode, precision, steps, company, seed):
    """How far a row's latents and logits are from those that it has alone, next to these, while others come and go."""
    choices, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    (together, _), alone = states(decode, precision, company), states(decode, precision)[0]
    prefixes = [random_prefix(decode, choices.randint(33, 150)) for _ in range(company)]
    positions = [fill([together], slot, prefix) for slot, prefix in enumerate(prefixes)]
    needle = choices.randrange(company)
    at = fill([alone], 0, prefixes[needle])
    worst = 0.0
    for _ in range(steps):
        slots = choices.sample(range(company), choices.randint(1, company))
        if needle not in slots:
            slots[0] = needle
        embeds = torch.randn(len(slots), 1, decode.trunk.channels, generator=generator)
        place = slots.index(needle)
        ours = step(together, embeds, slots, positions)
        expected = step(alone, embeds[place : place + 1], [0], [at])
        for a, b in zip(ours, expected, strict=True):
            worst = max(worst, float((a[place] - b[0]).abs().max() / b.abs().max()))
        at += 1
        for slot in slots:
            positions[slot] += 1
    return worst


# Of a small model, and of XTTS v2's.
WIDTHS = {64: (2, 32), 1024: (16, 64)}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.inference_mode()
def test_a_row_in_company(precision, width, threads):
    """It is what it would be alone: bit for bit but for fp32, which rounds as its number of rows has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decode = decode_graph(*WIDTHS[width], blocks=2)
        worst = max(in_company(decode, precision, 20, company, seed=company) for company in (2, 3, 7, 16))
    finally:
        torch.set_num_threads(before)
    if precision == "fp32":
        assert 0 < worst < 1e-5
    else:
        assert worst == 0


@torch.inference_mode()
def test_that_company_would_be_seen(monkeypatch):
    """If rows shared a scale, as FBGEMM's own dynamic product has it."""

    def dynamic(x, layer):
        return torch.ops.quantized.linear_dynamic(x, layer[0], True) + layer[1]

    monkeypatch.setattr(rows, "product_of", lambda kind, several=False: dynamic)
    monkeypatch.setattr(rows, "scripted", lambda function, product=None: function)
    rows._programs.cache_clear()
    try:
        assert in_company(decode_graph(2, 32, 2), "int8", 5, 3, seed=0) > 0
    finally:
        rows._programs.cache_clear()


@pytest.mark.parametrize("queries", [1.0, 12.0])
@torch.no_grad()
def test_what_the_cache_in_fp16_costs(queries):
    """Next to int8 nothing, next to fp16 weights little, even where attention is nearly a choice of one position."""
    exact = HostState(decode_graph(4, 64, 4, queries=queries), 1, 1)
    pairs = {precision: states(decode_graph(4, 64, 4, queries=queries), precision) for precision in PRECISIONS[1:]}
    prefix = random_prefix(exact._decode, 100)
    fill([exact, *(state for pair in pairs.values() for state in pair)], 0, prefix)
    errors = {precision: torch.zeros(2) for precision in pairs}  # of the program and the graph, 1 - correlation
    for position in range(100, 180):
        inputs = torch.randn(1, 1, 256), [0], [position]
        expected = step(exact, *inputs)[0]
        for precision, pair in pairs.items():
            errors[precision] += torch.tensor([1 - correlation(step(state, *inputs)[0], expected) for state in pair])
    for precision, (ours, graph) in errors.items():
        assert ours / 80 <= (1e-4 if precision == "bf16" else 1.25 * graph / 80)


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_a_slot_is_written_again(precision):
    """A step leaves nothing behind that a later one at the same position could see."""
    decode = decode_graph(heads=2, channels=8, blocks=2)
    one, _ = states(decode, precision)
    inputs = torch.randn(2, 1, 1, 16)
    first = step(one, inputs[0], [0], [0])
    step(one, inputs[1], [0], [0])
    for a, b in zip(step(one, inputs[0], [0], [0]), first, strict=True):
        assert torch.equal(a, b)


def test_when_it_is_taken(xtts):
    """In exact shapes; a bucket plan keeps to the graph."""
    for plan, kind in ((None, Rows), (BucketPlan(), Rows), (BucketPlan.static(), HostState)):
        neuron_xtts.patch(xtts, backend="cpu", buckets=plan)
        assert type(find_patch(xtts).runner.backend.new_state(1, 512)) is kind


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
    step(state, torch.randn(1, 1, 16), [0], [0])
    assert calls == [path]


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_without_torchscript(precision, monkeypatch, caplog):
    """The same functions run as Python, bit for bit."""

    def forget():
        for cache in (rows._programs, kernels._product):
            cache.cache_clear()

    forget()
    with monkeypatch.context() as patching:
        patching.delattr(torch.jit, "script")
        slow = states(decode_graph(2, 8, 2), precision, slots=2)[0]
        product = kernels._product(precision.replace("bf16", "fp16"))
    assert "slower than it could be without TorchScript" in caplog.text
    forget()
    fast = states(decode_graph(2, 8, 2), precision, slots=2)[0]
    assert all(map(inspect.isfunction, (slow._one, slow._several, product)))
    assert not any(map(inspect.isfunction, (fast._one, fast._several)))
    for position in range(70):
        for slots in ([0], [1], [0, 1]):
            inputs = torch.randn(len(slots), 1, 16), slots, [position, position]
            for a, b in zip(step(slow, *inputs), step(fast, *inputs), strict=True):
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
    at = fill(pair, 0, random_prefix(decode, 5))
    inputs = torch.randn(1, 1, 16), [0], [at]
    for ours, expected in zip(*(step(state, *inputs) for state in pair), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_no_memory_to_grow(monkeypatch):
    """What is held stays, all of it."""
    state, _ = states(decode_graph(2, 8, 2), "fp32", 2, 8)
    before = state._slots, state._keys, state._values
    real, calls = rows.lazy_zeros, []

    def lazy_zeros(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(12, "Cannot allocate memory")
        return real(*arguments)

    monkeypatch.setattr(rows, "lazy_zeros", lazy_zeros)
    with pytest.raises(OSError, match="Cannot allocate"):
        state.grow(32, 400, [0, 0])
    assert all(a is b for a, b in zip((state._slots, state._keys, state._values), before, strict=True))


def test_what_is_tried_draws_nothing():
    """What kernels do with rows is found out in the midst of somebody's codes."""
    kernels._group.cache_clear()
    before = torch.get_rng_state()
    assert kernels._group(64, 30, torch.get_num_threads()) >= 1
    assert torch.equal(torch.get_rng_state(), before)
