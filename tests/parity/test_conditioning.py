"""The conditioning graph against coqui-tts's ``GPT.get_style_emb``, and on the XLA frontend."""

import copy
import io

import pytest
import torch
from torch import nn
from TTS.tts.layers.tortoise.arch_utils import RelativePositionBias
from TTS.tts.layers.xtts.gpt import GPT
from TTS.tts.layers.xtts.perceiver_encoder import FeedForward, RMSNorm

from neuron_xtts.backends.host.operators import HostOperators
from neuron_xtts.coqui.recognise import conditioning_parts
from neuron_xtts.coqui.surface import Networks
from neuron_xtts.errors import Fallback
from neuron_xtts.graphs.conditioning import Conditioning
from neuron_xtts.graphs.operators import PLAIN

CHUNK = 517  # mel frames of six seconds, the default of `Xtts.get_conditioning_latents`; `TTS.tts` has 345 and 173


def trained(gpt):
    """A copy with weights where coqui-tts starts from zeros and ones, which would hide mistakes."""
    gpt = copy.deepcopy(gpt)
    torch.manual_seed(0)
    with torch.no_grad():
        for block in gpt.conditioning_encoder.attn:
            block.proj_out.weight.normal_(std=gpt.model_dim**-0.5)
            for parameter in (block.norm.weight, block.norm.bias, block.proj_out.bias):
                parameter.normal_()
        gpt.conditioning_perceiver.latents.normal_()
        gpt.conditioning_perceiver.norm.gamma.normal_()
    return gpt


@pytest.fixture(scope="module")
def small(tts_original):
    return trained(tts_original.synthesizer.tts_model.gpt)


@pytest.fixture(scope="module")
def full():
    """The voice encoder of XTTS v2 in its full size, and as little else as there can be."""
    return trained(GPT(layers=1, model_dim=1024, heads=16, use_perceiver_resampler=True).eval())


@pytest.fixture
def gpt(small):
    """To break."""
    return copy.deepcopy(small)


def make_graph(gpt, kind=PLAIN):
    graph = Conditioning(*conditioning_parts(Networks(gpt, None)))
    graph.use(kind)
    return graph


OPERATORS = (PLAIN, HostOperators())  # of compiled programs, and of the host


