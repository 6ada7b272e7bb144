"""The GPT-2 trunk of XTTS as three graphs: prefill, decode and latents.

Shapes: B rows, L positions, S slots of the KV cache, D channels, H heads, K = D / H channels per head, V audio codes.
The trunk adds no positions of its own: XTTS adds learned positions to the embeddings, which stay on the host.
Right-padding ``embeds`` is exact, because attention is causal: no real position sees the padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from neuron_xtts.graphs.operators import MASKED, Graph, Stateful


class Attention(Protocol):
    """The attention of a GPT-2 block, as far as it is read."""

    c_attn: nn.Module
    c_proj: nn.Module


class MLP(Protocol):
    """The MLP of a GPT-2 block, as far as it is read."""

    c_fc: nn.Module
    c_proj: nn.Module


class Block(Protocol):
    """A GPT-2 block, as far as it is read."""

    ln_1: nn.LayerNorm
    attn: Attention
    ln_2: nn.LayerNorm
    mlp: MLP


class GPT2(Protocol):
    """A ``transformers.GPT2Model``, as far as graphs read it."""

    h: Sequence[Block]
    ln_f: nn.LayerNorm


class KeysAndValues(NamedTuple):
    """What attention remembers: for each block the keys, and for each block the values.

    Graphs take and give them one after another: all keys, then all values.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    @classmethod
    def split(cls, tensors: Sequence[Tensor]) -> KeysAndValues:
        """Keys and values that a graph gave or takes one after another."""
        blocks = len(tensors) // 2
        return cls(tensors[:blocks], tensors[blocks:])

    def together(self) -> list[Tensor]:
        """Keys and values as a graph takes them: all keys, then all values."""
        return [*self.keys, *self.values]

    def blocks(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The keys and values of each block."""
        return zip(self.keys, self.values, strict=True)


class Trunk(Graph):
    """GPT-2 blocks and the two norms above them.

    Args:
        gpt2: blocks and the norm after the last.
        final_norm: the norm that makes latents of hidden states.
        heads: attention heads.
    """

    h: Sequence[Block]

    def __init__(self, gpt2: GPT2, final_norm: nn.LayerNorm, heads: int) -> None:
        super().__init__()
        self.h = gpt2.h
        self.ln_f = gpt2.ln_f
        self.final_norm = final_norm
        self.heads = heads

    def extra_repr(self) -> str:
        """What the weights do not say."""
        return f"heads={self.heads}"

    @property
    def channels(self) -> int:
        """Channels of embeddings and latents, D."""
        return self.ln_f.weight.shape[0]

    def cache_shapes(self, slots: int, positions: int) -> list[tuple[int, int, int, int]]:
        """Shape (B, H, S, K) of every tensor of a cache: of the keys of each block, then of the values."""
        return 2 * len(self.h) * [(slots, self.heads, positions, self.channels // self.heads)]

    def qkv(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one block, each (B, H, L, K), from ``x`` (B, L, D)."""
        rows, length, channels = x.shape
        fused = self.operators.linear(block.attn.c_attn, block.ln_1(x))  # (B, L, 3 D)
        split = fused.view(rows, length, 3, self.heads, channels // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def rest(self, block: Block, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention in one block: output projection, residuals and MLP. (B, L, D)."""
        linear = self.operators.linear
        x = x + linear(block.attn.c_proj, attended.transpose(1, 2).reshape(x.shape))
        hidden = self.operators.gelu(linear(block.mlp.c_fc, block.ln_2(x)), tanh=True)  # (B, L, 4 D)
        return x + linear(block.mlp.c_proj, hidden)

    def latents(self, x: Tensor) -> Tensor:
        """Latents of the last block's output. (B, L, D)."""
        latents: Tensor = self.final_norm(self.ln_f(x))
        return latents

    def round_weights(self, known: dict[int, Tensor]) -> None:
        """Of the linear layers; norms, attention and the residual stream stay in fp32."""
        for block in self.h:
            for part in (block.attn, block.mlp):
                for name in ("c_attn", "c_fc", "c_proj"):
                    if hasattr(part, name):
                        setattr(part, name, RoundedLinear(getattr(part, name), known))


class RoundedLinear(nn.Module):
    """A linear layer of the trunk with weights in bf16; what it takes is rounded, too, and its results are in fp32.

    Args:
        layer: of transformers, with a weight (inputs, outputs) and a bias.
        known: as for `Graph.round_weights`.
    """

    def __init__(self, layer: nn.Module, known: dict[int, Tensor]) -> None:
        super().__init__()
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        if id(weight) not in known:
            known[id(weight)] = weight.detach().to(torch.bfloat16)
        self.weight = nn.Parameter(known[id(weight)], requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., outputs) of ``x`` (..., inputs)."""
        return (x.to(self.weight.dtype) @ self.weight).to(x.dtype) + self.bias


def causal_mask(length: int, like: Tensor) -> Tensor:
    """Additive mask (L, L): zero at and below the diagonal."""
    return torch.full((length, length), MASKED, dtype=like.dtype, device=like.device).triu(1)


class Prefill(Graph):
    """All positions of the prefix at once: the first logits, and keys and values for the cache."""

    def __init__(self, trunk: Trunk, head: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, embeds: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        """Run the prefix.

        Args:
            embeds: (B, L, D) embeddings with positions, right-padded.
            last: (B,) int32, the last position that is not padding.

        Returns:
            latents (B, D) and logits (B, V) of the last position, then `KeysAndValues` (B, H, L, K).
        """
        mask = causal_mask(embeds.shape[1], embeds)
        x, keys, values = embeds, [], []
        for block in self.trunk.h:
            q, k, v = self.trunk.qkv(block, x)
            x = self.trunk.rest(block, x, self.operators.attention(q, k, v, mask))
            keys.append(k)
            values.append(v)
        index = last.long().view(-1, 1, 1).expand(-1, 1, x.shape[-1])
        latents = self.trunk.latents(x.gather(1, index))[:, 0]
        return latents, self.head(latents), *KeysAndValues(keys, values).together()

    def example(self, *bucket: int) -> dict[str, Tensor]:
        """Inputs by name for a number of positions, the last of them padding."""
        return self._example(bucket[0], max(bucket[0] - 2, 0))

    def examples(self, *bucket: int) -> list[dict[str, Tensor]]:
        """Inputs by name: nearly full, with a single position, and full."""
        length = bucket[0]
        return [self._example(length, last) for last in (max(length - 2, 0), 0, length - 1)]

    def _example(self, length: int, last: int) -> dict[str, Tensor]:
        embeds = torch.randn(1, length, self.trunk.channels)
        return {"embeds": embeds, "last": torch.tensor([last], dtype=torch.int32)}

    def in_bucket(self, *bucket: int) -> nn.Module:
        """With a cache of so many positions: of one that decoding can take over as it is."""
        _, positions = bucket
        return StatefulPrefill(self, positions)


class StatefulPrefill(Stateful):
    """`Prefill` with the cache as parameters: decoding takes it from there, and it need not leave the device.

    Args:
        prefill: the graph.
        positions: slots of the cache, S; more than those of a prefix.
    """

    def __init__(self, prefill: Prefill, positions: int) -> None:
        super().__init__(prefill.trunk.cache_shapes(1, positions))
        self.prefill = prefill

    def forward(self, embeds: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        """Run the prefix as `Prefill.forward` does; returns latents, logits, then the cache, whose rest is kept."""
        latents, logits, *cache = self.prefill(embeds, last)
        pairs = zip(cache, self.states, strict=True)
        return latents, logits, *(torch.cat([new, state[:, :, new.shape[2] :]], dim=2) for new, state in pairs)


class Decode(Graph):
    """One audio code per row, each row at a position of its own."""

    def __init__(self, trunk: Trunk, head: nn.Linear) -> None:
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
            cache: `KeysAndValues` (B, H, S, K). Updated in place.

        Returns:
            latents (B, D) and logits (B, V).
        """
        x, write = embeds, self.operators.writer(positions)
        for block, (keys, values) in zip(self.trunk.h, KeysAndValues.split(cache).blocks(), strict=True):
            q, k, v = self.trunk.qkv(block, x)  # (B, H, 1, K)
            write(keys, k)
            write(values, v)
            x = self.trunk.rest(block, x, self.operators.attention(q, keys, values, mask))
        return self.outputs(x)

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, D) and logits (B, V) of the last block's output (B, 1, D)."""
        latents = self.trunk.latents(x)[:, 0]
        return latents, self.operators.linear(self.head, latents)

    def example(self, *bucket: int) -> dict[str, Tensor]:
        """Inputs by name for slots and positions, the rows at different positions."""
        slots, positions = bucket
        return self._example(slots, positions, positions // 2)

    def examples(self, *bucket: int) -> list[dict[str, Tensor]]:
        """Inputs by name: in the middle, and with one row at the first position or at the last."""
        slots, positions = bucket
        return [self._example(slots, positions, first) for first in (positions // 2, 0, positions - 1)]

    def _example(self, slots: int, positions: int, first: int) -> dict[str, Tensor]:
        """Inputs by name, with the first row at the position ``first`` and each other behind the one before."""
        at = (torch.arange(slots, dtype=torch.int32) + first) % positions
        mask = torch.where(torch.arange(positions) <= at[:, None], 0.0, MASKED)[:, None, None]
        return {"embeds": torch.randn(slots, 1, self.trunk.channels), "positions": at, "mask": mask}

    def given(self, rows: int, steps: int = 1) -> tuple[Tensor, ...]:
        """Random inputs of some rows, all but their positions."""
        return (torch.randn(rows, steps, self.trunk.channels),)

    def arrange(
        self, given: Sequence[Tensor], slots: Sequence[int], positions: Sequence[int], width: int
    ) -> tuple[Tensor, ...]:
        """What the graph takes if some slots step: what a row that waits writes, it writes again before it is seen.

        Args:
            given: of the rows that step: embeds (R, 1, D).
            slots: of these rows.
            positions: of every slot, B.
            width: positions that the step may see.

        Returns:
            embeds (B, 1, D), positions (B,) and mask (B, 1, 1, width).
        """
        (embeds,) = given
        at = torch.tensor(positions, dtype=torch.int32)
        mask = torch.zeros(len(positions), 1, 1, width)
        if min(positions) + 1 < width:
            mask.masked_fill_(torch.arange(width) > at.view(-1, 1, 1, 1), MASKED)
        return spread(embeds, slots, len(positions)), at, mask

    def expected(self, inputs: Sequence[Tensor], found: Sequence[Tensor], cache: Sequence[Tensor]) -> list[Tensor]:
        """What a device is to return; it decides nothing, so what it is ``found`` to return does not matter."""
        return list(self(*inputs, *cache))

    def in_bucket(self, *bucket: int) -> nn.Module:
        """A step that holds the cache among its parameters."""
        return StatefulDecode(self, *bucket)


def spread(given: Tensor, slots: Sequence[int], count: int) -> Tensor:
    """What is ``given`` of some rows, in their slots of so many; zeros in the others."""
    if list(slots) == list(range(count)):
        return given
    spread = given.new_zeros(count, *given.shape[1:])
    spread[slots] = given
    return spread


class StatefulDecode(Stateful):
    """`Decode` with the cache as parameters.

    Args:
        decode: the graph.
        slots: rows, B.
        positions: slots of the cache per row, S.
    """

    def __init__(self, decode: Decode, slots: int, positions: int) -> None:
        super().__init__(decode.trunk.cache_shapes(slots, positions))
        self.decode = decode

    def forward(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Run one step as `Decode.forward` does; returns latents, logits, then the cache."""
        cache = [state.clone() for state in self.states]
        return (*self.decode(embeds, positions, mask, *cache), *cache)


class Latents(Graph):
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
            x = self.trunk.rest(block, x, self.operators.attention(q, k, v, mask))
        return (self.trunk.latents(x),)

    def example(self, *bucket: int) -> dict[str, Tensor]:
        """Inputs by name for a number of positions."""
        (length,) = bucket
        return {"embeds": torch.randn(1, length, self.trunk.channels)}
