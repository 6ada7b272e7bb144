"""Neuron on paper: how fast the graphs of XTTS v2 could be by their bytes and flops. PREDICTED, NOT MEASURED.

    neuron-xtts graphs --lower --json > lowered.json
    python experiments/roofline.py lowered.json

Prints Markdown: the roofline of every graph, the time of a sentence, what bucket plans cost in memory and gain in time.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from neuron_xtts import BucketPlan
from neuron_xtts.buckets import Bucket, Buckets, bucket_name
from neuron_xtts.coqui.constants import (
    CHANNELS,
    CODE_RATE,
    CODES,
    CONDITIONING_LATENTS,
    LAYERS,
    MEL_BANDS,
    OUTPUT_RATE,
    SAMPLES_PER_CODE,
    SAMPLES_PER_FRAME,
    SPEAKER_CHANNELS,
    STREAM_CHUNK,
    seconds_of,
)
from neuron_xtts.graphs.catalogue import CATALOGUE, GRAPHS
from neuron_xtts.tables import markdown

HARDWARE = "https://awsdocs-neuron.readthedocs-hosted.com/en/latest/about-neuron/arch/neuron-hardware"


@dataclass(frozen=True)
class Chip:
    """A chip as AWS documents it, and what of it is one core's: the chip's figure divided by its cores."""

    name: str
    cores: int
    fp32: float  # dense TFLOPS of the chip
    bf16: float
    bandwidth: float  # GB/s of the chip; some AWS pages say GiB/s
    memory: float  # GiB of the chip
    source: str

    def core(self, figure: str) -> float:
        """One core's share of ``fp32``, ``bf16``, ``bandwidth`` or ``memory``."""
        return getattr(self, figure) / self.cores


CHIPS = (
    Chip("inf2, trn1", 2, 47.5, 190, 820, 32, f"{HARDWARE}/inferentia2.html, {HARDWARE}/trainium.html"),
    # Logical cores of two physical ones (LNC=2), the default: 4 to a chip.
    Chip("trn2, LNC=2", 4, 181, 667, 2900, 96, f"{HARDWARE}/trainium2.html"),
)
MICROCODE = 96e6  # bytes for each core of inf2: the same documentation, neuron-runtime/explore/device-memory.html


class Precision(NamedTuple):
    """How matrix products are computed (a rate of `Chip`), and the bytes of a weight in device memory."""

    name: str
    products: str
    weight: int


EXACT = Precision("fp32", "fp32", 4)
STORED = Precision("bf16, weights bf16", "bf16", 2)
PRECISIONS = (EXACT, Precision("bf16, weights fp32", "bf16", 4), STORED)

FP32 = 4  # bytes
HALO = 13  # frames on either side of a vocoder window: neuron_xtts.graphs.vocoder.receptive_field


def cache_bytes(positions: int) -> int:
    """Bytes of the KV cache of a number of positions."""
    return 2 * LAYERS * positions * CHANNELS * FP32  # keys and values, in every precision


def state_bytes(graph: str, bucket: Bucket) -> int:
    """Bytes of the state that a graph keeps on the device."""
    return cache_bytes(bucket[0] * bucket[1]) if graph == "decode" else 0


def moved_bytes(graph: str, bucket: Bucket) -> int:
    """Bytes of a graph's inputs and results, without a state."""
    rows, size = bucket[0], bucket[-1]
    numbers = {
        "prefill": size * CHANNELS + 1 + CHANNELS + CODES,
        "decode": rows * (1 + size + 2 * CHANNELS + CODES),
        "latents": 2 * size * CHANNELS,
        "vocoder": size * (CHANNELS + 1 + SAMPLES_PER_FRAME) + SPEAKER_CHANNELS,
        "conditioning": size * MEL_BANDS + CONDITIONING_LATENTS * CHANNELS,
    }
    return FP32 * numbers[graph] + (cache_bytes(size) if graph == "prefill" else 0)


