"""Backends: where graphs are compiled and run. They know graphs, never routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from neuron_xtts.buckets import Bucket, BucketPlan


class DecodeState(Protocol):
    """The decode graph and its state: keys and values of the positions decoded so far."""

    @property
    def positions(self) -> int:
        """How many positions it holds per row."""

    def fill(self, row: int, keys_and_values: Sequence[Tensor], length: int) -> None:
        """Write the first ``length`` positions of prefill's (1, H, L, K) keys and values into ``row``."""

    def grow(self, positions: int) -> None:
        """Hold at least ``positions``, those of a bucket, from now on, keeping what is there."""

    def step(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run one decode step; ``mask`` is as wide as the part of the state that the step may see."""

    def prefix(self, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """The first ``length`` keys and values (H, length, K) of ``row``, block by block."""


class Backend(Protocol):
    """Runs graphs.

    Attributes:
        name: as in ``patch(backend=...)``.
        precision: of the graphs, by name.
        plan: the buckets.
        missing: why a bucket of the plan is not to be had, by graph and bucket. It may grow.
        copied: bytes of weights that it keeps in the host's memory beside the model's.
    """

    name: str
    precision: str
    plan: BucketPlan
    missing: dict[tuple[str, Bucket], str]

    @property
    def copied(self) -> int:
        """As above."""

    def check(self, graph: str) -> None:
        """Raise `Fallback` if the graph would not compute what the model computes now."""

    def run(self, graph: str, bucket: Bucket, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Run a graph other than decode on inputs that fill a bucket."""

    def close(self) -> None:
        """Leave the model's weights as they were found."""

    def new_state(self, rows: int, positions: int) -> DecodeState:
        """The decode graph with an empty state; ``rows`` and ``positions`` are a bucket."""
