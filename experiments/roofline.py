"""What the graphs of XTTS v2 would cost on a NeuronCore, as ranges. PREDICTED, NOT MEASURED.

    neuron-xtts graphs --lower --json --sizes slots=1,4 --sizes decode=256,512,1044 --sizes latents=192,1044 > FILE
    python experiments/roofline.py FILE

Prints Markdown: what is assumed, every graph of the file, a sentence, what three changes would gain, what each
assumption decides, and what bucket plans cost. Lowering takes minutes, this script seconds; tables of what the file has
no graphs for are left out. A quick look is ``--sizes slots=1 --sizes decode=512`` with ``prefill=``, ``latents=``,
``vocoder=`` and ``conditioning=``, which is one graph, or the small model of ``--small``.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_xtts import BucketPlan
from neuron_xtts.backends.neuron.lowering import Product
from neuron_xtts.buckets import Bucket, Buckets, bucket_name
from neuron_xtts.coqui.constants import STREAM_CHUNK, seconds_of
from neuron_xtts.graphs.catalogue import CATALOGUE, GRAPHS
from neuron_xtts.graphs.transformer import StatefulPrefill
from neuron_xtts.tables import markdown


@dataclass(frozen=True, eq=False)
class Assumption:
    """What nothing here has measured: a figure, or the range that it is in.

    Attributes:
        what: it is, with its unit.
        low: its smallest value.
        high: its largest value.
        certainty: documented (by AWS), reported (by others) or a guess.
        source: where it is from, or why it can only be guessed.
    """

    what: str
    low: float
    high: float
    certainty: str
    source: str


DOCS = "https://awsdocs-neuron.readthedocs-hosted.com/en/latest"
NC_MATMUL = f"[AWS, nc_matmul]({DOCS}/nki/api/generated/nki.isa.nc_matmul.html)"
NEURONCORE_V2 = f"[AWS, NeuronCore-v2]({DOCS}/nki/arch/trainium_inferentia2_arch.html)"
NEURONCORE_V3 = f"[AWS, NeuronCore-v3]({DOCS}/nki/arch/trainium2_arch.html)"
BENCHMARKS = f"[AWS's table]({DOCS}/about-neuron/benchmarks/inf2/inf2-performance.html)"

# Documented, NC_MATMUL: TensorE multiplies a stationary tile, up to ARRAY x ARRAY, by a moving one, up to ARRAY x
# MOVING in as many cycles as the moving one has columns, but no fewer than the stationary one has, up to LATENCY. fp32
# takes FP32_PASSES times as many. Stationary tiles of at most half the array, in either direction, can share it.
ARRAY = 128
MOVING = 512
LATENCY = 64
FP32_PASSES = 4
# Documented, NEURONCORE_V2: what an instruction of VectorE takes that waits for the one before, in cycles, and its GHz.
VECTOR_CYCLES = 100
VECTOR_CLOCK = 1.12
# Documented, DOCS/neuron-runtime/explore/device-memory.html: bytes for each core of inf2.
MICROCODE = 96e6

TILING = Assumption(
    "use of TensorE; 0: the better operand stays, small tiles share the array; 1: the worse stays, nothing is shared",
    0,
    1,
    "ends documented, where between them a guess",
    NC_MATMUL,
)
OVERLAP = Assumption(
    "share of the shorter of memory's and TensorE's time that hides behind the longer",
    0.5,
    1,
    "a guess",
    f"that both can work at once is documented: {NEURONCORE_V2}",
)
CACHE_COPIES = Assumption(
    "how often a decode step copies its KV cache within the device",
    0,
    1,
    "a guess",
    "the lowered program copies it once; whether the compiler does is not documented",
)
STORED = Assumption(
    "bytes of a weight with --auto-cast=matmult",
    2,
    4,
    "a guess",
    "whether the compiler stores constants cast is not documented",
)
CALL = Assumption(
    "ms of a call, whatever it takes and gives",
    0.2,
    1.5,
    "low a guess, high reported",
    f"BERT base takes 1.00 ms on inf2, all of it: {BENCHMARKS}; a port of another model, 1.5 ms of Python a call",
)
PER_TENSOR = Assumption(
    "us more for each tensor that a call takes or gives, states included", 0, 10, "a guess", "nothing published"
)
LINK = Assumption(
    "GB/s between host and device, the host's own copies included",
    2,
    11.6,
    "low a guess, high reported",
    "84 MB in 7.2 ms by a port of another model on trn2; nothing for inf2",
)
COPY = Assumption(
    "ms more for each tensor copied to, from or on the device outside of a graph",
    0.01,
    0.1,
    "a guess",
    "nothing published",
)
HOST = Assumption(
    "ms of the host between two calls: sampling and loop",
    0.6,
    1.5,
    "low measured, high a guess",
    "docs/performance.md, on a machine that is no Neuron instance",
)
SAMPLING = Assumption(
    "ms of sampling one code on the device", 0.05, 0.5, "a guess", "nothing published; it has 1026 logits"
)
COMMON = (TILING, OVERLAP, CACHE_COPIES, STORED, CALL, PER_TENSOR, LINK, COPY, HOST, SAMPLING)


@dataclass(frozen=True)
class Core:
    """A NeuronCore as PyTorch sees it.

    Attributes:
        name: of the chips that have it.
        clock: of TensorE.
        bandwidth: of its memory.
        memory: GiB of it.
    """

    name: str
    clock: Assumption
    bandwidth: Assumption
    memory: float

    @property
    def assumptions(self) -> tuple[Assumption, ...]:
        """All that is assumed of it."""
        return self.clock, self.bandwidth, *COMMON


_SHARE = "low a guess, 70 % of its share of the chip's"
INF2 = Core(
    "inf2, trn1",
    Assumption("GHz of TensorE", 2.8, 2.8, "documented", NEURONCORE_V2),
    Assumption(
        "GB/s of memory",
        0.7 * 820 / 2,
        16 * 27 * 1.024**3,
        f"{_SHARE} 820; high documented, 16 DMA engines of 27 GiB/s",
        NEURONCORE_V2,
    ),
    memory=16,
)
TRN2 = Core(
    "trn2, LNC=2",  # a logical core of two physical ones, the default: 4 to a chip
    Assumption("GHz of TensorE", 2.4, 4.8, "documented; how well two share the work a guess", NEURONCORE_V3),
    Assumption("GB/s of memory", 0.7 * 2900 / 4, 2900 / 4, f"{_SHARE} 2900, high all of it", NEURONCORE_V3),
    memory=24,
)
CORES = (INF2, TRN2)

FP32 = 4  # bytes
DEFAULT = BucketPlan.static()
SENTENCES = ((110, 210), (310, 602))  # positions of the prefix, and audio codes, the stop code included

Values = Mapping[Assumption, Tensor]  # (N,) of each: N ways to assume everything


@dataclass(frozen=True)
class Variant:
    """A way to compile and to call graphs.

    Attributes:
        name: in tables.
        passes: what a matrix product takes of TensorE, in bf16's.
        weight: bytes of a weight in the device's memory, or what is assumed of them.
        handed_over: whether prefill's cache, and one that outgrows its bucket, moves on the device, not over the host.
        steps: codes in one call; if several, the device samples them.
    """

    name: str
    passes: int
    weight: int | Assumption
    handed_over: bool = False
    steps: int = 1

    def weight_bytes(self, at: Values) -> Tensor | int:
        """Bytes of a weight, (N,) if that is assumed."""
        return at[self.weight] if isinstance(self.weight, Assumption) else self.weight


EXACT = Variant("fp32", FP32_PASSES, FP32)
CAST = Variant("bf16", 1, STORED)  # of a vocoder, the precision "bf16-all"
A = Variant("a", 1, FP32 // 2)
AB = replace(A, name="a, b", handed_over=True)
ABC = replace(AB, name="a, b, c", steps=4)
B = replace(EXACT, name="fp32, b", handed_over=True)
C = replace(EXACT, name="fp32, c", steps=4)
PRECISIONS = {"transformer": (EXACT, CAST, A), "vocoder": (EXACT, CAST), "conditioning": (EXACT,)}
CHANGES = ((EXACT, A), (CAST, A), (EXACT, B), (A, AB), (EXACT, C), (AB, ABC), (EXACT, ABC), (CAST, ABC))


def tiles(size: int, limit: int) -> Counter[int]:
    """The tiles of a dimension: their number by their size."""
    return +Counter({limit: size // limit}) + Counter({size % limit: 1} if size % limit else {})


def tile_cycles(stationary: int, moving: int, inner: int, *, share: bool) -> float:
    """TensorE's cycles in bf16 for the product of (stationary, inner) and (inner, moving), tile by tile.

    Args:
        stationary: rows of the operand whose tiles stay.
        moving: columns of the operand whose tiles move.
        inner: what is summed over.
        share: whether tiles of at most half the array share it.
    """
    cycles = 0.0
    sizes = (tiles(stationary, ARRAY), tiles(moving, MOVING), tiles(inner, ARRAY))
    for (columns, a), (moved, b), (rows, c) in product(*(tile.items() for tile in sizes)):
        sharing = 2 ** ((columns <= ARRAY // 2) + (rows <= ARRAY // 2)) if share else 1
        cycles += a * b * c * max(min(LATENCY, columns), moved) / sharing
    return cycles


@cache
def product_cycles(of: Product) -> tuple[float, float]:
    """TensorE's cycles in bf16 for a matrix product, at both ends of `TILING`."""
    ways = ((of.rows, of.columns), (of.columns, of.rows))
    best = min(tile_cycles(*way, of.inner, share=True) for way in ways)
    return best, max(tile_cycles(*way, of.inner, share=False) for way in ways)


