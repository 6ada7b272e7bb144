"""The trunk's linear layers in fp32: as transformers computes them, and as the host backend does.

The 120 weights of XTTS v2's 30 blocks (1.5 GB, far more than any cache), each variant once a round in one process;
figures are medians over the rounds. "read" is a dot product of every weight with itself: what the memory gives.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers.pytorch_utils import Conv1D

from neuron_xtts.backends.host.kernels import linear
from neuron_xtts.coqui.constants import CHANNELS, LAYERS
from neuron_xtts.tables import table

SHAPES = ((CHANNELS, 3 * CHANNELS), (CHANNELS, CHANNELS), (CHANNELS, 4 * CHANNELS), (4 * CHANNELS, CHANNELS))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 70, 170])
    arguments = parser.parse_args()

    modules = [Conv1D(outputs, inputs).requires_grad_(False) for _ in range(LAYERS) for inputs, outputs in SHAPES]
    size = sum(module.weight.numel() for module in modules) * 4

    def read(module: Conv1D, x: torch.Tensor) -> torch.Tensor:
        return torch.dot(module.weight.view(-1), module.weight.view(-1))

    variants: dict[str, Callable[[Conv1D, torch.Tensor], torch.Tensor]] = {
        "transformers": lambda module, x: module(x),
        "neuron_xtts": linear,
        "read": read,
    }
    rows = []
    for count in arguments.rows:
        inputs = [torch.randn(count, 1, module.weight.shape[0]) for module in modules]
        samples: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(arguments.rounds + 1):
            for name, apply in variants.items():
                start = time.perf_counter()
                for module, x in zip(modules, inputs, strict=True):
                    apply(module, x)
                samples[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(taken[1:]) for name, taken in samples.items()}
        cells = [f"{1e3 * seconds:.1f} ms, {size / seconds / 1e9:.1f} GB/s" for seconds in medians.values()]
        rows.append((str(count), *cells, f"{medians['transformers'] / medians['neuron_xtts']:.2f}x"))
    print(table(("rows", *variants, "faster"), rows))


if __name__ == "__main__":
    main()
