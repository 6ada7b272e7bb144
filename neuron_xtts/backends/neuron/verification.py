"""Whether a compiled graph computes what the same graph computes on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_xtts.buckets import Bucket
from neuron_xtts.graphs.operators import Graph
from neuron_xtts.precision import Tolerance

Run = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Deviation:
    """How far the outputs of a compiled graph are from the host's, the worst of them.

    Attributes:
        error: largest difference, as a share of the largest value of that output; infinite if it is not finite.
        pcc: smallest Pearson correlation.
    """

    error: float
    pcc: float

    def beyond(self, tolerance: Tolerance) -> str | None:
        """Why this is too much; None if it is not."""
        if self.error <= tolerance.error and self.pcc >= tolerance.pcc:
            return None
        return (
            f"wrong results: error {self.error:.1e} and correlation {self.pcc:.5f} against the host, "
            f"where {tolerance.error:.1e} and {tolerance.pcc} are the limits"
        )


@torch.no_grad()
def deviation(run: Run, graph: Graph, bucket: Bucket) -> Deviation:
    """Run a compiled graph and the same graph on the host on the same random inputs.

    Args:
        run: the compiled graph, given inputs and the contents of its state; returns its outputs, then the new state.
        graph: the same graph, as `make_graphs` makes it.
        bucket: its sizes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs, contents = graph.example(*bucket), graph.example_state(*bucket)
    outputs = run(list(inputs.values()), contents)
    state = [tensor.clone() for tensor in contents]
    expected = [*graph(*inputs.values(), *state), *state]
    found = [_difference(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True)]
    return Deviation(max(error for error, _ in found), min(pcc for _, pcc in found))


def _difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Relative error and Pearson correlation of two tensors."""
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return float("inf"), 0.0
    a, b = ours.double(), theirs.double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)), correlation(a, b)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of two tensors."""
    a, b = a.double().flatten(), b.double().flatten()
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-30))
