"""Where the time of one code goes: coqui-tts, and the host's precisions, at full size with random weights.

The operators of 40 codes in the middle of a sentence, as torch.profiler times them, sorted into kinds; "rest" is what
is left of the time of a code without the profiler: Python, dispatch, and whatever the profiler does not see. The
profiler makes small operators look slower than they are, and the rest smaller.
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
from neuron_xtts.benchmarks import PLAIN, prepare
from neuron_xtts.demo import SENTENCES
from neuron_xtts.precision import HOST_PRECISIONS
from neuron_xtts.report import table

KINDS = ("linear layers", "attention", "norms, GELU, sums", "copies and views", "sampling, embedding")
PROFILED = 40

_LINEAR = {"addmm", "mm", "_linear_pointwise", "linear_dynamic", "linear_dynamic_fp16"}
_ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu", "cat", "mul_"}
_SMALL = {"native_layer_norm", "layer_norm", "gelu", "add", "mul", "tanh", "pow", "sum"}
_VIEWS = {
    "view", "as_strided", "select", "slice", "narrow", "transpose", "permute", "unbind", "reshape", "empty", "copy_",
    "empty_like", "empty_strided", "split", "split_with_sizes", "expand", "clone", "contiguous", "to", "_to_copy",
}  # fmt: skip


def kind(name: str, shapes: list[list[int]], heads: int) -> str:
    """The kind of an operator; products are told apart by the heads of the first factor and the width of tables."""
    name = name.rpartition("::")[2]
    first: list[int] = shapes[0] if shapes else []
    if name in ("bmm", "baddbmm", "_softmax", "softmax") and first and first[0] == heads:
        return "attention"
    if name.endswith(("embedding_bag", "embedding_bag_forward_only")):
        return "attention" if first and first[1] < 256 else "linear layers"
    if name in _LINEAR or name in ("bmm", "baddbmm"):
        return "linear layers"
    if name in _ATTENTION:
        return "attention"
    if name in _SMALL:
        return "norms, GELU, sums"
    return "copies and views" if name in _VIEWS else "sampling, embedding"


def codes(xtts: Any, voice: tuple[Any, Any], count: int, tick: Callable[[], None]) -> None:
    """Make ``count`` codes; ``tick`` comes with each."""
    hook = xtts.gpt.mel_embedding.register_forward_hook(lambda *_: tick())
    torch.manual_seed(count)
    try:
        xtts.inference(SENTENCES[0], "en", *voice, min_new_tokens=count, max_new_tokens=count)
    finally:
        hook.remove()


def measure(xtts: Any, voice: tuple[Any, Any], count: int) -> dict[str, float]:
    """Milliseconds of a code by kind, and all of it."""
    ticks: list[float] = []
    codes(xtts, voice, count, lambda: ticks.append(time.perf_counter()))
    first, last = 2 + (count - PROFILED) // 2, 2 + (count + PROFILED) // 2
    whole = statistics.median(b - a for a, b in itertools.pairwise(ticks[first : last + 1]))
    profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
    ticked = itertools.count()

    def tick() -> None:
        number = next(ticked)
        if number == first:
            profiler.start()
        elif number == last:
            profiler.stop()

    codes(xtts, voice, count, tick)
    found: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        found[kind(event.key, event.input_shapes, xtts.gpt.heads)] += event.self_cpu_time_total / 1e3 / PROFILED
    return {**{name: found[name] for name in KINDS}, "rest": 1e3 * whole - found.total(), "one code": 1e3 * whole}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="in turns; the table has medians (default: 3)")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    xtts, voice = prepare(None, arguments.small)
    samples: dict[str, list[dict[str, float]]] = {variant: [] for variant in (PLAIN, *HOST_PRECISIONS)}
    for _ in range(arguments.rounds):
        for variant, taken in samples.items():
            if variant != PLAIN:
                neuron_xtts.patch(xtts, precision=variant, backend="cpu")
            codes(xtts, voice, 4, lambda: None)
            taken.append(measure(xtts, voice, arguments.codes))
            neuron_xtts.unpatch(xtts)
    rows = []
    for name in (*KINDS, "rest", "one code"):
        medians = (statistics.median(sample[name] for sample in taken) for taken in samples.values())
        rows.append((name, *(f"{milliseconds:.2f}" for milliseconds in medians)))
    print(table((f"ms, around code {arguments.codes // 2}", *samples), rows))


if __name__ == "__main__":
    main()
