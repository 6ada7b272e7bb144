"""Moving a KV cache into another on the device: from prefill's into a slot, or into a cache of a larger bucket."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuron_xtts.graphs.operators import Graph, Stateful


class Move(Graph):
    """Rows of one cache put into another, which has at least as many rows and positions.

    Args:
        shapes: (B, H, S, K) of every tensor of a cache; B and S are those of a bucket.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.tensors, (_, self.heads, _, self.head_channels) = len(shapes), shapes[0]

    def extra_repr(self) -> str:
        """What no weights say."""
        return f"tensors={self.tensors}, heads={self.heads}, head_channels={self.head_channels}"

    def forward(self, taken: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """One tensor of the target's new contents.

        Args:
            taken: (B,) 1 for each row of the target that takes one of the source, 0 for each that stays as it is.
            source: (A, H, R, K). Of one row, every row of the target that takes any takes this one; else its own.
            target: (B, H, S, K).

        Returns:
            (B, H, S, K): beyond the source's positions and rows, what is taken is zero.
        """
        rows = 0 if source.shape[0] == 1 else target.shape[0] - source.shape[0]
        padded = F.pad(source, (0, 0, 0, target.shape[2] - source.shape[2], 0, 0, 0, rows))
        return torch.where(taken.view(-1, 1, 1, 1).bool(), padded, target)

    def example(self, *bucket: int) -> dict[str, Tensor]:
        """Which rows are taken, by name: all."""
        _, _, rows, _ = bucket
        return {"taken": torch.ones(rows)}

    def examples(self, *bucket: int) -> list[dict[str, Tensor]]:
        """Inputs by name: all, none, and the last one."""
        _, _, rows, _ = bucket
        return [{"taken": taken} for taken in (torch.ones(rows), torch.zeros(rows), torch.eye(rows)[-1])]

    def in_bucket(self, *bucket: int) -> nn.Module:
        """From so many rows and positions to so many."""
        return StatefulMove(self, *bucket)


class StatefulMove(Stateful):
    """`Move` with both caches as parameters: all of the source, then all of the target.

    Args:
        move: the graph.
        rows: of the source, A.
        positions: of the source, R.
        more_rows: of the target, B.
        more_positions: of the target, S.
    """

    outputs = 1

    def __init__(self, move: Move, rows: int, positions: int, more_rows: int, more_positions: int) -> None:
        source = (rows, move.heads, positions, move.head_channels)
        target = (more_rows, move.heads, more_positions, move.head_channels)
        super().__init__([*move.tensors * [source], *move.tensors * [target]])
        self.move = move

    def forward(self, taken: Tensor) -> tuple[Tensor, ...]:
        """Move; returns ``taken``, which on the host says that it is done, then both caches."""
        states = list(self.states)
        sources, targets = states[: self.move.tensors], states[self.move.tensors :]
        moved = (self.move(taken, *pair) for pair in zip(sources, targets, strict=True))
        return taken.clone(), *(source.clone() for source in sources), *moved
