"""Where the time of one code goes: coqui-tts, and the host's precisions, at full size with random weights.

The operators of 40 codes in the middle of a sentence, as torch.profiler times them. What the profiler itself takes is
told by the 40 codes before, and taken off every operator alike. "everything else" is what is left of the time of a
code: norms, activations, sums, copies, sampling, dispatch and Python, of which the profiler makes too much.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import neuron_xtts
from neuron_xtts.coqui.models import SENTENCES
from neuron_xtts.precision import HOST_PRECISIONS
from neuron_xtts.tables import table
from neuron_xtts.tools.bench import PLAIN, Subject, Voice

KINDS = ("linear layers", "attention")
PROFILED = 40

_LINEAR = {"addmm", "mm", "_linear_pointwise", "linear_dynamic", "linear_dynamic_fp16"}
_ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu", "cat"}


def kind(name: str, shapes: list[list[int]], heads: int) -> str:
    """The kind of an operator; products are told apart by the width of tables."""
    name = name.rpartition("::")[2]
    first: list[int] = shapes[0] if shapes else []
    if name in _ATTENTION or (name == "_softmax" and first and first[0] == heads):
        return "attention"
    if name.endswith(("embedding_bag", "embedding_bag_forward_only")):
        return "attention" if first and first[1] < 256 else "linear layers"
    return "linear layers" if name in _LINEAR else ""


def codes(xtts: Any, voice: Voice, count: int, tick: Callable[[], None]) -> None:
    """Make ``count`` codes; ``tick`` comes with each."""
    hook = xtts.gpt.mel_embedding.register_forward_hook(lambda *_: tick())
    torch.manual_seed(count)
    try:
        xtts.inference(SENTENCES[0], "en", *voice, min_new_tokens=count, max_new_tokens=count)
    finally:
        hook.remove()


def measure(xtts: Any, voice: Voice, count: int) -> dict[str, float]:
    """Milliseconds that one of ``count`` codes takes: by kind of operator, and altogether."""
    middle = 2 + count // 2
    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    ticks: list[float] = []

    def tick() -> None:
        if len(ticks) == middle:
            profiler.start()
        ticks.append(time.perf_counter())
        if len(ticks) == middle + PROFILED + 1:
            profiler.stop()

    codes(xtts, voice, count, tick)
    spans = [b - a for a, b in itertools.pairwise(ticks)]
    whole = 1e3 * statistics.median(spans[middle - PROFILED : middle])
    profiled = 1e3 * statistics.median(spans[middle : middle + PROFILED])
    found: Counter[str] = Counter()
    events: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        name = kind(event.key, event.input_shapes, xtts.gpt.heads)
        found[name] += event.self_cpu_time_total / 1e3 / PROFILED
        events[name] += event.count / PROFILED
    overhead = max(profiled - whole, 0) / events.total()
    parts = {name: found[name] - overhead * events[name] for name in KINDS}
    return {**parts, "everything else": whole - sum(parts.values()), "one code": whole}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="in turns; the table has medians (default: 3)")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    if arguments.codes < 2 * PROFILED + 10:
        parser.error(
            f"--codes {arguments.codes} leaves no room for {PROFILED} codes without profiler and as many with it"
        )
    transformers.logging.set_verbosity_error()
    xtts, voice = Subject(small=arguments.small).prepare()
    samples: dict[str, list[dict[str, float]]] = {variant: [] for variant in (PLAIN, *HOST_PRECISIONS)}
    for _ in range(arguments.rounds):
        for variant, taken in samples.items():
            if variant != PLAIN:
                neuron_xtts.patch(xtts, precision=variant, backend="cpu")
            codes(xtts, voice, 4, lambda: None)
            taken.append(measure(xtts, voice, arguments.codes))
            neuron_xtts.unpatch(xtts)
    rows = []
    for name in (*KINDS, "everything else", "one code"):
        medians = (statistics.median(sample[name] for sample in taken) for taken in samples.values())
        rows.append((name, *(f"{milliseconds:.2f}" for milliseconds in medians)))
    print(table((f"ms, around code {arguments.codes // 2 + PROFILED // 2}", *samples), rows))


if __name__ == "__main__":
    main()
