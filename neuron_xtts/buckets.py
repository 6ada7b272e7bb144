"""Bucket plans: the sizes graphs are compiled for, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from neuron_xtts.errors import Fallback

Sizes = tuple[int, ...] | None


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
    """

    prefill: Sizes = None
    decode: Sizes = None
    slots: Sizes = None
    latents: Sizes = None
    vocoder: Sizes = None

    def __post_init__(self) -> None:
        for field in fields(self):
            sizes = getattr(self, field.name)
            if sizes is None:
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
        return cls(prefill=(), decode=(), slots=(), latents=(), vocoder=())

    @classmethod
    def static(cls, max_positions: int = 1044) -> BucketPlan:
        """The default plan for fixed-shape graphs.

        Args:
            max_positions: the longest sequence of the model; for XTTS v2 32 conditioning positions, 404 of text
                and 608 of audio. Powers of two below it keep the padding under half of a bucket.
        """
        lengths = (*(size for size in (128, 256, 512) if size < max_positions), max_positions)
        return cls(prefill=lengths, decode=lengths, slots=(1, 4), latents=lengths, vocoder=(64, 128, 256))

    def choose(self, graph: str, needed: int) -> int:
        """Return the smallest size of ``graph`` that holds ``needed``.

        Raises:
            Fallback: if there is none.
        """
        sizes: Sizes = getattr(self, graph)
        if graph == "slots":
            graph = "decode"
        if sizes is None:
            return needed
        for size in sizes:
            if size >= needed:
                return size
        if not sizes:
            raise Fallback(f"no {graph} graph")
        # Not what was needed: reasons are counted, and a count per length would drown the report.
        raise Fallback(f"larger than the largest {graph} bucket ({sizes[-1]})")

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data; None means exact shapes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
