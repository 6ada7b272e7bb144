"""A row: one utterance that decodes. And the rows of one call, which draw together and end together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_xtts.decoding.sampling import Sampling


@dataclass(eq=False)
class Row:
    """One utterance that decodes.

    Attributes:
        ids: (P + N,) the prefix as Hugging Face's loop sees it, and the codes drawn so far.
        prefix: positions of the prefix, P.
        stopped: whether it has drawn the stop code.
        slot: where its keys and values are in a batch; None while it is in none.
        position: of the cache, that its next step writes: those before it have been written.
    """

    ids: Tensor
    prefix: int
    stopped: bool = False
    slot: int | None = None
    position: int = 0

    @property
    def drawn(self) -> int:
        """Codes drawn so far, N: the place of the next one in the audio."""
        return len(self.ids) - self.prefix


class Generation:
    """The rows of one call of ``generate``.

    As in Hugging Face's loop they draw together, with one draw of the random generator a step, and end together: a row
    that has stopped goes on with stop codes until all have, or until enough were drawn.

    Args:
        sampling: what the call asked for.
        count: rows.
        prefix: positions of the prefix of each, the start code last.
        start_code: the code that ends the prefix.
        stop_code: the code that stops a row.
        generator: what codes are drawn with; None for torch's global one.
    """

    def __init__(
        self,
        sampling: Sampling,
        count: int,
        prefix: int,
        *,
        start_code: int,
        stop_code: int,
        generator: torch.Generator | None = None,
    ) -> None:
        self.sampling = sampling
        self.generator = generator
        self.stop_code = stop_code
        ids = torch.ones(prefix, dtype=torch.long)  # as GPT.compute_embeddings makes them
        ids[-1] = start_code
        self.rows = [Row(ids, prefix) for _ in range(count)]
        self._processors = sampling.processors(prefix, stop_code)

    @property
    def ids(self) -> Tensor:
        """The prefix as Hugging Face's loop sees it, and the codes so far: (rows, P + N)."""
        return torch.stack([row.ids for row in self.rows]) if len(self.rows) > 1 else self.rows[0].ids[None]

    @property
    def ended(self) -> bool:
        """Whether no row wants another code."""
        return self.rows[0].drawn == self.sampling.max_new_tokens or all(row.stopped for row in self.rows)

    def draw(self, logits: Tensor) -> Tensor:
        """Draw the next code (rows,) of every row from ``logits`` (rows, V)."""
        codes = self.sampling.draw(self._processors, self.ids, logits, self.generator)
        for i, row in enumerate(self.rows):
            if row.stopped:
                codes[i] = self.stop_code
            row.ids = torch.cat([row.ids, codes[i : i + 1]])
        for row, code in zip(self.rows, codes.tolist(), strict=True):
            row.stopped = code == self.stop_code
        return codes
