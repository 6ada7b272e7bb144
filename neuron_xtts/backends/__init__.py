"""Backends: where graphs are compiled and run. They know graphs, never routes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from neuron_xtts.buckets import Bucket, BucketPlan
from neuron_xtts.graphs.transformer import KeysAndValues

Exclusive = Callable[[], AbstractContextManager[object]]


class DecodeState(Protocol):
    """The decode graph and its state: keys and values of the positions decoded so far."""

    @property
    def capacity(self) -> int:
        """How many positions it holds per slot."""

    def fill(self, slot: int, cache: KeysAndValues, length: int) -> None:
        """Write the first ``length`` positions of prefill's keys and values (1, H, L, K) into a slot."""

    def grow(self, slots: int, capacity: int, positions: Sequence[int]) -> None:
        """Hold at least as many slots and positions as a bucket has, from now on.

        Args:
            slots: of the bucket.
            capacity: its positions.
            positions: of every slot, how many of them are kept.
        """

    def lift(self, slot: int, length: int) -> Any:
        """The first ``length`` positions of a slot, as they are; for `put`."""

    def put(self, slot: int, lifted: Any, length: int) -> None:
        """Write what was lifted into a slot, bit for bit."""

    def clear(self, slot: int, length: int) -> None:
        """Put zeros into the first ``length`` positions of a slot."""

    def step(
        self, given: Sequence[Tensor], slots: Sequence[int], positions: Sequence[int], width: int
    ) -> tuple[Tensor, ...]:
        """Run the graph that decodes for some rows; the others stay as they are.

        Args:
            given: of R rows, all that it takes but positions: of ``decode`` the embeds (R, 1, D) of their latest codes,
                of ``codes`` what `Codes.forward` says.
            slots: of these rows.
            positions: of every slot, that its next step writes; 0 where there is no row.
            width: positions that the step may see.

        Returns:
            its outputs for these rows: of ``decode`` latents (R, D) and logits (R, V).
        """

    def cached(self, slot: int, length: int) -> KeysAndValues:
        """The first ``length`` keys and values (H, length, K) of a slot."""


class Backend(Protocol):
    """Runs graphs.

    Attributes:
        name: as in ``patch(backend=...)``.
        where: the one of its kind that runs the graphs, for people.
        precision: of the graphs, by name.
        plan: the buckets.
        unavailable: why a bucket of the plan is not to be had, by graph and bucket. It may grow.
        over_host: why caches do not move on the device, from graph to graph; None if they do, or there is none.
    """

    name: str
    where: str
    precision: str
    plan: BucketPlan
    unavailable: dict[tuple[str, Bucket], str]
    over_host: str | None

    @property
    def copied(self) -> int:
        """Bytes of weights that it keeps in the host's memory beside the model's."""

    def check(self, graph: str, exclusive: Exclusive = nullcontext) -> None:
        """Raise `Fallback` if the graph would not compute what the model computes now.

        Args:
            graph: its name.
            exclusive: what is entered before anything that may be in use is changed.
        """

    def run(self, graph: str, bucket: Bucket, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Run a graph other than decode on inputs that fill a bucket."""

    def close(self) -> None:
        """Leave the model's weights as they were found."""

    def unload(self) -> None:
        """Let go of what graphs take of a device; whatever still runs there falls back."""

    def new_state(self, slots: int, capacity: int) -> DecodeState:
        """The decode graph with an empty state; ``slots`` and ``capacity``, in positions, are a bucket."""
