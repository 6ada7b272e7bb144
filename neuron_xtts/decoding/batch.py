"""A batch: rows that decode together, each in a slot of the decode graph's state, at a position of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from neuron_xtts.backends import DecodeState
from neuron_xtts.decoding.row import Row
from neuron_xtts.errors import NotFinite
from neuron_xtts.graphs.transformer import KeysAndValues
from neuron_xtts.runner import Runner

# Rows that decode together where the plan does not say how many, a choice of ours; a call that has more has them alone.
SLOTS = 16


@dataclass
class Parked:
    """A row that made room for another: what its slot held."""

    row: Row
    contents: Any


class Batch:
    """Slots for rows, and the decode graph that steps them. What it holds of rows it holds until they are released.

    Args:
        runner: of the graphs.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._state: DecodeState | None = None  # while it has rows
        self._slots: list[Row | None] = []
        self._width = 0  # positions of the state's bucket

    @property
    def rows(self) -> int:
        """Rows that have a slot."""
        return sum(row is not None for row in self._slots)

    @property
    def most(self) -> int:
        """Rows that may be in it."""
        sizes = self._runner.buckets.plan.slots
        return sizes[-1] if sizes else SLOTS

    @property
    def free(self) -> int:
        """Rows that may join."""
        return max(self.most - self.rows, 0)

    def has_room(self, rows: int) -> bool:
        """Whether so many may join; where there is none, any number, since they have to be somewhere."""
        return not self.rows or rows <= self.free

    def admit(self, rows: Sequence[Row], prefix: Tensor) -> tuple[Tensor, Tensor]:
        """Run prefixes, each once, and give every row a slot.

        Args:
            rows: as many for each prefix, one prefix after another.
            prefix: (B, P, D) embeddings.

        Returns:
            latents (rows, D) and logits (rows, V) of the last position.

        Raises:
            Fallback: no bucket holds them.
        """
        state = self._make_room(len(rows), prefix.shape[1] + 1)
        copies = len(rows) // len(prefix)
        outputs = []
        for i, embeds in enumerate(torch.split(prefix, 1)):
            latents, logits, cache = self._prefill(embeds)
            # Before a slot holds it: whatever has that slot next must find nothing but finite numbers.
            if not math.isfinite(logits.sum()):
                raise NotFinite("logits that are not finite")
            for row in rows[i * copies : (i + 1) * copies]:
                state.fill(self._take_slot(row), cache, prefix.shape[1])
                row.position = prefix.shape[1]
            outputs.append((latents, logits))
        latents, logits = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
        return latents.repeat_interleave(copies, 0), logits.repeat_interleave(copies, 0)

    def step(self, rows: Sequence[Row], given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Write the next positions of ``rows``, from where they are; whoever else has a slot stays as it is.

        Args:
            rows: that were admitted.
            given: of them, as `DecodeState.step` takes it.

        Returns:
            what that returns.

        Raises:
            Fallback: no bucket holds them.
        """
        slots = [_slot(row) for row in rows]
        positions = self._positions()
        needed = self._next()
        state = self._make_room(0, needed)
        bucket = self._bucket(len(positions), needed, exact=1)
        return self._runner.step(state, bucket, given, slots, positions)

    def park(self, rows: Sequence[Row]) -> list[Parked]:
        """Take rows out, with what was written for them."""
        state = self._state
        assert state is not None
        parked = [Parked(row, state.lift(_slot(row), row.position)) for row in rows]
        self.release(rows)
        return parked

    def bring_back(self, parked: Sequence[Parked]) -> None:
        """Give rows that were taken out a slot again, in which all is as it was.

        Raises:
            Fallback: no bucket holds them.
        """
        state = self._make_room(len(parked), 1 + max(each.row.position for each in parked))
        for each in parked:
            state.put(self._take_slot(each.row), each.contents, each.row.position)

    def widen(self) -> None:
        """Have the state hold the next positions of every row. Raises `Fallback` if no bucket does."""
        if self.rows:
            self._make_room(0, self._next())

    def longest(self) -> Row | None:
        """The row at the greatest position, whether it steps or waits."""
        return max(filter(None, self._slots), key=lambda row: row.position, default=None)

    def clear(self, rows: Sequence[Row]) -> None:
        """Put zeros in place of whatever was written for rows, as where numbers are not finite."""
        assert self._state is not None
        for row in rows:
            self._state.clear(_slot(row), min(row.position + self._runner.steps, self._state.capacity))

    def release(self, rows: Sequence[Row]) -> None:
        """Free the slots of rows; those of them that have none are passed over."""
        for row in rows:
            if row.slot is not None:
                self._slots[row.slot] = None
                row.slot = None
        if not self.rows:
            self._state, self._slots, self._width = None, [], 0

    def cache(self, rows: Sequence[Row]) -> transformers.DynamicCache:
        """The keys and values of rows of the same length, as transformers keeps them."""
        assert self._state is not None
        cache = transformers.DynamicCache()
        found = [self._state.cached(_slot(row), row.position).blocks() for row in rows]
        for block, pairs in enumerate(zip(*found, strict=True)):
            keys, values = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
            cache.update(keys, values, block)
        return cache

    def _positions(self) -> list[int]:
        """Of every slot, that its next step writes."""
        return [0 if row is None else row.position for row in self._slots]

    def _next(self) -> int:
        """Positions up to the last one that is of use in the next call of the graph that decodes."""
        steps = self._runner.steps

        def ahead(row: Row) -> int:
            # Beyond the last position that one is written over, which matters to who wants the cache.
            return steps if row.sampler.sampling.return_dict_in_generate else min(steps, row.wanted)

        return max(row.position + ahead(row) if row else 1 for row in self._slots)

    def _make_room(self, rows: int, positions: int) -> DecodeState:
        """The state, with so many free slots, and so many positions in every slot."""
        held = self._positions()
        missing = max(rows - self._slots.count(None), 0)
        slots, width = self._bucket(len(held) + missing, max([positions, *held]))
        if self._state is None:
            self._state = self._runner.new_state(slots, width)
        elif missing or width > self._width:
            self._state.grow(slots, width, held)
        self._slots += [None] * (slots - len(held))
        self._width = max(width, self._width)
        return self._state

    def _bucket(self, slots: int, positions: int, exact: int = 0) -> tuple[int, int]:
        """A bucket that holds so many, with no fewer positions than the state's if those are a bucket's."""
        if self._runner.buckets.plan.decode is not None:
            positions = max(positions, self._width)
        slots, width = self._runner.buckets.choose(self._runner.decoder, slots, positions, exact=exact)
        return slots, width

    def _take_slot(self, row: Row) -> int:
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
