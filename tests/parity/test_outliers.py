"""int8 where few channels are much larger than the rest, as in trained models, and the units that it computes in."""

import contextlib
import copy
import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import all_fallbacks, assert_identical, dicts, speak, stop_after
from torch.profiler import ProfilerActivity, profile

import neuron_xtts
from neuron_xtts.backends.host.backend import HostState
from neuron_xtts.backends.host.rows import Rows
from neuron_xtts.backends.host.smoothing import linears_of
from neuron_xtts.backends.neuron.verification import correlation
from neuron_xtts.coqui.embeddings import embed_prefix
from neuron_xtts.coqui.models import random_tts
from neuron_xtts.graphs.transformer import KeysAndValues
from neuron_xtts.patching.patch import find_patch

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has FBGEMM for x86 only"
)

_FILE = Path(__file__).parents[2] / "experiments" / "outliers.py"
_SPEC = importlib.util.spec_from_file_location("outliers", _FILE)
outliers = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(outliers)

INT8 = {"backend": "cpu", "precision": "int8", "strict": True}
TEXT = torch.arange(30, 50)[None]
CODES = (torch.arange(60) * 37 % 1000)[None]


@pytest.fixture
def unsmoothed(monkeypatch):
    """A context in which patches compute in the model's units."""

    @contextlib.contextmanager
    def context():
        with monkeypatch.context() as patching:
            patching.setattr("neuron_xtts.options.Sample", lambda networks: None)
            yield

    return context


@pytest.fixture
def deep(xtts):
    """A model whose blocks say more than its embeddings, as trained ones do; random ones hardly say anything."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for block in xtts.gpt.gpt.h:
            for layer in linears_of(block):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * layer.weight.shape[0] ** -0.5)
                layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=generator))
    return xtts


@torch.inference_mode()
def latents(xtts, voice):
    """Of all positions at once, teacher-forced."""
    lengths = torch.tensor([TEXT.shape[1]]), torch.tensor([CODES.shape[1] * xtts.gpt.code_stride_len])
    return xtts.gpt(TEXT, lengths[0], CODES, lengths[1], cond_latents=voice, return_latent=True)


def error(xtts, voice, exact, **options):
    """Of a patch, relative to ``exact``."""
    with neuron_xtts.patched(xtts, **INT8, **options):
        return float((latents(xtts, voice) - exact).norm() / exact.norm())


@torch.no_grad()
def voice_of(xtts, reference):
    return xtts.get_conditioning_latents(str(reference))[0]


WAYS = ("norms", "values", "constant", "hidden")


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_large_channels_cost_int8_nothing(deep, reference, unsmoothed, way):
    """Channels a hundred times as large, where int8 in the model's units makes an error many times as large."""
    plain = voice_of(deep, reference)
    usual = error(deep, plain, latents(deep, plain))
    outliers.WAYS[way](deep.gpt, 100)
    voice = voice_of(deep, reference)
    exact = latents(deep, voice)
    with unsmoothed():
        assert error(deep, voice, exact) > 4 * usual
    assert error(deep, voice, exact) < 2 * usual


@torch.no_grad()
def test_what_changes_nothing(deep, reference):
    """Norms and values are scaled without another result, so that the errors above are those of int8 alone."""
    voice = voice_of(deep, reference)
    before = latents(deep, voice)
    outliers.norms(deep.gpt, 100)
    outliers.values(deep.gpt, 100)
    torch.testing.assert_close(latents(deep, voice), before, rtol=0, atol=1e-4)


def states(xtts, voice):
    """The program of one row and the graph, filled with what the prefill graph makes of a prefix; and its cache."""
    backend = find_patch(xtts).runner.backend
    prefix = embed_prefix(xtts.gpt, voice, TEXT)
    _, _, *cache = backend.run("prefill", (), prefix, torch.tensor([prefix.shape[1] - 1]))
    pair = backend.new_state(1, 200), HostState(backend._graphs["decode"], 1, 200)
    for state in pair:
        state.fill(0, KeysAndValues.split(cache), prefix.shape[1])
    assert type(pair[0]) is Rows
    return pair, KeysAndValues.split(cache), prefix.shape[1]


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_one_row_computes_what_the_graph_does(deep, reference, way):
    """Whose layers, one by one, are those of the model; and others see the cache in the model's units."""
    outliers.WAYS[way](deep.gpt, 100)
    voice = voice_of(deep, reference)
    neuron_xtts.patch(deep, **INT8)
    (one, graph), cache, length = states(deep, voice)
    for kept, made in zip(one.cached(0, length).together(), cache.together(), strict=True):
        torch.testing.assert_close(kept, made[0], rtol=2e-3, atol=4e-3 * float(made.std()))
    for step in range(20):
        at = length + step
        inputs = (torch.randn(1, 1, 64),), [0], [at], at + 1
        for ours, theirs in zip(one.step(*inputs), graph.step(*inputs), strict=True):
            assert correlation(ours, theirs) > 0.999


@torch.no_grad()
def test_a_code_takes_no_more_operators(deep, voice, unsmoothed):
    """Units are in the parameters, but for those behind an activation: one more in each block."""

    def operators():
        with neuron_xtts.patched(deep, **INT8):
            (one, _), _, at = states(deep, voice[0])
            inputs = (torch.randn(1, 1, 64),), [0], [at], at + 1
            for _ in range(3):
                one.step(*inputs)
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                one.step(*inputs)
        return Counter({event.key: event.count for event in profiler.key_averages() if "::" in event.key})

    smoothed = operators()
    with unsmoothed():
        assert smoothed - operators() == {"aten::addcmul": len(deep.gpt.gpt.h)}
    outliers.hidden(deep.gpt, 100)
    assert operators() == smoothed


