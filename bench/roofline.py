"""Neuron on paper: how fast the graphs could be by their bytes and flops. Predicted, not measured.

    neuron-xtts graphs --lower --json > lowered.json
    python bench/roofline.py lowered.json

Prints Markdown: the roofline of every graph and bucket in the file, the time of a sentence, and what bucket plans cost
in memory and gain in time. ``--attained decode=0.4 vocoder=0.07`` divides the predicted times by shares that somebody
has measured. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

DOCS = "https://awsdocs-neuron.readthedocs-hosted.com/en/latest"
HARDWARE = f"{DOCS}/about-neuron/arch/neuron-hardware"

FP32 = 4  # bytes
HALO = 14  # frames on either side of a vocoder window (neuron_xtts.graphs.vocoder.receptive_field)
SAMPLES_PER_CODE, CODE_RATE, SAMPLES_PER_FRAME, OUTPUT_RATE = 1024, 22050, 256, 24000
MICROCODE = 96e6  # bytes per core of inf2, AWS: neuron-runtime/explore/device-memory


@dataclass(frozen=True)
class Chip:
    """A chip as AWS documents it; a core's share is the chip's figure divided by ``cores``."""

    name: str
    cores: int
    fp32: float  # dense TFLOPS of the chip
    bf16: float
    bandwidth: float  # GB/s of the chip; some AWS pages say GiB/s
    memory: float  # GiB of the chip
    source: str


CHIPS = (
    Chip("inf2, trn1", 2, 47.5, 190, 820, 32, f"{HARDWARE}/inferentia2.html, {HARDWARE}/trainium.html"),
    # Logical cores of two physical ones (LNC=2), the default: 4 to a chip.
    Chip("trn2 (LNC=2)", 4, 181, 667, 2900, 96, f"{HARDWARE}/trainium2.html"),
)


@dataclass(frozen=True)
class Precision:
    """How matrix products are computed, and the bytes of a weight in device memory."""

    name: str
    products: str
    weight: int


EXACT = Precision("fp32", "fp32", 4)
CAST = Precision("bf16, weights in fp32", "bf16", 4)
STORED = Precision("bf16, weights in bf16", "bf16", 2)
PRECISIONS = (EXACT, CAST, STORED)


@dataclass(frozen=True)
class Model:
    """Sizes of XTTS v2."""

    layers: int = 30
    channels: int = 1024
    codes: int = 1026  # audio vocabulary
    speaker: int = 512  # channels of the speaker embedding

    def cache(self, positions: int) -> int:
        """Bytes of keys and values."""
        return 2 * self.layers * positions * self.channels * FP32

    def trunk(self, rows: int, context: int) -> int:
        """Flops of ``rows`` positions that each attend to ``context``."""
        return rows * self.layers * (24 * self.channels**2 + 4 * context * self.channels)

    def flops(self, graph: str, bucket: Sequence[int]) -> int | None:
        """By law; None for a graph without one."""
        head = 2 * self.channels * self.codes
        if graph == "decode":
            return bucket[0] * (self.trunk(1, bucket[1]) + head)
        if graph in ("prefill", "latents"):
            return self.trunk(bucket[0], bucket[0]) + (head if graph == "prefill" else 0)
        return None

    def moved(self, graph: str, bucket: Sequence[int]) -> int:
        """Bytes of inputs and results, without a state. Of other graphs they are small, and count as weights."""
        size = bucket[-1]
        if graph == "decode":
            return FP32 * bucket[0] * (1 + size + 2 * self.channels + self.codes)
        if graph == "prefill":
            return FP32 * (size * self.channels + 1 + self.channels + self.codes) + self.cache(size)
        if graph == "latents":
            return FP32 * 2 * size * self.channels
        if graph == "vocoder":
            return FP32 * (size * (self.channels + 1 + SAMPLES_PER_FRAME) + self.speaker)
        return 0


@dataclass(frozen=True)
class Cost:
    """What one run of a graph costs; weights are counted in fp32, whatever they are stored as."""

    graph: str
    bucket: tuple[int, ...]
    flops: int
    weights: int
    moved: int
    state: int = 0

    def traffic(self, precision: Precision, copied: bool = False) -> float:
        """Bytes through memory. A state is read once and one position of it written, or all of it if ``copied``."""
        written = self.state if copied else self.state / self.bucket[-1]
        return self.weights * precision.weight / FP32 + self.moved + self.state + written


@dataclass(frozen=True)
class Bound:
    """Milliseconds of one run, by memory and by arithmetic."""

    memory: float
    arithmetic: float

    @property
    def time(self) -> float:
        """The larger."""
        return max(self.memory, self.arithmetic)

    @property
    def binds(self) -> str:
        """Which it is."""
        return "memory" if self.memory >= self.arithmetic else "arithmetic"


def bound(cost: Cost, chip: Chip, precision: Precision, copied: bool = False) -> Bound:
    """The roofline of ``cost`` on one core of ``chip``."""
    rate = (chip.bf16 if precision.products == "bf16" else chip.fp32) / chip.cores
    return Bound(
        1e3 * cost.traffic(precision, copied) / (1e9 * chip.bandwidth / chip.cores), 1e3 * cost.flops / (1e12 * rate)
    )


class Costs:
    """The costs of the graphs in a file, in its buckets and, by law, in others."""

    def __init__(self, lowered: Sequence[Mapping[str, Any]], model: Model) -> None:
        self.model = model
        self.listed: list[Cost] = []
        for line in lowered:
            bucket = tuple(int(size) for size in line["bucket"].split("x"))
            state = model.cache(bucket[0] * bucket[1]) if line["graph"] == "decode" else 0
            moved = model.moved(line["graph"], bucket)
            weights = line["bytes"] - moved - 2 * state  # the state goes in and out
            self.listed.append(Cost(line["graph"], bucket, line["flops"], weights, moved, state))
        self.computed: set[str] = set()

    def of(self, graph: str, bucket: tuple[int, ...]) -> Cost | None:
        """The cost in one bucket; None if there is neither that nor a law for it."""
        known = [cost for cost in self.listed if cost.graph == graph]
        for cost in known:
            if cost.bucket == bucket:
                return cost
        flops = self.model.flops(graph, bucket) if known else None
        if graph == "vocoder" and known:
            flops = _line([(cost.bucket[0], cost.flops) for cost in known], bucket[0])
        if flops is None:
            return None
        self.computed.add(f"{graph} {'x'.join(map(str, bucket))}")
        state = self.model.cache(bucket[0] * bucket[1]) if graph == "decode" else 0
        return Cost(graph, bucket, flops, known[0].weights, self.model.moved(graph, bucket), state)

    def deviations(self) -> list[str]:
        """Where the file and the laws disagree, a line each."""
        lines = []
        for cost in self.listed:
            expected = self.model.flops(cost.graph, cost.bucket)
            first = next(other for other in self.listed if other.graph == cost.graph)
            name = f"{cost.graph} {'x'.join(map(str, cost.bucket))}"
            if expected is not None and expected != cost.flops:
                lines.append(f"{name}: {cost.flops} flops, by law {expected}")
            if cost.moved and cost.weights != first.weights:
                lines.append(f"{name}: {cost.weights} bytes of weights, {first.weights} in another bucket")
        return lines


def _line(points: Sequence[tuple[int, int]], at: int) -> int:
    """Through the first and last of ``points``; in proportion if there is but one."""
    (x, y), (x2, y2) = min(points), max(points)
    return round(y + (at - x) * ((y2 - y) / (x2 - x) if x2 > x else y / x))


@dataclass(frozen=True)
class Plan:
    """Sizes for each graph, as in ``neuron_xtts.BucketPlan``."""

    prefill: tuple[int, ...] = (128, 448)
    decode: tuple[int, ...] = (512, 1044)
    slots: tuple[int, ...] = (1,)
    latents: tuple[int, ...] = (1044,)
    vocoder: tuple[int, ...] = (96, 128, 160, 256)
    conditioning: tuple[int, ...] = (517,)

    def buckets(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """All graphs with their buckets."""
        for slots, positions in product(self.slots, self.decode):
            yield "decode", (slots, positions)
        for graph in ("prefill", "latents", "vocoder", "conditioning"):
            for size in getattr(self, graph):
                yield graph, (size,)

    def costs(self, costs: Costs) -> list[Cost]:
        """Of all graphs that a cost is known for."""
        return [cost for bucket in self.buckets() if (cost := costs.of(*bucket))]


@dataclass(frozen=True)
class Sentence:
    """Positions of the prefix, and the audio codes that follow, the stop code included."""

    prefix: int
    codes: int

    @classmethod
    def parse(cls, text: str) -> Sentence:
        """From a text such as ``110x210``."""
        prefix, codes = text.split("x")
        return cls(int(prefix), int(codes))

    @property
    def seconds(self) -> float:
        """Of audio."""
        return self.codes * SAMPLES_PER_CODE / CODE_RATE

    def __str__(self) -> str:
        return f"{self.prefix} + {self.codes}"


@dataclass(frozen=True)
class Predictor:
    """Predicts the milliseconds of a plan on one core."""

    costs: Costs
    chip: Chip
    plan: Plan
    attained: Mapping[str, float] = field(default_factory=dict)
    call: float = 0.0  # milliseconds of the host per run of a graph

    def run(self, graph: str, bucket: tuple[int, ...], precision: Precision) -> float:
        """One run. The vocoder stays in fp32, as in the precision ``bf16`` of neuron_xtts."""
        cost = self.costs.of(graph, bucket)
        if cost is None:
            raise SystemExit(f"the file has no {graph} graph")
        time = bound(cost, self.chip, EXACT if graph == "vocoder" else precision).time
        return time / self.attained.get(graph, 1) + self.call

    def prefill(self, sentence: Sentence, precision: Precision) -> float:
        """The prefix, which gives the first code, too."""
        return self.run("prefill", (_choose(self.plan.prefill, sentence.prefix),), precision)

    def decode(self, sentence: Sentence, codes: int, precision: Precision, rows: int = 1) -> float:
        """The steps up to ``codes``: all but the first."""
        slots = _choose(self.plan.slots, rows)
        sizes = [_choose(self.plan.decode, sentence.prefix + step) for step in range(1, codes)]
        return sum(sizes.count(size) * self.run("decode", (slots, size), precision) for size in set(sizes))

    def vocoder(self, codes: int, precision: Precision) -> float:
        """All windows, chosen as ``neuron_xtts.routes.vocoder`` does."""
        frames = codes * SAMPLES_PER_CODE // SAMPLES_PER_FRAME * OUTPUT_RATE // CODE_RATE
        size = next((size for size in self.plan.vocoder if size >= frames), max(self.plan.vocoder))
        windows = 1 if size >= frames else -(-frames // (size - 2 * HALO))
        return windows * self.run("vocoder", (size,), precision)

    def sentence(self, sentence: Sentence, precision: Precision, codes: int | None = None) -> float:
        """The whole sentence, or up to the audio of its first ``codes``."""
        codes = sentence.codes if codes is None else min(codes, sentence.codes)
        parts = (self.prefill(sentence, precision), self.decode(sentence, codes, precision))
        return sum(parts) + self.vocoder(codes, precision)

    def per_code(self, sentence: Sentence, rows: int, precision: Precision) -> float:
        """Decoding ``rows`` such sentences, by code: together if the plan can, or one by one."""
        together = rows if rows <= max(self.plan.slots) else 1
        return self.decode(sentence, sentence.codes, precision, together) / together / (sentence.codes - 1)


def _choose(sizes: Sequence[int], needed: int) -> int:
    for size in sorted(sizes):
        if size >= needed:
            return size
    raise SystemExit(f"no size of {tuple(sizes)} holds {needed}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def chips() -> str:
    """The constants, with their source."""
    rows = []
    for chip in CHIPS:
        core = (f"{chip.fp32 / chip.cores:.4g}", f"{chip.bf16 / chip.cores:.4g}", f"{chip.bandwidth / chip.cores:.4g}")
        whole = f"{chip.fp32:g} / {chip.bf16:g} / {chip.bandwidth:g} / {chip.memory:g}"
        rows.append((chip.name, whole, str(chip.cores), *core, f"{chip.memory / chip.cores:g}", chip.source))
    header = (
        "",
        "chip: fp32 / bf16 TFLOPS / GB/s / GiB",
        "cores",
        "fp32",
        "bf16",
        "GB/s",
        "GiB",
        "chip's figures from",
    )
    return table(header, rows)


def rooflines(costs: Costs, chip: Chip) -> str:
    """Every graph and bucket of the file, in every precision."""
    rows = []
    for cost in costs.listed:
        for precision in PRECISIONS:
            at = bound(cost, chip, precision)
            copied = f"{bound(cost, chip, precision, True).time:.2f}" if cost.state else ""
            name = (cost.graph, "x".join(map(str, cost.bucket)), precision.name)
            size = (f"{cost.traffic(precision) / 1e6:.0f}", f"{cost.flops / 1e9:.2f}")
            rows.append((*name, *size, f"{at.memory:.2f}", f"{at.arithmetic:.2f}", at.binds, f"{at.time:.2f}", copied))
    header = ("graph", "bucket", "precision", "MB", "GFLOP", "memory ms", "arithmetic ms", "binds", "predicted ms")
    return table((*header, "cache copied: ms"), rows)


def sentences(predictor: Predictor, sentence: Sentence, chunk: int) -> Iterator[tuple[str, ...]]:
    """A row for each precision."""
    for precision in PRECISIONS:
        whole = predictor.sentence(sentence, precision)
        parts = (
            predictor.prefill(sentence, precision),
            predictor.decode(sentence, sentence.codes, precision),
            predictor.vocoder(sentence.codes, precision),
        )
        rtf, first = whole / 1e3 / sentence.seconds, predictor.sentence(sentence, precision, chunk)
        times = (*(f"{part:.1f}" for part in parts), f"{whole:.0f}", f"{rtf:.3f}", f"{first:.0f}")
        yield predictor.chip.name, precision.name, *times


def memory(plan: Plan, costs: Costs, precision: Precision) -> tuple[float, float]:
    """Bytes of a plan's weights, and of those with states and microcode. Only the transformer is stored in bf16."""
    weights = state = 0.0
    for cost in plan.costs(costs):
        transformer = cost.graph in ("prefill", "decode", "latents")
        weights += cost.weights * (precision.weight / FP32 if transformer else 1)
        state += cost.state
    return weights, weights + state + MICROCODE


