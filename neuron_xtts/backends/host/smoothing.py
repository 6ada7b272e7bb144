"""Units for the channels of what int8 multiplies: what is large in an activation is taken off, or moved into a weight.

All channels of a linear layer's input share one scale, so a few large ones leave the others few of its 255 steps, and
trained transformers have such channels. A layer computes the same of ``x * factor + offset`` if its weight and bias
make up for it, as in SmoothQuant (https://arxiv.org/abs/2211.10438) and Outlier Suppression+
(https://arxiv.org/abs/2304.09145). Where a norm makes ``x``, or attention, whose shares of the values sum to one, other
parameters of what makes it are all that it takes. How large channels are is seen in a forward pass over a sample.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from neuron_xtts.backends.host.kernels import linear
from neuron_xtts.backends.host.operators import HostOperators
from neuron_xtts.coqui.hooks import unhooked
from neuron_xtts.coqui.weights import is_plain
from neuron_xtts.graphs.transformer import Block, Latents, Trunk

# Of the median over channels: what varies less in the sample, or weighs less, is not blown up as if it never did more.
_LEAST = 0.01
# Of the median over channels: an activation that is larger in the sample is made smaller. Channels of random weights do
# not reach it: the largest there has between five and eight times the median. Some of the miniature's last two blocks
# do, by up to three times.
_MOST = 8.0
# What GELU gives at least, by either of its formulas: -0.1700 at -0.75.
_LOWEST = -0.1701


class Units(NamedTuple):
    """Units in which the channels (C,) of an activation are written: ``x * factor + offset``."""

    factor: Tensor
    offset: Tensor

    def into(self, x: Tensor) -> Tensor:
        """``x`` (..., C) in these units."""
        return torch.addcmul(self.offset, x, self.factor)

    def out_of(self, x: Tensor) -> Tensor:
        """What `into` made ``x`` (..., C) of."""
        return (x - self.offset) / self.factor

    def taken(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (C, channels out) and bias of a layer that takes its input in these units."""
        weight = weight / self.factor[:, None]
        return weight, bias - self.offset @ weight

    def given(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (channels in, C) and bias of a layer, or (C,) and bias of a norm, that gives its output in them."""
        return weight * self.factor, self.into(bias)


def linears_of(block: Block) -> tuple[nn.Module, ...]:
    """The linear layers of a GPT-2 block, in the order in which they are applied."""
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


def values_in(units: Units) -> Units:
    """Units for the output (3 C) of the layer that makes queries, keys and values: those of the last are ``units``."""
    factor, offset = units
    return Units(torch.cat([factor.new_ones(2 * len(factor)), factor]), F.pad(offset, (2 * len(offset), 0)))


@torch.no_grad()
def find_units(trunk: Trunk, embeds: Tensor) -> dict[nn.Module, Units]:
    """The units for the inputs of linear layers.

    Nobody's hooks are called.

    Args:
        trunk: of the model.
        embeds: (1, L, D) embeddings such as come in front of it.

    Raises:
        LookupError: it has layers or weights of another kind than GPT-2's in fp32, or makes what is not finite.
    """
    norms = [trunk.ln_f, trunk.final_norm, *(norm for block in trunk.h for norm in (block.ln_1, block.ln_2))]
    layers = [layer for block in trunk.h for layer in linears_of(block)]
    part: Any
    for part, kind in (*((norm, nn.LayerNorm) for norm in norms), *((layer, Conv1D) for layer in layers)):
        if type(part) is not kind or part.weight is None or part.bias is None or not is_plain(part):
            raise LookupError(f"a {type(part).__name__} that is no {kind.__name__} with weights in fp32 on the CPU")
    found: list[Units] = []

    def watch(layer: Any, x: Tensor) -> Tensor:
        behind_activation = len(found) % 4 == 3
        found.append(_damped(x[0]) if behind_activation else _balanced(x[0], layer.weight))
        return linear(layer, x)

    gpt2: Any = SimpleNamespace(h=[_unhooked(block) for block in trunk.h], ln_f=unhooked(trunk.ln_f))
    graph = Latents(Trunk(gpt2, unhooked(trunk.final_norm), trunk.heads))
    graph.use(HostOperators(watch))
    (latents,) = graph(embeds)
    if not latents.isfinite().all():
        raise LookupError("latents of a sample that are not finite")
    return dict(zip(layers, found, strict=True))


def _balanced(x: Tensor, weight: Tensor) -> Units:
    """Units in which a channel of ``x`` (L, C) has mean zero and is as large, next to the others, as its weights."""
    std, mean = torch.std_mean(x, 0)
    rows = weight.square().mean(1).sqrt()
    rows, std = (size.clamp_min(_LEAST * float(size.median())).clamp_min(1e-12) for size in (rows, std))
    factor = (rows / std).sqrt()
    return Units(factor, -mean * factor)


def _damped(x: Tensor) -> Units:
    """Units in which no channel of ``x`` (L, C), behind an activation, is much larger than the others, or below zero.

    Most values there are near zero, where they must stay next to each other, and the largest are rare: a sample tells
    no more than which channels are far too large.
    """
    largest = x.abs().amax(0)
    most = _MOST * largest.median().clamp_min(1e-12)
    factor = most / largest.clamp_min(most)
    return Units(factor, -_LOWEST * factor)


def _unhooked(block: Block) -> SimpleNamespace:
    c_attn, attn_proj, c_fc, mlp_proj = map(unhooked, linears_of(block))
    return SimpleNamespace(
        ln_1=unhooked(block.ln_1),
        attn=SimpleNamespace(c_attn=c_attn, c_proj=attn_proj),
        ln_2=unhooked(block.ln_2),
        mlp=SimpleNamespace(c_fc=c_fc, c_proj=mlp_proj),
    )
