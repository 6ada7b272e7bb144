"""Neuron on paper: how fast the graphs could be by their bytes and flops. PREDICTED, NOT MEASURED.

    neuron-xtts graphs --lower --json > lowered.json
    python bench/roofline.py lowered.json

Prints Markdown: the roofline of every graph, the time of a sentence, and what bucket plans cost in memory and gain in
time. For XTTS v2 in full size.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neuron_xtts import BucketPlan
from neuron_xtts.buckets import Bucket, Buckets, bucket_name
from neuron_xtts.precision import GRAPHS, TRANSFORMER_GRAPHS

DOCS = "https://awsdocs-neuron.readthedocs-hosted.com/en/latest"
HARDWARE = f"{DOCS}/about-neuron/arch/neuron-hardware"


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
MICROCODE = 96e6  # bytes for each core of inf2: DOCS/neuron-runtime/explore/device-memory.html


@dataclass(frozen=True)
class Precision:
    """How matrix products are computed (a rate of `Chip`), and the bytes of a weight in device memory."""

    name: str
    products: str
    weight: int


EXACT = Precision("fp32", "fp32", 4)
STORED = Precision("bf16, weights bf16", "bf16", 2)
PRECISIONS = (EXACT, Precision("bf16, weights fp32", "bf16", 4), STORED)

# XTTS v2.
FP32 = 4  # bytes
LAYERS, CHANNELS, CODES, SPEAKER, MELS, LATENTS = 30, 1024, 1026, 512, 80, 32
SAMPLES_PER_CODE, CODE_RATE, SAMPLES_PER_FRAME, OUTPUT_RATE = 1024, 22050, 256, 24000
HALO = 13  # frames on either side of a vocoder window: neuron_xtts.graphs.vocoder.receptive_field


def cache_bytes(positions: int) -> int:
    """Of keys and values, in every precision."""
    return 2 * LAYERS * positions * CHANNELS * FP32


def flops_by_law(graph: str, bucket: Bucket) -> int | None:
    """Of a graph of the transformer; None for others."""

    def trunk(rows: int, context: int) -> int:
        return rows * LAYERS * (24 * CHANNELS**2 + 4 * context * CHANNELS)

    head = 2 * CHANNELS * CODES
    if graph == "decode":
        return bucket[0] * (trunk(1, bucket[1]) + head)
    laws = {"prefill": trunk(bucket[0], bucket[0]) + head, "latents": trunk(bucket[0], bucket[0])}
    return laws.get(graph)


def moved_bytes(graph: str, bucket: Bucket) -> int:
    """Of inputs and results, without a state."""
    size = bucket[-1]
    if graph == "decode":
        return FP32 * bucket[0] * (1 + size + 2 * CHANNELS + CODES)
    if graph == "prefill":
        return FP32 * (size * CHANNELS + 1 + CHANNELS + CODES) + cache_bytes(size)
    numbers = {
        "latents": 2 * size * CHANNELS,
        "vocoder": size * (CHANNELS + 1 + SAMPLES_PER_FRAME) + SPEAKER,
        "conditioning": size * MELS + LATENTS * CHANNELS,
    }
    return FP32 * numbers[graph]


@dataclass(frozen=True)
class Cost:
    """What one run of a graph costs.

    Attributes:
        flops: of products and convolutions.
        weights: bytes in fp32, whatever they are stored as.
        moved: bytes of inputs and results.
        state: bytes of the KV cache, which is read once.
        written: bytes of the KV cache that are written: one position of every row, in place.
    """

    flops: int
    weights: int
    moved: int
    state: int
    written: int

    def traffic(self, precision: Precision) -> float:
        """Bytes through memory."""
        return self.weights * precision.weight / FP32 + self.moved + self.state + self.written

    def bounds(self, chip: Chip, precision: Precision) -> tuple[float, float]:
        """Milliseconds on one core: by memory, and by arithmetic."""
        by_memory = 1e3 * self.traffic(precision) / (1e9 * chip.core("bandwidth"))
        return by_memory, 1e3 * self.flops / (1e12 * chip.core(precision.products))

    def mark(self, chip: Chip, precision: Precision) -> str:
        """The longer time, and which it is."""
        by_memory, by_arithmetic = self.bounds(chip, precision)
        return f"{by_memory:.2f} m" if by_memory >= by_arithmetic else f"{by_arithmetic:.2f} a"


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
                raise SystemExit(f"{graph} {line['bucket']} has {weights}, {line['flops']} weights, flops: not {known}")
            self.flops[graph, bucket] = line["flops"]
        if absent := GRAPHS - self.weights.keys():
            raise SystemExit(f"not in the file: {', '.join(sorted(absent))}")

    def of(self, graph: str, bucket: Bucket) -> Cost:
        """The cost in one bucket."""
        flops = self.flops.get((graph, bucket)) or flops_by_law(graph, bucket)
        if flops is None:
            raise SystemExit(f"not in the file: {graph} {bucket_name(bucket)}")
        state = state_bytes(graph, bucket)
        return Cost(flops, self.weights[graph], moved_bytes(graph, bucket), state, state // bucket[-1])


def state_bytes(graph: str, bucket: Bucket) -> int:
    return cache_bytes(bucket[0] * bucket[1]) if graph == "decode" else 0


@dataclass(frozen=True)
class Sentence:
    """Positions of the prefix, and the audio codes that follow, the stop code included."""

    prefix: int
    codes: int


SENTENCES = (Sentence(110, 210), Sentence(310, 602))
FIRST_CHUNK = 20  # codes, coqui-tts's default for streams


@dataclass(frozen=True)
class Predictor:
    """Predicts the milliseconds of a plan on one core."""

    costs: Costs
    chip: Chip
    plan: BucketPlan
    precision: Precision  # of the transformer; the others stay in fp32, as in the precision "bf16" of neuron_xtts

    def run(self, graph: str, bucket: Bucket) -> float:
        """One run of a graph."""
        precision = self.precision if graph in TRANSFORMER_GRAPHS else EXACT
        return max(self.costs.of(graph, bucket).bounds(self.chip, precision))

    def prefill(self, sentence: Sentence) -> float:
        """The prefix; it gives the first code, too."""
        return self.run("prefill", Buckets(self.plan, {}).choose("prefill", sentence.prefix))

    def decode(self, sentence: Sentence, codes: int, rows: int = 1) -> float:
        """The steps up to ``codes``: all but the first."""
        choose = Buckets(self.plan, {}).choose
        steps = Counter(choose("decode", rows, sentence.prefix + step) for step in range(1, codes))
        return sum(number * self.run("decode", bucket) for bucket, number in steps.items())

    def vocoder(self, codes: int) -> float:
        """All windows."""
        frames = codes * SAMPLES_PER_CODE // SAMPLES_PER_FRAME * OUTPUT_RATE // CODE_RATE
        return sum(self.run("vocoder", (size,)) for size in windows(frames, self.plan.vocoder))

    def sentence(self, sentence: Sentence, codes: int) -> float:
        """Up to the audio of the first ``codes``."""
        return self.prefill(sentence) + self.decode(sentence, codes) + self.vocoder(codes)

    def per_code(self, sentence: Sentence, rows: int) -> float:
        """Decoding ``rows`` such sentences, by code: together if the plan can, or one by one."""
        together = rows if rows <= max(self.plan.slots) else 1
        return self.decode(sentence, sentence.codes, together) / together / (sentence.codes - 1)


def windows(frames: int, sizes: Sequence[int]) -> list[int]:
    """The sizes of a waveform's windows, chosen as ``neuron_xtts.routes.vocoder`` does."""
    if whole := next((size for size in sizes if size >= frames), None):
        return [whole]  # without a halo
    chosen = []
    while frames > 0:
        chosen.append(next((size for size in sizes if size - 2 * HALO >= frames), sizes[-1]))
        frames -= chosen[-1] - 2 * HALO
    return chosen


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def chips() -> str:
    """The constants, with their source."""
    figures = ("fp32", "bf16", "bandwidth", "memory")
    rows = []
    for chip in CHIPS:
        shares = (f"{chip.core(figure):.4g}" for figure in figures)
        rows.append((chip.name, *shares, ", ".join(f"{getattr(chip, f):g}" for f in figures), str(chip.cores)))
    header = ("one core of", "fp32 TFLOPS", "bf16 TFLOPS", "GB/s", "GiB", "the same of the chip", "cores of the chip")
    return "\n\n".join([table(header, rows), *(f"{chip.name}: {chip.source}" for chip in CHIPS)])