def plans() -> Iterator[tuple[str, Plan]]:
    """The plans to compare."""
    for prefill, decode, slots in product(
        ((448,), (128, 448), (128, 256, 384, 448)),
        ((1044,), (512, 1044), (256, 512, 1044), (128, 256, 512, 1044)),
        ((1,), (1, 4)),
    ):
        plan = Plan(prefill, decode, slots)
        yield "default" if plan == Plan() else "", plan
    yield "no latents", Plan(latents=())
    yield "4 rows only", Plan(slots=(4,))
    lengths = (128, 256, 512, 1044)
    yield "powers of two", Plan(lengths, lengths, (1, 4), lengths, (64, 128, 256))


def compare(costs: Costs, wanted: Sequence[Sentence], options: argparse.Namespace, precision: Precision) -> str:
    """A row for each plan, on one core of the first chip."""
    chip, rows = CHIPS[0], []
    for name, plan in plans():
        predictor = Predictor(costs, chip, plan, options.attained, options.call_ms)
        weights, total = (size / 2**30 for size in memory(plan, costs, precision))
        limit = chip.memory / chip.cores
        sizes = [", ".join(map(str, getattr(plan, graph))) for graph in ("prefill", "decode", "slots")]
        pairs = [[predictor.sentence(s, precision, codes) for codes in (None, options.chunk)] for s in wanted]
        times = (f"{whole:.0f} / {first:.0f}" for whole, first in pairs)
        four = f"{predictor.per_code(wanted[0], 4, precision):.2f}"
        graphs = str(len(plan.costs(costs)))
        rows.append((name, *sizes, graphs, f"{weights:.1f}", f"{total:.1f}", f"{total / limit:.0%}", *times, four))
    header = ("", "prefill", "decode", "slots", "graphs", "weights GiB", "HBM GiB", f"of {limit:g} GiB")
    return table((*header, *(f"{sentence}: ms / TTFA ms" for sentence in wanted), "4 texts: ms per code"), rows)


