"""A row: one utterance that decodes, and how rows draw their next codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from neuron_xtts.decoding.sampling import Sampler, draw_together


@dataclass(eq=False)
class Row:
    """One utterance that decodes.

    Attributes:
        sampler: what its codes are drawn by, the sampling and the generator of its call.
        ids: (P + N,) the prefix as Hugging Face's loop sees it, and the codes drawn so far.
        stopped: whether it has drawn the stop code.
        slot: where its keys and values are in a batch; None while it is in none.
        position: of the cache, that its next step writes: those before it have been written.
    """

    sampler: Sampler
    ids: Tensor
    stopped: bool = False
    slot: int | None = None
    position: int = 0

    @property
    def wanted(self) -> int:
        """Codes that may still be drawn."""
        return self.sampler.sampling.max_new_tokens - self.drawn

    @property
    def drawn(self) -> int:
        """Codes drawn so far, N: the place of the next one in the audio."""
        return len(self.ids) - self.sampler.prefix_length


def make_rows(sampler: Sampler, count: int, start_code: int) -> list[Row]:
    """The rows of one call of ``generate``, as ``GPT.compute_embeddings`` begins them; the start code ends a prefix."""
    ids = torch.ones(sampler.prefix_length, dtype=torch.long)
    ids[-1] = start_code
    return [Row(sampler, ids) for _ in range(count)]


def draw(rows: Sequence[Row], logits: Tensor) -> Tensor:
    """Draw the next code (rows,) of every row from ``logits`` (rows, V).

    As in Hugging Face's loop, the rows of one call draw together, with one draw of their generator, and a row that has
    stopped draws as well and goes on with stop codes. Rows of one call stand side by side.
    """
    calls = [(sampler, list(members)) for sampler, members in groupby(rows, key=lambda row: row.sampler)]
    codes = draw_together([(sampler, [row.ids for row in members]) for sampler, members in calls], logits)
    for i, row in enumerate(rows):
        if row.stopped:
            codes[i] = row.sampler.stop_code
    note(rows, codes)
    return codes


def note(rows: Sequence[Row], codes: Tensor) -> None:
    """Have rows know the codes (rows,) that were drawn for them."""
    for i, row in enumerate(rows):
        row.ids = torch.cat([row.ids, codes[i : i + 1]])
    for row, code in zip(rows, codes.tolist(), strict=True):
        row.stopped = code == row.sampler.stop_code


def rules_of(rows: Sequence[Row], vocabulary: int) -> tuple[Tensor, Tensor]:
    """How a device is to draw for rows: the codes that each had (rows, V), and its rules (rows, 7), see `Rules`."""
    seen = torch.zeros(len(rows), vocabulary)
    for codes, row in zip(seen, rows, strict=True):
        codes[row.ids] = 1
    return seen, torch.tensor([row.sampler.rules(row.drawn, vocabulary, stopped=row.stopped) for row in rows])


def ended(rows: Sequence[Row]) -> bool:
    """Whether no row of a call wants another code: all have stopped, or enough were drawn."""
    return rows[0].wanted == 0 or all(row.stopped for row in rows)


def codes_of(rows: Sequence[Row]) -> Tensor:
    """The codes (rows, N) that rows of one call have drawn."""
    return torch.stack([row.ids[row.sampler.prefix_length :] for row in rows])