def rooflines(costs: Costs, chip: Chip) -> str:
    """Every graph of the file and two more, in every precision that it can have."""
    listed = [(f"{graph} {bucket_name(bucket)}", costs.of(graph, bucket)) for graph, bucket in costs.flops]
    longest = costs.of("decode", (1, 1044))
    listed.append(("decode 1x1044, cache copied", replace(longest, written=longest.state)))
    listed.append(("decode 4x512, by law", costs.of("decode", (4, 512))))
    rows = []
    for name, cost in listed:
        times = [cost.mark(chip, precision) for precision in PRECISIONS]
        if name.startswith("conditioning"):  # always in fp32
            times[1:] = ["-"] * len(times[1:])
        rows.append((name, f"{cost.flops / 1e9:.2f}", f"{cost.traffic(EXACT) / 1e6:.0f}", *times))
    return table(("ms", "GFLOP", "MB", *(precision.name for precision in PRECISIONS)), rows)


def sentence_table(costs: Costs, sentence: Sentence) -> str:
    """A row for each chip and precision, with the default plan."""
    rows = []
    seconds = sentence.codes * SAMPLES_PER_CODE / CODE_RATE
    for chip in CHIPS:
        for precision in PRECISIONS:
            p = Predictor(costs, chip, BucketPlan.static(), precision)
            parts = p.prefill(sentence), p.decode(sentence, sentence.codes), p.vocoder(sentence.codes)
            first = p.sentence(sentence, FIRST_CHUNK)
            times = (f"{time:.1f}" for time in (*parts, sum(parts)))
            rows.append((chip.name, precision.name, *times, f"{sum(parts) / 1e3 / seconds:.3f}", f"{first:.1f}"))
    header = ("one core", "precision", "prefill ms", "decode ms", "vocoder ms", "sentence ms", "RTF", "TTFA ms")
    return f"{seconds:.2f} s of audio, {BucketPlan.static()}.\n\n{table(header, rows)}"


