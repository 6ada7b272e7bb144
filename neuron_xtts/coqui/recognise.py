"""Recognisers: whether a model of coqui-tts is what graphs compute, and what of it they are made of.

One for each family of the catalogue. Each raises `Fallback` with the reason why not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from neuron_xtts.coqui.hooks import check_unhooked
from neuron_xtts.coqui.surface import Gpt, Networks
from neuron_xtts.errors import Fallback
from neuron_xtts.graphs.catalogue import CATALOGUE, TransformerParts
from neuron_xtts.graphs.codes import CodeTables
from neuron_xtts.graphs.conditioning import Encoder, Perceiver
from neuron_xtts.graphs.operators import Graph
from neuron_xtts.graphs.transformer import Trunk
from neuron_xtts.graphs.vocoder import Generator


@dataclass(frozen=True)
class Recogniser:
    """How a family of graphs is found in a model.

    Attributes:
        parts: what ``GraphSpec.build`` takes; raises `Fallback` where the architecture is another.
        made_of: the objects that the parts were read from; with another there, the graphs are of another model.
        check_state: raises `Fallback` where the model is in a state in which it computes something else.
    """

    parts: Callable[[Networks], Any]
    made_of: Callable[[Networks], Sequence[object]]
    check_state: Callable[[Networks], None]

    def still_made_of(self, then: Sequence[object], networks: Networks) -> bool:
        """Whether nothing was replaced since ``made_of`` gave ``then``; whoever keeps it keeps ids from coming back."""
        now = self.made_of(networks)
        return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))


def make_graphs(networks: Networks) -> tuple[dict[str, Graph], dict[str, str]]:
    """The graphs of a model over its own modules, and, for those that it does not fit, the reason.

    Args:
        networks: of the model.
    """
    graphs: dict[str, Graph] = {}
    unfit: dict[str, str] = {}
    for family, recogniser in RECOGNISERS.items():
        members = [spec for spec in CATALOGUE.values() if spec.family == family]
        try:
            parts = recogniser.parts(networks)
        except Fallback as fallback:
            unfit |= {spec.name: str(fallback) for spec in members}
            continue
        for spec in members:
            try:
                graphs[spec.name] = spec.build(parts)
            except Fallback as fallback:
                unfit[spec.name] = str(fallback)
    return graphs, unfit


def transformer_parts(networks: Networks) -> TransformerParts:
    """The trunk and the head of the GPT."""
    gpt = networks.gpt
    trunk = gpt.gpt
    _check_class(trunk, "GPT2Model")
    for block in trunk.h:
        _check_class(block, "GPT2Block")
        _check_class(block.attn, "GPT2Attention")
        _check_class(block.mlp, "GPT2MLP")
    expected = {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }
    for name, value in expected.items():
        if getattr(trunk.config, name, value) != value:
            raise Fallback(f"GPT-2 with {name}={getattr(trunk.config, name)!r}")
    if not isinstance(gpt.mel_pos_embedding, nn.Module):
        raise Fallback("a GPT without learned positions")
    return TransformerParts(Trunk(trunk, gpt.final_norm, gpt.heads), gpt.mel_head, partial(code_tables, gpt))


def code_tables(gpt: Gpt) -> CodeTables:
    """What codes are embedded by, looked up in tables."""
    _check_class(gpt.mel_pos_embedding, "LearnedPositionEmbeddings")
    tables = gpt.mel_embedding, gpt.mel_pos_embedding.emb
    for table in tables:
        _check_class(table, "Embedding")
        if table.max_norm is not None:
            raise Fallback("embeddings of codes with a largest norm")
    return CodeTables(*tables, gpt.stop_audio_token)


def check_transformer(networks: Networks) -> None:
    """Raise `Fallback` where the GPT is in a state that the transformer graphs do not compute."""
    gpt = networks.gpt
    if gpt.training or gpt.gpt.training:
        raise Fallback("training mode")
    bypassed: list[Any] = [gpt.gpt, *(module for block in gpt.gpt.h for module in (block, block.attn, block.mlp))]
    check_plain(gpt.mel_head, *bypassed)


def vocoder_parts(networks: Networks) -> Generator:
    """The vocoder of the decoder."""
    generator = networks.decoder.waveform_decoder
    _check_class(generator, "HifiganGenerator")
    for block in generator.resblocks:
        _check_class(block, "ResBlock1", "ResBlock2")
    if hasattr(generator, "lin_pre") or not hasattr(generator, "cond_layer"):
        raise Fallback("a HiFi-GAN without speaker conditioning, or with a linear layer in front")
    return generator


def vocoder_made_of(networks: Networks) -> Sequence[object]:
    """The vocoder and its lists of layers; its layers' weights are read at every call."""
    generator = networks.decoder.waveform_decoder
    names = ("conv_pre", "cond_layer", "ups", "conds", "resblocks", "conv_post")
    return (generator, *(getattr(generator, name, None) for name in names))