# Operators that only arrange numbers, or that TensorE or the DMA engines do.
_NOT_VECTOR = set(
    "parameter constant iota broadcast reshape transpose slice concatenate tuple get-tuple-element convert reverse pad "
    "gather scatter dot convolution".split()
)


class Counted:
    """A lowered graph, counted.

    Attributes:
        weights: their bytes in fp32.
        inputs: bytes of each.
        results: bytes of each, without states.
        states: bytes of each.
        cycles: TensorE's in bf16 for all matrix products, at both ends of `TILING`.
        vector: operators for VectorE and ScalarE.
    """

    def __init__(self, lowered: Mapping[str, Any]) -> None:
        name = f"{lowered['graph']} {lowered['bucket']}"
        if "products" not in lowered:
            raise SystemExit(f"{name} has no products: the file is of an older neuron-xtts; lower again with this one")
        if lowered["rejected"]:
            raise SystemExit(f"{name} cannot be compiled ({'; '.join(lowered['rejected'])}); lower it without faults")
        self.inputs: list[int] = lowered["inputs"]
        self.results: list[int] = lowered["results"]
        self.states: list[int] = lowered["states"]
        # The program takes a whole state and gives it.
        self.weights: int = lowered["bytes"] - sum(self.inputs) - sum(self.results) - 2 * sum(self.states)
        if lowered["graph"] == "prefill":  # whose cache goes to the host or stays, as a variant has it
            self.results, self.states = self.results + self.states, []
        best = worst = 0.0
        for number, *sizes in lowered["products"]:
            ends = product_cycles(Product(*sizes))
            best, worst = best + number * ends[0], worst + number * ends[1]
        self.cycles = best, worst
        self.vector = sum(n for operator, n in lowered["operators"].items() if operator not in _NOT_VECTOR)

    @property
    def bytes(self) -> int:
        """All that a run reads or writes at least: weights in fp32, inputs, results, and states once."""
        return self.weights + sum(self.inputs) + sum(self.results) + sum(self.states)