def predictions(costs: Costs, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Titles and tables of what follows from the rooflines."""
    plan, first = Plan(), options.sentences[0]
    predictors = [Predictor(costs, chip, plan, options.attained, options.call_ms) for chip in CHIPS]
    rows = [row for predictor in predictors for row in sentences(predictor, first, options.chunk)]
    header = ("core", "precision", "prefill ms", "decode ms", "vocoder ms", "sentence ms", "RTF", "TTFA ms")
    title = f"One sentence: {first.prefix} positions, {first.codes} codes, {first.seconds:.2f} s of audio"
    yield title, f"With {plan}.\n\n{table(header, rows)}"
    for precision in (EXACT, STORED):
        text = compare(costs, options.sentences, options, precision)
        yield f"Plans, one core of {CHIPS[0].name}, {precision.name}", text


def assumptions(costs: Costs, options: argparse.Namespace) -> list[str]:
    """What the figures rest on."""
    share = ", ".join(f"{graph} {share:g}" for graph, share in options.attained.items()) or "all of it, for every graph"
    absent = sorted({graph for graph, _ in Plan().buckets()} - {cost.graph for cost in costs.listed})
    lines = [
        "Time = the larger of bytes / bandwidth and flops / peak rate: transfers overlap with arithmetic, activations "
        "and attention scores stay on the chip, vector and scalar work is free. A lower bound, not an estimate.",
        "One core, with its equal share of the chip's bandwidth. Whether a core gets more while the others idle is not "
        "documented.",
        "fp32: products at the fp32 rate. bf16: products at the bf16 rate; inputs, results and KV cache stay fp32. "
        "Whether the compiler stores cast weights in bf16 is not documented: hence two lines.",
        "A decode step reads all of the cache in its bucket once and writes one position, in place. 'cache copied' is "
        "the cache written anew by every step, which is what the lowered program says without aliasing.",
        "Sentences: transformer in the precision of the line, vocoder in fp32. TTFA is prefill, the first "
        f"{options.chunk} codes and their audio. Conditioning latents are computed beforehand.",
        f"Host: {options.call_ms:g} ms per run of a graph. Not counted: sampling, embedding, moving the cache to a "
        "larger bucket, copies between host and device, such as keys and values of the prefix, "
        f"{costs.model.cache(1) / 1e3:.0f} kB per position of its bucket.",
        f"HBM: a copy of the weights in every graph, the states, {MICROCODE / 1e6:.0f} MB of microcode. Not counted: "
        "programs, scratchpad, DMA rings, inputs and results. On disk: the weights, before compression.",
        f"Share of the bound attained: {share}.",
    ]
    if absent:
        lines.append(f"Not in the file, therefore not counted: {', '.join(absent)}.")
    if costs.computed:
        lines.append(f"Computed by law, not lowered: {', '.join(sorted(costs.computed))}.")
    lines += [f"The file disagrees with the laws: {line}." for line in costs.deviations()]
    return lines


def shares(text: str) -> tuple[str, float]:
    """Parse ``graph=share``."""
    graph, share = text.split("=")
    return graph, float(share)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="JSON of `neuron-xtts graphs --lower`; default: stdin")
    parser.add_argument(
        "--sentences",
        type=Sentence.parse,
        nargs="+",
        metavar="PREFIXxCODES",
        default=[Sentence(110, 210), Sentence(200, 363), Sentence(310, 605)],
        help="the first one is also shown in parts",
    )
    parser.add_argument("--chunk", type=int, default=20, help="codes of the first chunk of a stream")
    parser.add_argument("--attained", type=shares, nargs="+", default=[], metavar="GRAPH=SHARE")
    parser.add_argument("--call-ms", type=float, default=0.0, help="time of the host per run of a graph")
    model = Model()
    for name in ("layers", "channels", "codes", "speaker"):
        parser.add_argument(f"--{name}", type=int, default=getattr(model, name), help="of the model")
    options = parser.parse_args()
    options.attained = dict(options.attained)
    return options


def main() -> None:
    """Read, predict, print."""
    options = parse()
    model = Model(options.layers, options.channels, options.codes, options.speaker)
    costs = Costs(json.loads(options.file.read_text() if options.file else sys.stdin.read()), model)
    # The plans come first, because only then is it known what had to be computed by law.
    complete = {"prefill", "decode", "vocoder"} <= {cost.graph for cost in costs.listed}
    compared = list(predictions(costs, options)) if complete else []

    print("# Neuron on paper: predicted, not measured\n\nNothing here has been run on a device or compiled for one.\n")
    print("\n".join(f"* {line}" for line in assumptions(costs, options)))
    print(f"\n## One core: what is documented for the chip, divided by its cores\n\n{chips()}")
    for chip in CHIPS:
        print(f"\n## Roofline, one core of {chip.name}\n\n{rooflines(costs, chip)}")
    print("".join(f"\n## {title}\n\n{text}\n" for title, text in compared))


if __name__ == "__main__":
    main()