def conditioning_parts(networks: Networks) -> tuple[Encoder, Perceiver]:
    """The voice encoder of the GPT."""
    gpt = networks.gpt
    if not gpt.use_perceiver_resampler:
        raise Fallback("a GPT without perceiver resampler")
    _check_encoder(gpt.conditioning_encoder)
    _check_perceiver(gpt.conditioning_perceiver)
    return gpt.conditioning_encoder, gpt.conditioning_perceiver


def _check_encoder(encoder: Any) -> None:
    _check_class(encoder, "ConditioningEncoder")
    for block in encoder.attn:
        _check_class(block, "AttentionBlock")
        _check_class(block.attention, "QKVAttentionLegacy")
        if block.tortoise_norm or block.relative_pos_embeddings is not None:
            raise Fallback("a conditioning encoder with tortoise_norm or relative positions")
    for conv in (encoder.init, *(conv for block in encoder.attn for conv in (block.qkv, block.proj_out))):
        _check_class(conv, "Conv1d")
        if (conv.kernel_size, conv.stride, conv.padding, conv.groups) != ((1,), (1,), (0,), 1):
            raise Fallback("a conditioning encoder with convolutions over time")


def _check_perceiver(perceiver: Any) -> None:
    _check_class(perceiver, "PerceiverResampler")
    _check_class(perceiver.norm, "RMSNorm")
    if perceiver.norm.cond:
        raise Fallback("a perceiver with a conditioned norm")
    for attn, mlp in perceiver.layers:
        _check_class(attn, "Attention")
        _check_class(attn.attend, "Attend")
        if not attn.cross_attn_include_queries or attn.attend.causal or attn.attend.attn_dropout.p:
            raise Fallback("a perceiver whose attention is causal, has dropout or leaves out the latents")
        if [type(module).__name__ for module in mlp] != ["Linear", "GEGLU", "Linear"]:
            raise Fallback("a perceiver with another MLP")


def conditioning_made_of(networks: Networks) -> Sequence[object]:
    """Every module of the voice encoder: the graph holds the linear layers one by one."""
    gpt = networks.gpt
    return (*gpt.conditioning_encoder.modules(), *gpt.conditioning_perceiver.modules())


def check_conditioning(networks: Networks) -> None:
    """Raise `Fallback` where the voice encoder is in a state that the conditioning graph does not compute."""
    gpt = networks.gpt
    if gpt.training or gpt.conditioning_encoder.training or gpt.conditioning_perceiver.training:
        raise Fallback("training mode")
    check_plain_conditioning(networks)


def check_plain_conditioning(networks: Networks) -> None:
    """See `check_plain`, of the voice encoder; its mode does not matter."""
    gpt = networks.gpt
    check_plain(*gpt.conditioning_encoder.modules(), *gpt.conditioning_perceiver.modules())


def check_plain(*modules: nn.Module) -> None:
    """Raise `Fallback` where torch would not compute in fp32 on the CPU, or would call code of somebody else.

    Args:
        modules: those whose ``forward`` the graphs do not call, the first of them with parameters.
    """
    weight = next(modules[0].parameters())
    if weight.device.type != "cpu":
        raise Fallback(f"weights on {weight.device.type}")
    if weight.dtype != torch.float32:
        raise Fallback(f"weights of {weight.dtype}")
    if torch.is_autocast_enabled("cpu"):
        raise Fallback("autocast")
    check_unhooked(modules)


def _check_class(module: object, *known: str) -> None:
    if type(module).__name__ not in known:
        raise Fallback(f"a {type(module).__name__} where a {' or '.join(known)} belongs")


RECOGNISERS = {
    "transformer": Recogniser(
        parts=transformer_parts,
        made_of=lambda networks: (
            networks.gpt.gpt,
            networks.gpt.gpt.h,
            networks.gpt.gpt.ln_f,
            networks.gpt.final_norm,
            networks.gpt.mel_head,
        ),
        check_state=check_transformer,
    ),
    "vocoder": Recogniser(
        parts=vocoder_parts,
        made_of=vocoder_made_of,
        check_state=lambda networks: check_plain(*networks.decoder.waveform_decoder.modules()),
    ),
    "conditioning": Recogniser(
        parts=conditioning_parts,
        made_of=conditioning_made_of,
        check_state=check_conditioning,
    ),
}