Counts = Mapping[tuple[str, Bucket], Counted]


def read(path: Path) -> Counts:
    """What is in a file of ``neuron-xtts graphs --lower --json``, by graph and bucket."""
    try:
        lowered = json.loads(path.read_text())
        named = {(line["graph"], tuple(map(int, line["bucket"].split("x")))): line for line in lowered}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(
            f"{path} cannot be read ({error!r}); expected what `neuron-xtts graphs --lower --json` prints"
        ) from error
    return {name: Counted(line) for name, line in named.items()}


def lacking(counts: Counts, plan: BucketPlan, graphs: Iterable[str]) -> list[str]:
    """Graphs of a plan that were not lowered."""
    needed = [(graph, bucket) for graph in graphs for bucket in plan.buckets(graph)]
    return [f"{graph} {bucket_name(bucket)}" for graph, bucket in needed if (graph, bucket) not in counts]


PARTS = ("memory", "TensorE", "call")


@dataclass(frozen=True)
class Predictor:
    """Predicts milliseconds on one core, (N,) for N ways to assume what it needs."""

    counts: Counts
    core: Core
    variant: Variant
    at: Values
    plan: BucketPlan = DEFAULT

    def parts(self, graph: str, bucket: Bucket) -> tuple[Tensor, ...]:
        """What each of `PARTS` takes of one run, by itself."""
        counted, at = self.counts[graph, bucket], self.at
        traffic = counted.bytes + counted.weights * (self.variant.weight_bytes(at) / FP32 - 1)
        traffic = traffic + 2 * at[CACHE_COPIES] * sum(counted.states)
        best, worst = counted.cycles
        cycles = self.variant.passes * (best + at[TILING] * (worst - best))
        moved, states = counted.inputs + counted.results, len(counted.states)
        if graph == "prefill" and self.variant.handed_over:
            moved, states = (
                counted.inputs + counted.results[: StatefulPrefill.outputs],
                len(counted.results[StatefulPrefill.outputs :]),
            )
        call = at[CALL] + (len(moved) + 2 * states) * at[PER_TENSOR] / 1e3 + sum(moved) / at[LINK] / 1e6
        return traffic / at[self.core.bandwidth] / 1e6, cycles / at[self.core.clock] / 1e6, call

    def device(self, graph: str, bucket: Bucket) -> Tensor:
        """One run without the call."""
        memory, tensore, _ = self.parts(graph, bucket)
        return torch.maximum(memory, tensore) + (1 - self.at[OVERLAP]) * torch.minimum(memory, tensore)

    def run(self, graph: str, bucket: Bucket) -> Tensor:
        """One run."""
        *_, call = self.parts(graph, bucket)
        return self.device(graph, bucket) + call

    def call(self, bucket: Bucket) -> Tensor:
        """One call of decode, and the host until the next."""
        *_, call = self.parts("decode", bucket)
        steps, device = self.variant.steps, self.device("decode", bucket)
        computed = device if steps == 1 else steps * (device + self.at[SAMPLING])
        rows, _ = bucket
        return computed + call + rows * self.at[HOST]

    def calls(self, prefix: int, codes: int, rows: int = 1) -> Counter[Bucket]:
        """The buckets of the calls for ``codes`` codes, in order: for all but the first, which prefill gives."""
        choose, steps = Buckets(self.plan, {}).choose, self.variant.steps
        return Counter(choose("decode", rows, prefix + last) for last in range(steps, codes - 1 + steps, steps))

    def code(self, prefix: int, codes: int, rows: int = 1) -> Tensor:
        """A code of each row, on average; of the last call also those that come after the end."""
        calls = self.calls(prefix, codes, rows)
        return sum(number * self.call(bucket) for bucket, number in calls.items()) / rows / (codes - 1)

    def moves(self, prefix: int, codes: int) -> Tensor:
        """What it takes to move the cache from prefill into decode, and into a larger bucket when it outgrows one."""
        states = [self.counts["decode", bucket].states for bucket in self.calls(prefix, codes)]
        grown = [small + large for small, large in pairwise(states)]
        if self.variant.handed_over:  # one copy reads and writes; prefill's state is as large as that of decode
            copies, rate = len(states[0]) * len(states), self.at[self.core.bandwidth]
            moved = [states[0] * 2, *grown]
        else:
            copies, rate = len(states[0]) * (2 * len(states) - 1), self.at[LINK]
            moved = [states[0], *grown]
        return sum(map(sum, moved)) / rate / 1e6 + copies * self.at[COPY]

    def gpt(self, prefix: int, codes: int) -> Tensor:
        """Everything that the GPT has to do for a sentence."""
        prefill = self.run("prefill", Buckets(self.plan, {}).choose("prefill", prefix))
        return prefill + self.moves(prefix, codes) + (codes - 1) * self.code(prefix, codes)

    def first(self, prefix: int) -> Tensor:
        """The GPT until it has the codes of a stream's first chunk."""
        return self.gpt(prefix, STREAM_CHUNK)

    def rtf(self, prefix: int, codes: int) -> Tensor:
        """The GPT's share of the real-time factor."""
        return self.gpt(prefix, codes) / 1e3 / seconds_of(codes)


