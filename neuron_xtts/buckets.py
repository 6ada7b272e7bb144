"""Bucket plans: the sizes graphs are compiled for, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from neuron_xtts.errors import Fallback
from neuron_xtts.graphs.catalogue import CATALOGUE

Sizes = tuple[int, ...] | None
Bucket = tuple[int, ...]

#: Graphs that decode: one code in a call, or several.
DECODERS = ("decode", "codes")


@dataclass(frozen=True)
class BucketPlan:
    """The sizes each graph is available in.

    A field is a tuple of sizes, of which the smallest that holds an input is chosen; an empty tuple (no such
    graph: every call of it falls back); or None: exact shapes, which only a backend that needs no ahead-of-time
    compilation offers. ``BucketPlan()`` is exact everywhere, `BucketPlan.none` has no graph at all and
    `BucketPlan.static` is the plan made for ahead-of-time compilation.

    Attributes:
        prefill: positions of the prefix: conditioning latents, text and the start code.
        decode: positions of the KV cache.
        slots: rows that decode together.
        latents: positions of a whole sequence: prefix and audio codes.
        vocoder: frames per window, halo included (1 frame = 256 samples at 24 kHz).
        conditioning: frames of mel spectrogram of a reference chunk (1 frame = 256 samples at 22.05 kHz). It cannot
            be padded: a size serves chunks of exactly that length.
        steps: codes that one call of a compiled graph decodes. Several are drawn on the device, and the host looks for
            the end between calls: what was decoded beyond it is lost. The host backend decodes one, whatever this is.
    """

    prefill: Sizes = None
    decode: Sizes = None
    slots: Sizes = None
    latents: Sizes = None
    vocoder: Sizes = None
    conditioning: Sizes = None
    steps: int = 1

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"BucketPlan.steps is {self.steps!r}; expected a positive whole number")
        for field in fields(self):
            sizes = getattr(self, field.name)
            if sizes is None or field.name == "steps":
                continue
            if not isinstance(sizes, (tuple, list)) or not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError(
                    f"BucketPlan.{field.name} is {sizes!r}; expected a tuple of positive whole numbers, "
                    "() for no graph, or None for exact shapes"
                )
            object.__setattr__(self, field.name, tuple(sorted(set(sizes))))

    @classmethod
    def none(cls) -> BucketPlan:
        """A plan without any graph: every call falls back to coqui-tts."""
        return cls(prefill=(), decode=(), slots=(), latents=(), vocoder=(), conditioning=())

    @classmethod
    def static(cls) -> BucketPlan:
        """The default plan for compiled graphs, made for XTTS v2.

        Its longest prefix has 437 positions (32 of conditioning, 404 of text and the start code), its longest sequence
        1044. Every graph carries weights of its own, so there are few; docs/performance.md has what each costs.
        """
        return cls(
            prefill=(128, 448),
            decode=(512, 1044),
            slots=(1,),
            latents=(1044,),
            vocoder=(96, 128, 160, 256),  # several, because compilers refuse single sizes of vocoders
            conditioning=(173, 345, 517),  # 2, 4 and 6 s: what coqui-tts cuts a reference into
        )

    def dimensions(self, graph: str) -> tuple[Sizes, ...]:
        """The sizes of each dimension of a graph's buckets, as `GraphSpec.dimensions` names them."""
        names = CATALOGUE[graph].dimensions
        other = graph in DECODERS and graph != self.decoder
        return tuple(() if other else getattr(self, name) for name in names)

    @property
    def decoder(self) -> str:
        """The graph that decodes."""
        return DECODERS[self.steps > 1]

    def wants(self, graph: str) -> bool:
        """Whether it has sizes, or exact ones, for a graph."""
        return () not in self.dimensions(graph)

    def lacking(self, unfit: Mapping[str, str]) -> dict[str, str]:
        """Of graphs that do not fit a model, each with the reason, those that it wants."""
        return {graph: reason for graph, reason in unfit.items() if self.wants(graph)}

    def buckets(self, graph: str) -> list[Bucket]:
        """Every bucket of a graph, smallest first; none where a dimension is exact."""
        if CATALOGUE[graph].moves:
            return self._moves()
        return list(product(*(sizes or () for sizes in self.dimensions(graph))))

    def room(self, graph: str, bucket: Bucket) -> Bucket:
        """What a graph is made for beside its bucket: the size of its state, or the steps of a call; else nothing."""
        dimension = CATALOGUE[graph].room
        if CATALOGUE[graph].draws:
            return (self.steps,)
        if dimension is None:
            return ()
        sizes: Sizes = getattr(self, dimension)
        return (next((size for size in sizes or () if size > bucket[0]), bucket[0] + 1),)

    def _moves(self) -> list[Bucket]:
        """From prefill's states into every bucket of decoding that holds them, and from there into the next ones."""
        buckets = self.buckets(self.decoder)
        handed_over = {(1, *self.room("prefill", prefill)) for prefill in self.buckets("prefill")}
        joining = {(state, bucket) for state in handed_over for bucket in buckets if bucket[1] >= state[1]}
        growing = {(bucket, other) for bucket in buckets for other in next_buckets(bucket, buckets)}
        return sorted((*a, *b) for a, b in joining | growing if a != b)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data; None means exact shapes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def next_buckets(bucket: Bucket, buckets: Iterable[Bucket]) -> list[Bucket]:
    """Of buckets of two dimensions, the next larger one in each of them."""
    larger = sorted(other for other in buckets if other > bucket)
    same = ([other for other in larger if other[i] == bucket[i]] for i in range(2))
    return [others[0] for others in same if others]


