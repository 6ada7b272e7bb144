"""A batch: rows that decode together, each in a slot of the decode graph's state, at a position of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from neuron_xtts.coqui.embeddings import embed_codes
from neuron_xtts.coqui.surface import Gpt
from neuron_xtts.decoding.row import Row, draw, ended
from neuron_xtts.errors import Fallback
from neuron_xtts.graphs.transformer import KeysAndValues
from neuron_xtts.runner import Runner

Step = tuple[Tensor, Tensor]  # a code (rows,) and its latents (rows, D) of every row


@torch.no_grad()
def decode(gpt: Gpt, batch: Batch, rows: Sequence[Row], prefix: Tensor) -> Iterator[Step]:
    """The decode loop: the steps of a call's rows from its ``prefix`` (B, P, D) on, each run when it is asked for."""
    latents, logits = batch.admit(rows, prefix)
    while True:
        codes = draw(rows, logits)
        yield codes, latents
        if ended(rows):
            return
        latents, logits = batch.step(rows, embed_codes(gpt, codes, [row.drawn for row in rows]))


class Batch:
    """Slots for rows, and the decode graph that steps them.

    Args:
        runner: of the graphs.
        rows: that must find a slot.
        length: positions that their prefixes have at most.
    """

    def __init__(self, runner: Runner, rows: int, length: int) -> None:
        self._runner = runner
        slots, width = runner.buckets.choose("decode", rows, length + 1)
        self._state = runner.new_state(slots, width)
        self._slots: list[Row | None] = [None] * slots

    def admit(self, rows: Sequence[Row], prefix: Tensor) -> tuple[Tensor, Tensor]:
        """Run prefixes, each once, and give every row a slot.

        Args:
            rows: as many for each prefix, one prefix after another.
            prefix: (B, P, D) embeddings.

        Returns:
            latents (rows, D) and logits (rows, V) of the last position.
        """
        copies = len(rows) // len(prefix)
        outputs = []
        for i, embeds in enumerate(torch.split(prefix, 1)):
            latents, logits, cache = self._prefill(embeds)
            for row in rows[i * copies : (i + 1) * copies]:
                self._state.fill(self._take_slot(row), cache, prefix.shape[1])
                row.position = prefix.shape[1]
            outputs.append((latents, logits))
        latents, logits = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
        return _finite(latents.repeat_interleave(copies, 0), logits.repeat_interleave(copies, 0))

    def step(self, rows: Sequence[Row], embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next position of ``rows``; whoever else has a slot stays as it is.

        Args:
            rows: that were admitted.
            embeds: (rows, 1, D) of their latest codes.

        Returns:
            latents (rows, D) and logits (rows, V) of that position.
        """
        slots = [_slot(row) for row in rows]
        positions = [0 if row is None else row.position for row in self._slots]
        bucket = self._runner.buckets.choose("decode", len(positions), max(positions) + 1, exact=1)
        if bucket[1] > self._state.capacity:
            self._state.grow(bucket[1])
        latents, logits = self._runner.step(self._state, bucket, embeds, slots, positions)
        for row in rows:
            row.position += 1
        return _finite(latents, logits)

    def release(self, rows: Sequence[Row]) -> None:
        """Free the slots of rows; those of them that have none are passed over."""
        for row in rows:
            if row.slot is not None:
                self._slots[row.slot] = None
                row.slot = None

    def cache(self, rows: Sequence[Row]) -> transformers.DynamicCache:
        """The keys and values of rows of the same length, as transformers keeps them."""
        cache = transformers.DynamicCache()
        found = [self._state.cached(_slot(row), row.position).blocks() for row in rows]
        for block, pairs in enumerate(zip(*found, strict=True)):
            keys, values = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
            cache.update(keys, values, block)
        return cache

    def _take_slot(self, row: Row) -> int:
        if None not in self._slots:
            raise ValueError(f"all {len(self._slots)} slots are taken; release a row first")
        row.slot = self._slots.index(None)
        self._slots[row.slot] = row
        return row.slot

    def _prefill(self, embeds: Tensor) -> tuple[Tensor, Tensor, KeysAndValues]:
        """Latents (1, D), logits (1, V) and the cache of a prefix (1, P, D)."""
        length = embeds.shape[1]
        bucket = self._runner.buckets.choose("prefill", length)
        padded = F.pad(embeds, (0, 0, 0, bucket[0] - length))
        last = torch.tensor([length - 1], dtype=torch.int32)
        latents, logits, *cache = self._runner.run("prefill", bucket, length, padded, last)
        return latents, logits, KeysAndValues.split(cache)


def _slot(row: Row) -> int:
    if row.slot is None:
        raise ValueError("a row that is in no batch was to step; admit it first")
    return row.slot


def _finite(latents: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    if not math.isfinite(logits.sum()):
        raise Fallback("logits that are not finite")
    return latents, logits
