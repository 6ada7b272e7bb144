"""The GPT-2 trunk of XTTS as three graphs: prefill, decode and latents.

Shapes: B rows, L positions, S slots of the KV cache, D channels, H heads, K = D / H channels per head, V audio codes.
The trunk adds no positions of its own: XTTS adds learned positions to the embeddings, which stay on the host.
Right-padding ``embeds`` is exact, because attention is causal: no real position sees the padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Added to the score of a position that must not be attended to. Finite, because compilers turn infinities into NaN;
# in fp32 its exponential is exactly zero.
MASKED = -1e9

OUTPUTS = 2  # of decoding, latents and logits; the cache follows them


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of ``q`` (B, H, L, K) over ``k`` and ``v`` (B, H, S, K) with an additive ``mask``, if any."""
    if q.device.type == "cpu":  # the fused kernel keeps no (L, S) scores; compilers want the plain operators below
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, H, L, S)
    return torch.softmax(scores if mask is None else scores + mask, dim=-1) @ v


def apply(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``."""
    result: Tensor = module(x)
    return result


class Trunk(nn.Module):
    """GPT-2 blocks and the two norms above them, over the very modules of the model: no weight is copied.

    Args:
        gpt2: a ``transformers.GPT2Model``: blocks ``h`` and norm ``ln_f``.
        final_norm: the norm that makes latents of hidden states.
        heads: attention heads.

    Attributes:
        linear: how a linear layer is applied: ``linear(module, x)``, which a backend may replace.
    """

    # Modules of the model, by duck typing.
    h: Any
    ln_f: Any
    final_norm: Any

    def __init__(self, gpt2: Any, final_norm: nn.Module, heads: int) -> None:
        super().__init__()
        self.h = gpt2.h
        self.ln_f = gpt2.ln_f
        self.final_norm = final_norm
        self.heads = heads
        # Not lambdas: graphs are pickled to be compiled.
        self.linear: Callable[[nn.Module, Tensor], Tensor] = apply

    def extra_repr(self) -> str:
        """What the weights do not say."""
        return f"heads={self.heads}"

    def qkv(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one block, each (B, H, L, K), from ``x`` (B, L, D)."""
        rows, length, channels = x.shape
        fused = self.linear(block.attn.c_attn, block.ln_1(x))  # (B, L, 3 D)
        split = fused.view(rows, length, 3, self.heads, channels // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def rest(self, block: Any, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention in one block: output projection, residuals and MLP. (B, L, D)."""
        x = x + self.linear(block.attn.c_proj, attended.transpose(1, 2).reshape(x.shape))
        hidden = F.gelu(self.linear(block.mlp.c_fc, block.ln_2(x)), approximate="tanh")  # (B, L, 4 D)
        return x + self.linear(block.mlp.c_proj, hidden)

    def latents(self, x: Tensor) -> Tensor:
        """Latents of the last block's output. (B, L, D)."""
        latents: Tensor = self.final_norm(self.ln_f(x))
        return latents


def causal_mask(length: int, like: Tensor) -> Tensor:
    """Additive mask (L, L): zero at and below the diagonal."""
    return torch.full((length, length), MASKED, dtype=like.dtype, device=like.device).triu(1)


class Prefill(nn.Module):
    """All positions of the prefix at once: the first logits, and keys and values for the cache."""

    head: Any

    def __init__(self, trunk: Trunk, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, embeds: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        """Run the prefix.

        Args:
            embeds: (B, L, D) embeddings with positions, right-padded.
            last: (B,) int32, the last position that is not padding.

        Returns:
            latents (B, D) and logits (B, V) of the last position, then the keys (B, H, L, K) of every block, then the
            values likewise.
        """
        mask = causal_mask(embeds.shape[1], embeds)
        x, keys, values = embeds, [], []
        for block in self.trunk.h:
            q, k, v = self.trunk.qkv(block, x)
            x = self.trunk.rest(block, x, attention(q, k, v, mask))
            keys.append(k)
            values.append(v)
        index = last.long().view(-1, 1, 1).expand(-1, 1, x.shape[-1])
        latents = self.trunk.latents(x.gather(1, index))[:, 0]
        return latents, self.head(latents), *keys, *values

    def example(self, length: int) -> dict[str, Tensor]:
        """Inputs by name for ``length`` positions, the last of them padding."""
        last = torch.tensor([max(length - 2, 0)], dtype=torch.int32)
        return {"embeds": torch.randn(1, length, self.head.in_features), "last": last}


def writer(positions: Tensor) -> Callable[[Tensor, Tensor], object]:
    """What writes (B, H, 1, K) into the cache (B, H, S, K), each row at its position (B,)."""
    if positions.device.type == "cpu" and len(positions) == 1:  # half a millisecond a step in 60 small operators
        at = int(positions)
        return lambda cache, new: cache.narrow(2, at, 1).copy_(new)
    index = positions.long().view(-1, 1, 1, 1)
    return lambda cache, new: cache.scatter_(2, index.expand_as(new), new)


class Decode(nn.Module):
    """One audio code per row, each row at a position of its own."""

    head: Any

    def __init__(self, trunk: Trunk, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, embeds: Tensor, positions: Tensor, mask: Tensor | None, *cache: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step and write its keys and values into the cache.

        Args:
            embeds: (B, 1, D) embedding of the latest code, with its position.
            positions: (B,) int32, the slot of the cache each row writes.
            mask: (B, 1, 1, S) additive: zero up to a row's position, `MASKED` above. Slots above a row's position may
                hold anything finite. None if there is nothing above.
            cache: the keys (B, H, S, K) of every block, then the values likewise. Updated in place.

        Returns:
            latents (B, D) and logits (B, V).
        """
        x, blocks, write = embeds, self.trunk.h, writer(positions)
        for block, keys, values in zip(blocks, cache[: len(blocks)], cache[len(blocks) :], strict=True):
            q, k, v = self.trunk.qkv(block, x)  # (B, H, 1, K)
            write(keys, k)
            write(values, v)
            x = self.trunk.rest(block, x, attention(q, keys, values, mask))
        return self.outputs(x)

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, D) and logits (B, V) of the last block's output (B, 1, D)."""
        latents = self.trunk.latents(x)[:, 0]
        return latents, self.trunk.linear(self.head, latents)

    def example(self, slots: int, positions: int) -> dict[str, Tensor]:
        """Inputs by name, the rows at different positions."""
        at = (torch.arange(slots, dtype=torch.int32) + positions // 2) % positions
        mask = torch.where(torch.arange(positions) <= at[:, None], 0.0, MASKED)[:, None, None]
        return {"embeds": torch.randn(slots, 1, self.head.in_features), "positions": at, "mask": mask}

    def cache_shape(self, slots: int, positions: int) -> tuple[int, ...]:
        """Shape (B, H, S, K) of the keys, or the values, of one block."""
        return slots, self.trunk.heads, positions, self.head.in_features // self.trunk.heads

    def random_cache(self, slots: int, positions: int) -> list[Tensor]:
        """Keys and values for `forward`."""
        return [torch.randn(self.cache_shape(slots, positions)) for _ in range(2 * len(self.trunk.h))]


class StatefulDecode(nn.Module):
    """`Decode` in the form that tracers want: the cache as parameters, its new contents among the outputs.

    Args:
        decode: the graph.
        slots: rows, B.
        positions: slots of the cache per row, S.
    """

    def __init__(self, decode: Decode, slots: int, positions: int) -> None:
        super().__init__()
        self.decode = decode
        shape = decode.cache_shape(slots, positions)
        states = (nn.Parameter(torch.zeros(shape), requires_grad=False) for _ in range(2 * len(decode.trunk.h)))
        self.states = nn.ParameterList(states)

    def forward(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """As `Decode.forward`: latents, logits, then the cache."""
        cache = [state.clone() for state in self.states]
        return (*self.decode(embeds, positions, mask, *cache), *cache)

    def example(self, slots: int, positions: int) -> dict[str, Tensor]:
        """See `Decode.example`."""
        return self.decode.example(slots, positions)


class Latents(nn.Module):
    """A whole sequence at once: the latents of every position."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, embeds: Tensor) -> tuple[Tensor]:
        """Latents (B, L, D) of ``embeds`` (B, L, D)."""
        mask = causal_mask(embeds.shape[1], embeds)
        x = embeds
        for block in self.trunk.h:
            q, k, v = self.trunk.qkv(block, x)
            x = self.trunk.rest(block, x, attention(q, k, v, mask))
        return (self.trunk.latents(x),)

    def example(self, length: int) -> dict[str, Tensor]:
        """Inputs by name for ``length`` positions."""
        return {"embeds": torch.randn(1, length, self.trunk.final_norm.weight.shape[0])}
