"""The catalogue: every graph there is, with what is known of it in one place.

A graph of another kind is a file here, a recogniser in ``neuron_xtts.coqui.recognise``, which says what of a model it
is made of, and a row of `CATALOGUE`; if no dimension that is there fits, also a field of ``BucketPlan``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from neuron_xtts.graphs.codes import Codes, CodeTables
from neuron_xtts.graphs.conditioning import Conditioning
from neuron_xtts.graphs.move import Move
from neuron_xtts.graphs.operators import Graph
from neuron_xtts.graphs.transformer import Decode, Latents, Prefill, Trunk
from neuron_xtts.graphs.vocoder import Vocoder


class TransformerParts(NamedTuple):
    """What graphs of the transformer are made of; ``tables`` are asked for by the one that needs them."""

    trunk: Trunk
    head: nn.Linear
    tables: Callable[[], CodeTables]


@dataclass(frozen=True)
class GraphSpec:
    """What is known of a graph.

    Attributes:
        name: as in reports, artifacts and ``Precision.arguments``.
        family: graphs of a family are made of the same parts of a model, share its weights and have one precision.
        dimensions: of its buckets, fields of ``BucketPlan``.
        room: the dimension of whose sizes the next larger one is that of its state.
        moves: whether it leads from one bucket of the graph that decodes to another, which are its bucket.
        draws: whether it makes several codes in a call. The compiler never casts it: it counts.
        padded: whether an input may be padded to a larger size; else a size serves exactly that size.
        model_type: what neuronx-cc is told that it is.
        optlevel: of neuronx-cc, by target, where it is not the default.
        graph: its class.
        build: makes it of its family's parts.
    """

    name: str
    family: str
    dimensions: tuple[str, ...]
    graph: type[Graph]
    build: Callable[[Any], Graph]
    room: str | None = None
    moves: bool = False
    draws: bool = False
    padded: bool = True
    model_type: str = "transformer"
    optlevel: Mapping[str, int] = field(default_factory=dict)


_ROWS = (
    GraphSpec("prefill", "transformer", ("prefill",), Prefill, lambda parts: Prefill(*parts[:2]), room="decode"),
    GraphSpec("decode", "transformer", ("slots", "decode"), Decode, lambda parts: Decode(*parts[:2])),
    GraphSpec(
        "codes",
        "transformer",
        ("slots", "decode"),
        Codes,
        lambda parts: Codes(Decode(*parts[:2]), parts.tables()),
        draws=True,
    ),
    GraphSpec("move", "transformer", (), Move, lambda parts: Move(parts.trunk.cache_shapes(1, 1)), moves=True),
    GraphSpec("latents", "transformer", ("latents",), Latents, lambda parts: Latents(parts.trunk)),
    GraphSpec(
        "vocoder",
        "vocoder",
        ("vocoder",),
        Vocoder,
        Vocoder,
        model_type="generic",
        optlevel={"inf2": 1},  # at 2, long convolutions of vocoders do not fit the core's buffers
    ),
    GraphSpec(
        "conditioning",
        "conditioning",
        ("conditioning",),
        Conditioning,
        lambda parts: Conditioning(*parts),
        padded=False,
        model_type="generic",
    ),
)
CATALOGUE = {spec.name: spec for spec in _ROWS}
GRAPHS = tuple(CATALOGUE)
