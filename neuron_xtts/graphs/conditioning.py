"""The voice of a reference recording as a graph: mel frames to conditioning latents.

Shapes: B rows, M mel bands, T mel frames, N latents (32 in XTTS v2), D channels, H heads, K channels per head.
Frames are normalised over time and all attend to each other: padding would change every latent, so T is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuron_xtts.graphs.operators import Graph


class Heads(Protocol):
    """An attention without weights, which only knows its heads."""

    n_heads: int


class EncoderBlock(Protocol):
    """A coqui-tts ``AttentionBlock``, as far as it is read."""

    norm: nn.Module
    qkv: nn.Conv1d
    attention: Heads
    proj_out: nn.Conv1d


class Encoder(Protocol):
    """A coqui-tts ``ConditioningEncoder``, as far as it is read."""

    init: nn.Conv1d
    attn: Sequence[EncoderBlock]


class ResamplerAttention(Protocol):
    """The attention of a coqui-tts ``PerceiverResampler``, as far as it is read."""

    heads: int
    to_q: nn.Linear
    to_kv: nn.Linear
    to_out: nn.Linear


class Perceiver(Protocol):
    """A coqui-tts ``PerceiverResampler``, as far as it is read."""

    proj_context: nn.Module
    latents: nn.Parameter
    layers: Iterable[tuple[ResamplerAttention, Sequence[nn.Module]]]
    norm: nn.Module


class Conditioning(Graph):
    """Conditioning encoder and perceiver resampler.

    Args:
        encoder: of the model.
        perceiver: of the model.
    """

    blocks: Sequence[EncoderBlock]

    def __init__(self, encoder: Encoder, perceiver: Perceiver) -> None:
        super().__init__()
        self.init = encoder.init
        self.blocks = encoder.attn
        self.proj_context = perceiver.proj_context
        self.latents = perceiver.latents
        self.layers = nn.ModuleList(ResamplerLayer(attn, mlp) for attn, mlp in perceiver.layers)
        self.norm = perceiver.norm

    def extra_repr(self) -> str:
        """What the weights do not say."""
        return f"heads={[block.attention.n_heads for block in self.blocks]}"

    def forward(self, mel: Tensor) -> tuple[Tensor]:
        """Conditioning latents of a chunk of the reference.

        Args:
            mel: (B, M, T).

        Returns:
            latents (B, D, N).
        """
        x = pointwise(self.init, mel.transpose(1, 2))  # (B, T, D)
        for block in self.blocks:
            x = block.norm(x.transpose(1, 2)).transpose(1, 2)
            x = x + self.attend(block, x)
        context = self.proj_context(x)
        latents = self.latents.expand(len(x), -1, -1)  # (B, N, D)
        for layer in self.layers:
            latents = layer(latents, context)
        return (self.norm(latents).transpose(1, 2),)

    def attend(self, block: EncoderBlock, x: Tensor) -> Tensor:
        """Attention of one block of the encoder among the frames ``x`` (B, T, D), without norm and residual."""
        rows, frames, channels = x.shape
        heads = block.attention.n_heads
        # Heads come first in the fused channels, then queries, keys and values: the reverse of GPT-2.
        fused = pointwise(block.qkv, x).view(rows, frames, heads, 3, channels // heads)
        q, k, v = fused.permute(3, 0, 2, 1, 4)  # (B, H, T, K) each
        return pointwise(block.proj_out, self.operators.attention(q, k, v).transpose(1, 2).reshape(x.shape))

    def example(self, *bucket: int) -> dict[str, Tensor]:
        """Inputs by name for a number of mel frames."""
        (frames,) = bucket
        return {"mel": torch.randn(1, self.init.in_channels, frames)}


class ResamplerLayer(Graph):
    """One layer of the perceiver: latents attend to themselves and to the frames, then an MLP.

    It takes the linear layers alone, because what coqui-tts wraps around its attention cannot be pickled.

    Args:
        attn: attention of the perceiver.
        mlp: linear layer, GEGLU, linear layer.
    """

    def __init__(self, attn: ResamplerAttention, mlp: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = attn.heads
        self.to_q, self.to_kv, self.to_out = attn.to_q, attn.to_kv, attn.to_out
        self.expand, self.contract = mlp[0], mlp[-1]

    def extra_repr(self) -> str:
        """What the weights do not say."""
        return f"heads={self.heads}"

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """New latents (B, N, D) of ``latents`` and of the frames ``context`` (B, T, D)."""
        k, v = self.to_kv(torch.cat([latents, context], dim=1)).chunk(2, dim=-1)
        q, k, v = (
            tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N or N + T, K)
            for tensor in (self.to_q(latents), k, v)
        )
        latents = latents + self.to_out(self.operators.attention(q, k, v).transpose(1, 2).flatten(2))
        x, gates = self.expand(latents).chunk(2, dim=-1)
        latents = latents + self.contract(x * self.operators.gelu(gates))
        return latents


def pointwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution of kernel size 1 as the product that it is, over channels in the last place."""
    return F.linear(x, conv.weight[:, :, 0], conv.bias)