def corners(core: Core) -> Values:
    """Every combination of the ends of what is assumed of a core."""
    ends = (torch.tensor(sorted({each.low, each.high}), dtype=torch.float64) for each in core.assumptions)
    return dict(zip(core.assumptions, torch.cartesian_prod(*ends).unbind(1), strict=True))


def between(figures: Tensor, digits: int) -> str:
    """The range of figures as tables show it, or one figure if both ends look the same."""
    ends = (round(end.item(), digits) + 0.0 for end in (figures.min(), figures.max()))  # no -0.0
    return " to ".join(dict.fromkeys(f"{end:.{digits}f}" for end in ends))


def assumption_table() -> str:
    """Everything that is assumed."""
    named = [(f"{each.what}, {core.name}", each) for core in CORES for each in (core.clock, core.bandwidth)]
    named += [(each.what, each) for each in COMMON]
    rows = []
    for what, each in named:
        ends = " to ".join(dict.fromkeys((f"{each.low:.3g}", f"{each.high:.3g}")))
        rows.append((what, ends, each.certainty, each.source))
    return markdown(("assumed", "range", "certainty", "source"), rows)


def graph_table(counts: Counts) -> str:
    """Every graph of the file on one core of inf2, in the precisions of its family."""
    rows = []
    for (graph, bucket), counted in counts.items():
        for variant in () if CATALOGUE[graph].moves else PRECISIONS[CATALOGUE[graph].family]:
            predictor = Predictor(counts, INF2, variant, corners(INF2))
            parts, run = predictor.parts(graph, bucket), predictor.run(graph, bucket)
            largest = torch.stack(parts)[:, [run.argmin(), run.argmax()]].argmax(0)
            bounds = " to ".join(dict.fromkeys(PARTS[part] for part in largest))
            name, size = f"{graph} {bucket_name(bucket)}", f"{counted.bytes / 1e6:.0f}"
            rows.append((name, variant.name, size, *(between(part, 2) for part in (*parts, run)), bounds))
    header = ("graph", "precision", "MB in fp32", *(f"{part} ms" for part in PARTS), "one run ms", "bound by")
    return markdown(header, rows)


