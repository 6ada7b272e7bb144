"""Whether compiled graphs compute what the same graphs compute on the host: each by itself, and one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from neuron_xtts.backends import DecodeState
from neuron_xtts.buckets import Bucket, bucket_name
from neuron_xtts.graphs.codes import Codes
from neuron_xtts.graphs.operators import Graph, Stateful, states_of
from neuron_xtts.graphs.transformer import Decode, KeysAndValues
from neuron_xtts.precision import Tolerance


class Compiled(Protocol):
    """A compiled graph on a device; its state, if it has one, can be read and written."""

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Run it; what it returns first are its outputs."""

    def write(self, contents: Sequence[Tensor]) -> None:
        """Replace the state."""

    def read(self) -> list[Tensor]:
        """The state, on the host."""


@dataclass(frozen=True)
class Deviation:
    """How far results of a compiled graph are from the host's, the worst of them.

    Attributes:
        part: which results.
        error: largest difference, as a share of the largest value of that output; infinite if it is not finite.
        pcc: smallest Pearson correlation.
    """

    part: str
    error: float
    pcc: float

    @classmethod
    def of(cls, part: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Deviation:
        """Of outputs, or states, from those of the host."""
        found = [_difference(a, b) for a, b in zip(ours, theirs, strict=True)]
        return cls(part, max(error for error, _ in found), min(pcc for _, pcc in found))

    def beyond(self, tolerance: Tolerance) -> str | None:
        """Why this is too much; None if it is not."""
        if self.error <= tolerance.error and self.pcc >= tolerance.pcc:
            return None
        return (
            f"wrong results {self.part}: error {self.error:.1e} and correlation {self.pcc:.5f} against the host, "
            f"where {tolerance.error:.1e} and {tolerance.pcc} are the limits"
        )


@torch.no_grad()
def deviations(compiled: Compiled, graph: Graph, sizes: Bucket) -> Iterator[Deviation]:
    """Run a compiled graph and the same graph on the host on the same random inputs.

    A state is written twice, and only after a call, as later processes do, which warm up first; calls follow each other
    without a write, as steps of a sentence do.

    Args:
        compiled: the compiled graph.
        graph: the same graph, as `make_graphs` makes it.
        sizes: as `Graph.in_bucket` takes them.
    """
    module = graph.in_bucket(*sizes)
    state = states_of(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        calls = [list(inputs.values()) for inputs in graph.examples(*sizes)]
        contents = [[torch.randn_like(tensor) for tensor in state] for _ in range(2)]

    def deviation(part: str, inputs: Sequence[Tensor]) -> Deviation:
        ours = compiled(*inputs)
        theirs = module.expected(inputs, ours) if isinstance(module, Stateful) else module(*inputs)
        outputs = len(theirs) - len(state)
        for tensor, new in zip(state, theirs[outputs:], strict=True):
            tensor.copy_(new)
        return Deviation.of(part, ours[:outputs], theirs[:outputs])

    if not state:
        for number, inputs in enumerate(calls, 1):
            yield deviation(f"in call {number}", inputs)
        return
    compiled(*calls[0])
    for when, written, ordered in (("first", contents[0], calls), ("second", contents[1], calls[::-1])):
        compiled.write(written)
        for tensor, content in zip(state, written, strict=True):
            tensor.copy_(content)
        for number, inputs in enumerate(ordered, 1):
            yield deviation(f"in call {number} after the {when} write of its state", inputs)
        yield Deviation.of(f"in its state, calls after the {when} write", compiled.read(), state)


@torch.no_grad()
def rehearsal(
    state: DecodeState,
    graph: Decode | Codes,
    steps: int,
    buckets: Sequence[Bucket],
    handed_over: KeysAndValues,
    known: KeysAndValues,
    length: int,
) -> Iterator[Deviation]:
    """Decode from bucket to bucket, as calls do, and on the host beside it: how far each step is off.

    Args:
        state: of the first bucket, empty.
        graph: that decodes, on the host.
        steps: codes that one call of it decodes.
        buckets: of decode, one after another; each has at least the slots and positions of the one before.
        handed_over: keys and values that the compiled prefill made.
        known: those that the host makes, (1, H, L, K).
        length: positions of both that are filled.
    """
    theirs = [torch.zeros(shape) for shape in graph.trunk.cache_shapes(*buckets[-1])]
    part = "in a step on what prefill handed over"
    positions: list[int] = []
    for slots, width in buckets:
        if positions:
            state.grow(slots, width, positions)
        for slot in range(len(positions), slots):
            state.fill(slot, handed_over, length)
            for tensor, row in zip(theirs, known.together(), strict=True):
                tensor[slot, :, :length] = row[0, :, :length]
            positions.append(length)
        given = graph.given(slots, steps)
        ours = state.step(given, range(slots), positions, width)
        expected = graph.expected(
            graph.arrange(given, range(slots), positions, width), ours, [tensor[:slots, :, :width] for tensor in theirs]
        )
        yield Deviation.of(part, ours, expected)
        part = f"in a step after the switch from decode {bucket_name((slots, width))}"
        positions = [position + steps for position in positions]


def _difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Relative error and Pearson correlation of two tensors; whole numbers are right or wrong."""
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return float("inf"), 0.0
    if torch.equal(ours, theirs):
        return 0.0, 1.0  # correlation is not defined where all are the same
    if not ours.is_floating_point():
        return float("inf"), 0.0
    a, b = ours.double(), theirs.double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)), correlation(a, b)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of two tensors."""
    a, b = a.double().flatten(), b.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-30))