def compare_in_fp64(gpt, mel, monkeypatch, kind):
    """A difference is a mistake and not rounding, once coqui-tts is kept from rounding norms and softmax to fp32."""
    gpt = copy.deepcopy(gpt).double()
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "float", lambda self: self)
        expected = gpt.get_style_emb(mel.double())
        (latents,) = make_graph(gpt, kind)(mel.double())
    assert latents.dtype == expected.dtype == torch.double
    torch.testing.assert_close(latents, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("frames", [1, 29, 173, 345, CHUNK])
def test_as_coqui(small, frames, monkeypatch, kind):
    mel = torch.randn(2, 80, frames)
    (latents,) = make_graph(small, kind)(mel)
    assert latents.shape == (2, 64, 32)
    torch.testing.assert_close(latents, small.get_style_emb(mel), rtol=0, atol=1e-5)
    compare_in_fp64(small, mel, monkeypatch, kind)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", OPERATORS)
def test_as_coqui_full_size(full, monkeypatch, kind):
    mel = torch.randn(1, 80, CHUNK)
    (latents,) = make_graph(full, kind)(mel)
    assert latents.shape == (1, 1024, 32)
    torch.testing.assert_close(latents, full.get_style_emb(mel), rtol=0, atol=1e-5)
    compare_in_fp64(full, mel, monkeypatch, kind)


@torch.no_grad()
def test_of_a_recording(tts, reference, monkeypatch):
    """What coqui-tts itself passes for a recording, quiet and loud bands as they come."""
    xtts = tts.synthesizer.tts_model
    xtts.gpt = gpt = trained(xtts.gpt)
    original, seen = gpt.get_style_emb, []

    def spy(mel, return_latent=False):
        seen.append((mel, original(mel, return_latent)))
        return seen[-1][1]

    monkeypatch.setattr(gpt, "get_style_emb", spy)
    xtts.get_conditioning_latents(str(reference))
    ((mel, expected),) = seen
    assert mel.shape == (1, 80, 3 * 22050 // 256 + 1)
    for kind in OPERATORS:
        torch.testing.assert_close(make_graph(gpt, kind)(mel)[0], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_frames_cannot_be_padded(small):
    """Why a bucket is an exact length."""
    graph, mel = make_graph(small), torch.randn(1, 80, 100)
    padded = nn.functional.pad(mel, (0, 28))
    assert (graph(padded)[0] - graph(mel)[0]).abs().max() > 0.01


def test_no_weight_is_copied_or_left_out(small):
    modules = (small.conditioning_encoder, small.conditioning_perceiver)
    theirs = {id(parameter) for module in modules for parameter in module.parameters()}
    assert {id(parameter) for parameter in make_graph(small).parameters()} == theirs


@torch.no_grad()
def test_which_modules_are_called(small):
    """The others are bypassed: code that somebody hangs on them would not run."""
    graph, seen = make_graph(copy.deepcopy(small)), set()
    for name, module in graph.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    graph(torch.randn(1, 80, 9))
    norms = {f"blocks.{i}.norm" for i in range(6)} | {"norm"}
    layers = {
        f"layers.{i}{name}" for i in range(2) for name in ("", ".to_q", ".to_kv", ".to_out", ".expand", ".contract")
    }
    assert seen == {"", "proj_context"} | norms | layers


@torch.no_grad()
def test_saved_and_loaded(small):
    """Unlike the perceiver itself."""
    graph, buffer = make_graph(small), io.BytesIO()
    with pytest.raises(Exception, match="EfficientAttentionConfig"):
        torch.save(small.conditioning_perceiver, io.BytesIO())
    torch.save(copy.deepcopy(graph), buffer)
    buffer.seek(0)
    mel = torch.randn(1, 80, 50)
    assert torch.equal(torch.load(buffer, weights_only=False)(mel)[0], graph(mel)[0])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("size", "frames"), [("small", 29), ("small", CHUNK), ("full", CHUNK)])
def test_lowers_and_computes_the_same(size, frames, request):
    """On XLA's CPU device, where attention is written out, against the host."""
    torch_xla = pytest.importorskip("torch_xla")
    from neuron_xtts.backends.neuron.lowering import lower

    graph = make_graph(request.getfixturevalue(size))
    inputs = graph.example(frames)
    moved = copy.deepcopy(graph).to(torch_xla.device())
    lowering = lower("conditioning", str(frames), moved, inputs)
    assert lowering.unlowered == lowering.disconnected == lowering.rejected == []
    assert lowering.operators["dot"] == 1 + 6 * 4 + 2 * 7
    assert "convolution" not in lowering.operators
    graph.use(HostOperators())
    (expected,) = graph(*inputs.values())
    (latents,) = moved(*(tensor.to(torch_xla.device()) for tensor in inputs.values()))
    torch.testing.assert_close(latents.cpu(), expected, rtol=0, atol=1e-5)


def set_on(path, value):
    """What sets an attribute somewhere in a GPT, given by its path."""

    def change(gpt):
        parent, _, name = path.rpartition(".")
        setattr(gpt.get_submodule(parent), name, value)

    return change


def wide_convolution(gpt):
    gpt.conditioning_encoder.init = nn.Conv1d(80, 64, 3, padding=1)


def wrapped_convolution(gpt):
    nn.utils.parametrizations.weight_norm(gpt.conditioning_encoder.attn[0].qkv)


def relative_positions(gpt):
    gpt.conditioning_encoder.attn[2].relative_pos_embeddings = RelativePositionBias(scale=1.0)


ENCODER, PERCEIVER = "conditioning_encoder", "conditioning_perceiver"
UNUSUAL = {
    "XTTS v1": (set_on("use_perceiver_resampler", False), "a GPT without perceiver resampler"),
    "encoder": (set_on(ENCODER, nn.Identity()), "a Identity where a ConditioningEncoder belongs"),
    "block": (lambda gpt: gpt.conditioning_encoder.attn.append(nn.Identity()), "a Identity where a AttentionBlock"),
    "attention": (set_on(f"{ENCODER}.attn.1.attention", nn.Identity()), "where a QKVAttentionLegacy belongs"),
    "tortoise norm": (set_on(f"{ENCODER}.attn.3.tortoise_norm", True), "tortoise_norm or relative positions"),
    "relative positions": (relative_positions, "tortoise_norm or relative positions"),
    "wide convolution": (wide_convolution, "convolutions over time"),
    "weight norm": (wrapped_convolution, "a ParametrizedConv1d where a Conv1d belongs"),
    "perceiver": (set_on(PERCEIVER, nn.Identity()), "where a PerceiverResampler belongs"),
    "norm": (set_on(f"{PERCEIVER}.norm", nn.LayerNorm(64)), "a LayerNorm where a RMSNorm belongs"),
    "conditioned norm": (set_on(f"{PERCEIVER}.norm", RMSNorm(64, dim_cond=8)), "a conditioned norm"),
    "no latents": (set_on(f"{PERCEIVER}.layers.1.0.cross_attn_include_queries", False), "leaves out the latents"),
    "causal": (set_on(f"{PERCEIVER}.layers.0.0.attend.causal", True), "causal"),
    "dropout": (set_on(f"{PERCEIVER}.layers.1.0.attend.attn_dropout.p", 0.1), "dropout"),
    "another attention": (set_on(f"{PERCEIVER}.layers.0.0", nn.Identity()), "where a Attention belongs"),
    "another Attend": (set_on(f"{PERCEIVER}.layers.0.0.attend", nn.Identity()), "where a Attend belongs"),
    "convolution": (set_on(f"{PERCEIVER}.layers.0.1", FeedForward(64, causal_conv=True)), "another MLP"),
    "another activation": (set_on(f"{PERCEIVER}.layers.1.1.1", nn.GELU()), "another MLP"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_another_architecture(gpt, name):
    change, reason = UNUSUAL[name]
    conditioning_parts(Networks(gpt, None))
    change(gpt)
    with pytest.raises(Fallback, match=reason):
        conditioning_parts(Networks(gpt, None))