def sentence_table(counts: Counts, prefix: int, codes: int) -> str:
    """The GPT's share of a sentence on each core, as it is and changed."""
    rows = []
    for core, variant in product(CORES, (EXACT, CAST, A, AB, ABC)):
        gpt = Predictor(counts, core, variant, corners(core))
        cells = (
            between(gpt.code(prefix, codes), 1),
            between(gpt.moves(prefix, codes), 0),
            between(gpt.first(prefix), 0),
            between(gpt.gpt(prefix, codes), 0),
            between(gpt.rtf(prefix, codes), 2),
        )
        rows.append((core.name, variant.name, *cells))
    header = ("one core", "GPT", "a code ms", "moving the cache ms", "first codes ms", "sentence ms", "RTF of the GPT")
    return markdown(header, rows)


def gain_table(counts: Counts, prefix: int, codes: int) -> str:
    """What each change saves on one core of inf2, by itself and after others."""
    rows = []
    for variants in CHANGES:
        before, after = (Predictor(counts, INF2, variant, corners(INF2)) for variant in variants)
        cells = (
            between(before.code(prefix, codes) - after.code(prefix, codes), 1),
            between(before.first(prefix) - after.first(prefix), 0),
            between(before.gpt(prefix, codes) - after.gpt(prefix, codes), 0),
            between(100 * (1 - after.gpt(prefix, codes) / before.gpt(prefix, codes)), 0),
            between(before.rtf(prefix, codes), 2),
            between(after.rtf(prefix, codes), 2),
        )
        rows.append((" -> ".join(variant.name for variant in variants), *cells))
    header = ("change", "saves a code ms", "first codes ms", "sentence ms", "sentence %", "RTF before", "RTF after")
    return markdown(header, rows)


def influence_table(counts: Counts, prefix: int, codes: int) -> str:
    """What single assumptions decide on one core of inf2: each from low to high, the others in their middle."""
    middle = {each: torch.tensor([(each.low + each.high) / 2], dtype=torch.float64) for each in INF2.assumptions}
    settings = [("everything in its middle", "", middle)]
    for each in INF2.assumptions:
        if each.low < each.high:
            ends = middle | {each: torch.tensor([each.low, each.high], dtype=torch.float64)}
            settings.append((each.what, f"{each.low:.3g} -> {each.high:.3g}", ends))
    rows = []
    for what, ends, at in settings:
        gpts = [Predictor(counts, INF2, variant, at) for variant in (EXACT, CAST, A, ABC)]
        figures = [*(gpt.code(prefix, codes) for gpt in gpts), gpts[0].first(prefix)]
        rows.append((what, ends, *(" -> ".join(dict.fromkeys(f"{end:.1f}" for end in each)) for each in figures)))
    return markdown(("assumed", "", "a code ms: fp32", "bf16", "a", "a, b, c", "first codes ms: fp32"), rows)