def plans() -> Iterator[BucketPlan]:
    """The plans to compare."""
    lengths = (128, 256, 512, 1044)
    yield replace(BucketPlan.static(), prefill=(448,), decode=(1044,))
    yield replace(BucketPlan.static(), decode=(1044,))
    yield BucketPlan.static()
    yield replace(BucketPlan.static(), latents=())
    yield replace(BucketPlan.static(), decode=(256, 512, 1044))
    yield replace(BucketPlan.static(), prefill=(128, 256, 384, 448))
    yield replace(BucketPlan.static(), slots=(1, 4))
    yield replace(BucketPlan.static(), prefill=lengths, decode=lengths, latents=lengths, slots=(1, 4))


def memory(plan: BucketPlan, costs: Costs, precision: Precision) -> float:
    """Bytes of a plan's weights, one copy a graph, and of its states. Only the transformer is stored in bf16."""
    total = 0.0
    for graph in GRAPHS:
        share = precision.weight / FP32 if graph in TRANSFORMER_GRAPHS else 1
        total += sum(costs.weights[graph] * share + state_bytes(graph, bucket) for bucket in plan.buckets(graph))
    return total


def plan_table(costs: Costs, precision: Precision) -> str:
    """A row for each plan, on one core of the first chip."""
    chip, rows = CHIPS[0], []
    limit = chip.core("memory")
    for plan in plans():
        p = Predictor(costs, chip, plan, precision)
        sizes = [", ".join(map(str, getattr(plan, field))) for field in ("prefill", "decode", "slots", "latents")]
        stored = memory(plan, costs, precision)
        total = (stored + MICROCODE) / 2**30
        times = [f"{p.sentence(s, s.codes):.0f} / {p.sentence(s, FIRST_CHUNK):.1f}" for s in SENTENCES]
        room = (f"{stored / 2**30:.1f}", f"{total:.1f}", f"{total / limit:.0%}")
        rows.append((*sizes, *room, *times, f"{p.per_code(SENTENCES[0], 4):.2f}"))
    header = ["prefill", "decode", "slots", "latents", "disk GiB", "HBM GiB", f"of {limit:g} GiB"]
    header += [f"{s.prefix} + {s.codes}: ms / TTFA ms" for s in SENTENCES]
    return table([*header, "4 texts: ms per code"], rows)


ASSUMPTIONS = f"""\
* Time = the larger of bytes / bandwidth (m) and flops / peak rate (a): transfers overlap with arithmetic, activations
  and attention scores stay on the chip, vector and scalar work is free. A lower bound, not an estimate.
* One core, with its equal share of the chip. Whether it gets more while the others idle is not documented.
* bf16: products at the bf16 rate; inputs, results and KV cache stay fp32. Whether the compiler stores cast weights in
  bf16 is not documented: hence two columns. MB is with weights in fp32. Conditioning is always in fp32.
* A decode step reads all of the cache in its bucket once and writes one position of each row, in place. "Cache copied"
  is the cache written anew by every step, which is what the lowered program says without aliasing.
* By law: by formulas for the transformer, which reproduce every bucket in the file exactly, or this script ends.
* Sentences: prefix positions + codes; vocoder in fp32, conditioning latents known. TTFA is prefill, the first
  {FIRST_CHUNK} codes and their audio, as if a stream decoded with graphs: `inference_stream` takes its codes from coqui-tts.
* Not counted: sampling, embedding and other work of the host, and copies between host and device: prefill's keys and
  values, the cache before the first step and when it moves to a larger size, {cache_bytes(1) / 1e3:.0f} kB per position of the bucket.
* Disk: a copy of the weights in every graph, and the states, before compression. HBM: the same and {MICROCODE / 1e6:.0f} MB of
  microcode. Not counted: programs, scratchpad, DMA rings, inputs and results."""


def main() -> None:
    """Read, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of `neuron-xtts graphs --lower --json`")
    costs = Costs(json.loads(parser.parse_args().file.read_text()))
    print("# Neuron on paper: PREDICTED, NOT MEASURED\n\nNothing here has been run on a device or compiled for one.\n")
    print(f"{ASSUMPTIONS}\n\n## One core: what is documented for the chip, divided by its cores\n\n{chips()}")
    for chip in CHIPS:
        print(f"\n## Roofline, one core of {chip.name}\n\n{rooflines(costs, chip)}")
    for s in SENTENCES:
        print(f"\n## A sentence: {s.prefix} positions, {s.codes} codes\n\n{sentence_table(costs, s)}")
    for precision in (EXACT, STORED):
        print(f"\n## Plans, one core of {CHIPS[0].name}, {precision.name}\n\n{plan_table(costs, precision)}")


if __name__ == "__main__":
    main()