def flops_by_law(graph: str, bucket: Bucket) -> int | None:
    """Flops of one run of a graph of the transformer; None for other graphs."""
    rows, size, head = bucket[0], bucket[-1], 2 * CHANNELS * CODES
    position = LAYERS * (24 * CHANNELS**2 + 4 * size * CHANNELS)
    laws = {"prefill": size * position + head, "decode": rows * (position + head), "latents": size * position}
    return laws.get(graph)


@dataclass(frozen=True)
class Cost:
    """What one run of a graph costs, in flops and bytes. Weights count as fp32, whatever they are stored as."""

    flops: int
    weights: int
    moved: int
    state: int  # the KV cache, which is read once
    written: int  # of the KV cache: one position of every row, in place

    def traffic(self, precision: Precision) -> float:
        """Bytes that go through memory."""
        return self.weights * precision.weight / FP32 + self.moved + self.state + self.written

    def bounds(self, chip: Chip, precision: Precision) -> tuple[float, float]:
        """Milliseconds of one run on one core, if memory bounds it, and if arithmetic does."""
        by_memory = 1e3 * self.traffic(precision) / (1e9 * chip.core("bandwidth"))
        return by_memory, 1e3 * self.flops / (1e12 * chip.core(precision.products))


class Costs:
    """The costs of the graphs in a file, and, by law, of the transformer in other buckets."""

    def __init__(self, lowered: Sequence[Mapping[str, Any]]) -> None:
        self.flops: dict[tuple[str, Bucket], int] = {}
        self.weights: dict[str, int] = {}
        for line in lowered:
            graph, bucket = line["graph"], tuple(int(size) for size in line["bucket"].split("x"))
            # The lowered program takes the whole state in and gives it out.
            weights = line["bytes"] - moved_bytes(graph, bucket) - 2 * state_bytes(graph, bucket)
            known = self.weights.setdefault(graph, weights), flops_by_law(graph, bucket) or line["flops"]
            if known != (weights, line["flops"]):
                raise SystemExit(f"{graph} {bucket}: weights, flops {weights, line['flops']}; expected {known}")
            self.flops[graph, bucket] = line["flops"]

    def of(self, graph: str, bucket: Bucket) -> Cost:
        """What one run of a graph in one bucket costs."""
        flops = self.flops.get((graph, bucket)) or flops_by_law(graph, bucket)
        if flops is None or graph not in self.weights:
            raise SystemExit(f"not in the file: {graph} {bucket_name(bucket)}")
        state = state_bytes(graph, bucket)
        return Cost(flops, self.weights[graph], moved_bytes(graph, bucket), state, state // bucket[-1])


DEFAULT = BucketPlan.static()
SENTENCES = ((110, 210), (310, 602))  # positions of the prefix, and audio codes, the stop code included


@dataclass(frozen=True)
class Predictor:
    """Predicts the milliseconds of a plan on one core."""

    costs: Costs
    chip: Chip
    plan: BucketPlan
    precision: Precision  # of the transformer; the others stay in fp32, as in the precision "bf16" of neuron_xtts

    def run(self, graph: str, bucket: Bucket) -> float:
        """Milliseconds of one run of a graph."""
        precision = self.precision if CATALOGUE[graph].family == "transformer" else EXACT
        return max(self.costs.of(graph, bucket).bounds(self.chip, precision))

    def decode(self, prefix: int, codes: int, rows: int = 1) -> float:
        """Milliseconds of the decode steps of ``codes`` codes: all but the first, which prefill gives."""
        choose = Buckets(self.plan, {}).choose
        steps = Counter(choose("decode", rows, prefix + step) for step in range(1, codes))
        return sum(number * self.run("decode", bucket) for bucket, number in steps.items())

    def parts(self, prefix: int, codes: int) -> tuple[float, float, float]:
        """Milliseconds of prefill, which gives the first code, of decoding, and of the vocoder."""
        prefill = self.run("prefill", Buckets(self.plan, {}).choose("prefill", prefix))
        vocoder = sum(self.run("vocoder", (size,)) for size in windows(codes, self.plan.vocoder))
        return prefill, self.decode(prefix, codes), vocoder


def windows(codes: int, sizes: Sequence[int]) -> list[int]:
    """The sizes of the windows of a waveform, chosen as ``neuron_xtts.routes.vocoder`` does."""
    frames = codes * SAMPLES_PER_CODE // SAMPLES_PER_FRAME * OUTPUT_RATE // CODE_RATE
    if whole := next((size for size in sizes if size >= frames), None):
        return [whole]  # without a halo
    chosen = []
    while frames > 0:
        chosen.append(next((size for size in sizes if size - 2 * HALO >= frames), sizes[-1]))
        frames -= chosen[-1] - 2 * HALO
    return chosen


def chips() -> str:
    """A table of the chips, with the source of each."""
    rows, figures = [], ("fp32", "bf16", "bandwidth", "memory")
    for chip in CHIPS:
        shares = (f"{chip.core(figure):.4g} of {getattr(chip, figure):g}" for figure in figures)
        rows.append((chip.name, str(chip.cores), *shares, chip.source))
    return markdown(("one core of", "cores", "fp32 TFLOPS", "bf16 TFLOPS", "GB/s", "GiB", "the chip's from"), rows)


def rooflines(costs: Costs, chip: Chip) -> str:
    """A table of every graph of the file and two more, in the precisions that they can have."""
    named = {f"{graph} {bucket_name(bucket)}": costs.of(graph, bucket) for graph, bucket in costs.flops}
    longest = costs.of("decode", (1, 1044))
    named["decode 1x1044, cache copied"] = replace(longest, written=longest.state)
    named["decode 4x512, by law"] = costs.of("decode", (4, 512))
    rows = []
    for name, cost in named.items():
        bounds = [cost.bounds(chip, precision) for precision in PRECISIONS]
        times = [f"{max(bound):.2f} {'m' if bound[0] >= bound[1] else 'a'}" for bound in bounds]
        if name.startswith("conditioning"):
            times[1:] = "-", "-"
        rows.append((name, f"{cost.flops / 1e9:.2f}", f"{cost.traffic(EXACT) / 1e6:.0f}", *times))
    return markdown(("ms", "GFLOP", "MB", *(precision.name for precision in PRECISIONS)), rows)


def sentence_table(costs: Costs, prefix: int, codes: int) -> str:
    """What a sentence takes with the default plan: a table with a row for each chip and precision."""
    rows, seconds = [], seconds_of(codes)
    for chip, precision in product(CHIPS, PRECISIONS):
        predictor = Predictor(costs, chip, DEFAULT, precision)
        parts, first = predictor.parts(prefix, codes), predictor.parts(prefix, STREAM_CHUNK)
        times = (f"{time:.1f}" for time in (*parts, sum(parts)))
        rows.append((chip.name, precision.name, *times, f"{sum(parts) / 1e3 / seconds:.3f}", f"{sum(first):.1f}"))
    header = ("one core", "precision", "prefill ms", "decode ms", "vocoder ms", "sentence ms", "RTF", "TTFA ms")
    return f"{prefix} + {codes}, {seconds:.2f} s of audio, {DEFAULT}.\n\n{markdown(header, rows)}"


FIELDS = ("prefill", "decode", "slots", "latents")  # of a plan, those that differ
FINE = (128, 256, 512, 1044)
PLANS = (
    replace(DEFAULT, prefill=(448,), decode=(1044,)),
    replace(DEFAULT, decode=(1044,)),
    DEFAULT,
    replace(DEFAULT, latents=()),
    replace(DEFAULT, decode=(256, 512, 1044)),
    replace(DEFAULT, prefill=(128, 256, 384, 448)),
    replace(DEFAULT, slots=(1, 4)),
    replace(DEFAULT, prefill=FINE, decode=FINE, latents=FINE, slots=(1, 4)),
)


def memory(plan: BucketPlan, costs: Costs, precision: Precision) -> float:
    """GiB of a plan's weights, one copy a graph, and of its states. Only the transformer is stored in bf16."""
    total = 0.0
    for graph in GRAPHS:
        share = precision.weight / FP32 if CATALOGUE[graph].family == "transformer" else 1
        for cost in (costs.of(graph, bucket) for bucket in plan.buckets(graph)):
            total += cost.weights * share + cost.state
    return total / 2**30


def plan_table(costs: Costs, precision: Precision) -> str:
    """What plans cost and gain: a table with a row for each, on one core of the first chip."""
    rows, limit = [], CHIPS[0].core("memory")
    for plan in PLANS:
        predictor = Predictor(costs, CHIPS[0], plan, precision)
        sizes = [", ".join(map(str, getattr(plan, field))) or "-" for field in FIELDS]
        disk = memory(plan, costs, precision)
        total = disk + MICROCODE / 2**30
        pairs = [[sum(predictor.parts(prefix, n)) for n in (codes, STREAM_CHUNK)] for prefix, codes in SENTENCES]
        times = (f"{whole:.0f} / {first:.1f}" for whole, first in pairs)
        together = 4 if 4 in plan.slots else 1
        four = predictor.decode(*SENTENCES[0], together) / together / (SENTENCES[0][1] - 1)
        rows.append((*sizes, f"{disk:.1f}", f"{total:.1f}", f"{total / limit:.0%}", *times, f"{four:.2f}"))
    sentences = (f"{prefix} + {codes}: ms / TTFA ms" for prefix, codes in SENTENCES)
    return markdown((*FIELDS, "disk GiB", "HBM GiB", f"of {limit:g} GiB", *sentences, "4 texts: ms per code"), rows)


ASSUMPTIONS = f"""\
Nothing here has been run on a device or compiled for one.

* Time = the larger of bytes / bandwidth (m) and flops / peak rate (a): transfers overlap with arithmetic, activations
  stay on the chip, vector and scalar work is free. A lower bound, not an estimate. A core has its share of the chip.
* bf16: products at the bf16 rate; inputs, results and KV cache stay fp32. Whether the compiler stores cast weights in
  bf16 is not documented: hence two columns. MB is with weights in fp32. Conditioning is always in fp32.
* A decode step reads all of the cache in its bucket once and writes one position of each row, in place. "Cache copied"
  is the cache written anew by every step, which is what the lowered program says without aliasing.
* By law: by formulas, which hold exactly for every bucket of the transformer in the file, or this script ends.
* Sentences: prefix positions + codes; vocoder in fp32, conditioning latents known. TTFA: the audio of {STREAM_CHUNK}
  codes.
* Not counted: work of the host, and copies between host and device: keys and values out of prefill, the cache into
  decode, and out and in again when it outgrows its size, {cache_bytes(1) / 1e3:.0f} kB a position.
* Disk: weights of every graph and states, uncompressed. HBM: and {MICROCODE / 1e6:.0f} MB of microcode, but without
  programs, scratchpad, DMA rings, inputs and results.
"""


def main() -> None:
    """Read, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of `neuron-xtts graphs --lower --json`")
    costs = Costs(json.loads(parser.parse_args().file.read_text()))
    print(f"# Neuron on paper: PREDICTED, NOT MEASURED\n\n{ASSUMPTIONS}\n## One core and its chip\n\n{chips()}")
    for chip in CHIPS:
        print(f"\n## Roofline, one core of {chip.name}\n\n{rooflines(costs, chip)}")
    print(f"\n## A sentence\n\n{sentence_table(costs, *SENTENCES[0])}")
    for precision in (EXACT, STORED):
        print(f"\n## Plans, one core of {CHIPS[0].name}, {precision.name}\n\n{plan_table(costs, precision)}")


if __name__ == "__main__":
    main()