FIELDS = ("prefill", "decode", "slots", "latents")  # of a plan, those that differ
PLANS = (
    replace(DEFAULT, prefill=(448,), decode=(1044,)),
    replace(DEFAULT, decode=(1044,)),
    DEFAULT,
    replace(DEFAULT, latents=()),
    replace(DEFAULT, decode=(256, 512, 1044)),
    replace(DEFAULT, slots=(1, 4)),
)


# Without those that move caches: they have no weights, and no sentence has more than one run of them.
COUNTED = tuple(graph for graph in GRAPHS if not CATALOGUE[graph].moves)


def plan_table(counts: Counts) -> str:
    """What those plans that the file has all graphs of cost and gain, in fp32 on one core of inf2."""
    rows, (prefix, codes) = [], SENTENCES[0]
    for plan in PLANS:
        if lacking(counts, plan, COUNTED):
            continue
        sizes = [", ".join(map(str, getattr(plan, field))) or "-" for field in FIELDS]
        graphs = [counts[graph, bucket] for graph in COUNTED for bucket in plan.buckets(graph)]
        disk = sum(graph.weights + sum(graph.states) for graph in graphs) / 2**30
        total = disk + MICROCODE / 2**30
        gpt = Predictor(counts, INF2, EXACT, corners(INF2), plan)
        cells = (
            *(between(gpt.gpt(*sentence), 0) for sentence in SENTENCES),
            between(gpt.first(prefix), 0),
            between(gpt.code(prefix, codes, (plan.slots or (1,))[-1]), 1),
        )
        rows.append((*sizes, f"{disk:.1f}", f"{total:.1f}", f"{total / INF2.memory:.0%}", *cells))
    sentences = (f"{prefix} + {codes} ms" for prefix, codes in SENTENCES)
    header = (*FIELDS, "disk GiB", "HBM GiB", f"of {INF2.memory}", *sentences, "first codes ms", "4 texts: ms a code")
    return markdown(header, rows)


INTRODUCTION = f"""\
# Neuron on paper: PREDICTED, NOT MEASURED

Nothing here has been run on Neuron hardware or compiled for it.

* A run takes the longer of memory's and TensorE's time, as much of the shorter as is not hidden, and the call. Memory
  moves weights, inputs, results and KV cache once; TensorE takes the matrix products tile by tile; a call costs by
  itself, by its tensors, and by the bytes that go between host and device.
* Ranges are over every combination of the ends of what is assumed. What a change saves is the difference of two
  predictions that assume the same.
* fp32 and bf16: with caches over the host, bf16 with --auto-cast=matmult. a: bf16 weights in the traced trunk. b: the
  cache moves on the device, out of prefill and when it outgrows its bucket. c: {ABC.steps} codes a call, sampled there.
* First codes: until the {STREAM_CHUNK} codes of a stream's first chunk. Of a sentence only the GPT is counted.
* Not counted: VectorE and ScalarE, transposes, and whatever does not fit on the chip and moves more than once. A
  real run may well take longer than an upper end.
"""


def main() -> None:
    """Read, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of `neuron-xtts graphs --lower --json`")
    counts = read(parser.parse_args().file)
    print(f"{INTRODUCTION}\n## Assumed\n\n{assumption_table()}")
    print(f"\n## Graphs on one core of {INF2.name}\n\n{graph_table(counts)}")
    if missing := lacking(counts, DEFAULT, ("prefill", "decode")):
        print(f"\nNo sentences and plans, since the file lacks: {', '.join(missing)}")
        return
    prefix, codes = sentence = SENTENCES[0]
    print(f"\n## A sentence of {prefix} + {codes}, {seconds_of(codes):.2f} s of audio\n")
    print(sentence_table(counts, *sentence))
    print(f"\n## What changes gain\n\n{gain_table(counts, *sentence)}")
    print(f"\n## What each assumption decides\n\n{influence_table(counts, *sentence)}\n")
    decode = counts["decode", DEFAULT.buckets("decode")[0]]
    back = between(sum(decode.states) / corners(INF2)[LINK] / 1e6, 0)
    waits = decode.vector * VECTOR_CYCLES / VECTOR_CLOCK / 1e6
    print(f"* Not in the ranges: if every step copied its cache to the host, a code would take {back} ms more.")
    print(f"* Nor: if each of a step's {decode.vector} other operators waited for the one before, {waits:.2f} ms more.")
    print(f"\n## Plans, fp32, one core of {INF2.name}\n\n{plan_table(counts)}")


if __name__ == "__main__":
    main()
