"""What a patch without graphs adds to a routed call: the median difference over calls of 2 ms, in turns."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import neuron_xtts
from neuron_xtts import BucketPlan
from neuron_xtts.tools.bench import Subject


def overhead(rounds: int) -> float:
    """Seconds that a call which falls back takes longer than an unpatched one."""
    xtts, voice = Subject(small=True).prepare()
    x = torch.randn(1, 1, 64)
    differences = []
    with torch.inference_mode():
        for _ in range(rounds):
            start = time.perf_counter()
            xtts.hifigan_decoder(x, g=voice[1])
            plain = time.perf_counter() - start
            neuron_xtts.patch(xtts, buckets=BucketPlan.none())
            xtts.hifigan_decoder(x, g=voice[1])  # the first fallback is logged
            start = time.perf_counter()
            xtts.hifigan_decoder(x, g=voice[1])
            differences.append(time.perf_counter() - start - plain)
            neuron_xtts.unpatch(xtts)
    return statistics.median(differences)


def main() -> None:
    """Measure and print a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300, help="one call of each a round (default: 300)")
    arguments = parser.parse_args()
    print(f"a patch without graphs: {1e6 * overhead(arguments.rounds):.0f} us a call")


if __name__ == "__main__":
    main()