@pytest.mark.parametrize("path", ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"])
@torch.no_grad()
def test_hooks_see_the_model(deep, reference, path):
    """What a layer under int8 is given and gives is in the model's units, and nothing else comes out for it."""
    for way in WAYS:
        outliers.WAYS[way](deep.gpt, 30)
    voice = voice_of(deep, reference)
    seen = []
    hook = deep.gpt.gpt.h[1].get_submodule(path).register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    exact = latents(deep, voice)
    calls = len(seen)
    with neuron_xtts.patched(deep, **INT8):
        assert len(seen) == calls  # looking for units calls nobody
        ours = latents(deep, voice)
        deep.gpt.generate(voice, TEXT, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    hook.remove()
    for a, b in zip(seen[1], seen[0], strict=True):
        b = b[:, : a.shape[1]]  # without the padding of ``GPT.forward``
        assert (a - b).norm() < 0.1 * b.norm()
    assert (ours - exact).norm() < 0.1 * exact.norm()


@torch.no_grad()
def test_the_model_stays_as_it_is(xtts):
    """Its norms and weights are read, not changed."""
    outliers.norms(xtts.gpt, 100)
    before, held = copy.deepcopy(xtts.state_dict()), dicts(xtts.gpt.gpt)
    with neuron_xtts.patched(xtts, **INT8):
        assert dicts(xtts.gpt.gpt) == held
        assert all(torch.equal(tensor, before[name]) for name, tensor in xtts.state_dict().items())


@pytest.mark.parametrize("sizes", [{"gpt_max_audio_tokens": 9}, {"gpt_max_text_tokens": 12}])
@torch.no_grad()
def test_models_for_short_sentences(tmp_path, reference, sizes):
    """Their units are found like those of others, with as many positions as there are."""
    xtts = random_tts(tmp_path, small=True, **sizes).synthesizer.tts_model
    outliers.norms(xtts.gpt, 100)
    voice, text, codes = voice_of(xtts, reference), TEXT[:, :10], CODES[:, :6]

    def latents():
        lengths = torch.tensor([text.shape[1]]), torch.tensor([codes.shape[1] * xtts.gpt.code_stride_len])
        return xtts.gpt(text, lengths[0], codes, lengths[1], cond_latents=voice, return_latent=True)

    exact = latents()
    with neuron_xtts.patched(xtts, **INT8):
        assert (latents() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("path", ["gpt.h.1.ln_2", "mel_embedding", "conditioning_encoder.init"])
@torch.no_grad()
def test_units_are_found_again(xtts, voice, path):
    """If what they depend on changes under a patch, though no linear layer does: as if patched after the change."""
    options = {"max_new_tokens": 15, **stop_after(xtts, None)}
    neuron_xtts.patch(xtts, **INT8)
    speak(xtts, voice, **options)
    other = copy.deepcopy(xtts)
    for model in (xtts, other):
        model.gpt.get_submodule(path).weight[..., :5] *= 30
    neuron_xtts.patch(other, **INT8)
    assert_identical(speak(xtts, voice, **options), speak(other, voice, **options))


@torch.no_grad()
def test_units_are_those_of_the_weights(xtts, voice):
    """Whatever mode the model was in when it was patched."""
    options = {"max_new_tokens": 15, **stop_after(xtts, None)}
    other = copy.deepcopy(xtts)
    neuron_xtts.patch(xtts, **INT8)
    other.train()
    neuron_xtts.patch(other, **INT8)
    other.eval()
    assert_identical(speak(xtts, voice, **options), speak(other, voice, **options))


@torch.no_grad()
def test_a_state_outlives_its_weights(deep, voice):
    """A stream that goes on while weights are converted again computes with those it began with."""
    neuron_xtts.patch(deep, **INT8)
    (one, _), _, at = states(deep, voice[0])
    inputs = (torch.randn(1, 1, 64),), [0], [at], at + 1
    before = one.step(*inputs)[0]
    outliers.values(deep.gpt, 100)
    outliers.norms(deep.gpt, 100)
    find_patch(deep).runner.backend.check("decode")
    assert torch.equal(one.step(*inputs)[0], before)


class Louder(torch.nn.Module):
    """A layer of another kind."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("mel_embedding", "embeddings of another kind"), ("gpt.h.1.mlp.c_fc", "a Louder that is no Conv1D")],
)
def test_where_nothing_can_be_sampled(xtts, voice, caplog, path, reason):
    """int8 computes in the model's units, and says so once."""
    owner, _, name = path.rpartition(".")
    setattr(xtts.gpt.get_submodule(owner), name, Louder(xtts.gpt.get_submodule(path)))
    neuron_xtts.patch(xtts, **INT8)
    speak(xtts, voice, max_new_tokens=5)
    assert caplog.text.count(f"in the model's units, which large channels may make coarse: {reason}") == 1
    assert all_fallbacks(xtts) == {}


def test_other_defaults_of_torch(xtts):
    """Units are the same where a patch comes under autocast, and another type is the default one."""
    layer, factors = xtts.gpt.gpt.h[1].mlp.c_fc, []
    for default, autocast in ((torch.float32, False), (torch.float64, False), (torch.float32, True)):
        torch.set_default_dtype(default)
        try:
            with torch.autocast("cpu", enabled=autocast), neuron_xtts.patched(xtts, **INT8):
                factors.append(find_patch(xtts).runner.backend._linears.takes(layer).factor)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(factors[1], factors[0])
    assert torch.equal(factors[2], factors[0])