class Buckets:
    """The buckets there are: those of a plan, without those that are unavailable.

    Args:
        plan: the plan.
        unavailable: why a bucket is not to be had, by graph and bucket. It may grow while this is in use.
    """

    def __init__(self, plan: BucketPlan, unavailable: Mapping[tuple[str, Bucket], str]) -> None:
        self.plan = plan
        self.unavailable = unavailable

    def choose(self, graph: str, *needed: int, exact: int = 0) -> Bucket:
        """Return the smallest bucket of ``graph`` that holds ``needed``.

        Args:
            graph: its name.
            needed: one number for each dimension.
            exact: how many of them, counted from the first, must be met exactly; of a graph that takes no padding, all.

        Raises:
            Fallback: if there is none.
        """
        dimensions = self.plan.dimensions(graph)
        if not CATALOGUE[graph].padded:
            exact = len(dimensions)
        fitting = []
        for i, (sizes, wanted) in enumerate(zip(dimensions, needed, strict=True)):
            held = (wanted,) if sizes is None else sizes
            fitting.append([size for size in held if size == wanted or (size > wanted and i >= exact)])
        candidates = list(product(*fitting))
        for bucket in candidates:
            if (graph, bucket) not in self.unavailable:
                return bucket
        if candidates:
            raise Fallback(f"no {graph} graph: {self.unavailable[graph, candidates[0]]}")
        if () in dimensions:
            raise Fallback(f"no {graph} graph")
        # Not what was needed: reasons are counted, and a count per length would drown the report.
        for sizes, wanted in zip(dimensions, needed, strict=True):
            if sizes and sizes[-1] < wanted:
                raise Fallback(f"larger than the largest {graph} bucket ({sizes[-1]})")
        raise Fallback(f"not a length that there is a {graph} graph for")

    def sizes(self, graph: str) -> Sizes:
        """The sizes of a graph of one dimension that are to be had; None where they are exact."""
        (sizes,) = self.plan.dimensions(graph)
        if sizes is None:
            return None
        there = tuple(size for size in sizes if (graph, (size,)) not in self.unavailable)
        if sizes and not there:
            raise Fallback(f"no {graph} graph: {self.unavailable[graph, sizes[:1]]}")
        return there

    def name(self, graph: str, bucket: Bucket) -> str:
        """A bucket as reports write it: ``1x512``; ``exact`` for a dimension that has no sizes."""
        dimensions = self.plan.dimensions(graph)
        return "x".join("exact" if sizes is None else str(n) for sizes, n in zip(dimensions, bucket, strict=True))


def bucket_name(bucket: Sequence[int]) -> str:
    """A bucket as it is written: ``1x512``."""
    return "x".join(map(str, bucket))
