"""Precisions: what each means for each graph on each backend, and how far its results may be off."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from packaging.version import Version

from neuron_xtts.graphs.catalogue import CATALOGUE, GRAPHS

# neuronx-cc's flags for automatic casts, always stated: their defaults changed with 2.22.
_EXACT = ("--auto-cast=none",)
_MATMULT_BF16 = ("--auto-cast=matmult", "--auto-cast-type=bf16")
_ALL_BF16 = ("--auto-cast=all", "--auto-cast-type=bf16")

# By precision, the families of graphs that the compiler casts.
_CASTS = {
    "fp32": {},
    "bf16": {},
    # As in the first published XTTS on inf2, which cast everything but left conditioning on the CPU.
    "bf16-all": {"transformer": _ALL_BF16, "vocoder": _ALL_BF16},
}
# And those that are traced with weights in bf16: whether the compiler stores what it casts is not documented.
_ROUNDED = {"bf16": ("transformer",), "bf16-all": ("transformer",)}

NEURON_PRECISIONS = tuple(_CASTS)


@dataclass(frozen=True)
class HostPrecision:
    """What a precision means on the host.

    Embeddings, norms, attention, the heads, the conditioning encoder and sampling are always in fp32. The cache of one
    row is in fp16 unless linear layers are in fp32.

    Attributes:
        name: as in ``patch(precision=...)``.
        linears: how the weights of the trunk's linear layers are kept: ``"fp32"``; ``"fp16"``, multiplied in fp32;
            ``"int8"``, multiplied with activations in 8 bits.
        vocoder: what the vocoder computes in, where the CPU has instructions for it; else in fp32.
    """

    name: str
    linears: str
    vocoder: str


# 16 bits are kept as fp16, not bf16, because FBGEMM multiplies those as fast and they round an eighth as much.
HOST = {
    precision.name: precision
    for precision in (
        HostPrecision("fp32", "fp32", "fp32"),
        HostPrecision("bf16", "fp16", "bf16"),
        HostPrecision("int8", "int8", "bf16"),
    )
}
HOST_PRECISIONS = tuple(HOST)
WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}

# Compilers before this one compute a convolution wrongly, without a word, if its kernel is smaller than its dilation
# (release notes of Neuron 2.30).
SMALL_KERNELS_FIXED = Version("2.25")
# The first to know these flags, and to announce that 64-bit integers will become errors without them. They are
# documented for trn2 and later, and other flags of that kind are refused for other targets.
_INT64_FLAGS_SINCE = Version("2.27")
_INT64_FLAGS = ("--native-int64=disabled", "--implicit-integer-downcast=all")


@dataclass(frozen=True)
class Tolerance:
    """How far a compiled graph may be from the same graph on the host. A choice of ours, not tried on a device.

    Attributes:
        error: largest difference, as a share of the largest value of that output.
        pcc: smallest Pearson correlation.
    """

    error: float
    pcc: float

    def or_looser(self, other: Tolerance) -> Tolerance:
        """What either of both allows."""
        return Tolerance(max(self.error, other.error), min(self.pcc, other.pcc))


_TOLERANCES = {
    _EXACT: Tolerance(1e-3, 0.9999),
    _MATMULT_BF16: Tolerance(0.1, 0.999),
    _ALL_BF16: Tolerance(0.2, 0.98),
}
# What rounding alone makes of the same graphs, computed on the host by experiments/rounding.py, is off by a fifth of
# this at most.
_WITH_BF16_WEIGHTS = Tolerance(0.1, 0.999)
# A whole model in fp32 is reported to be off by 3.6e-6 on trn1, but by 1.4e-3 to 3.8e-3 on trn2.
_EXACT_ON_TRN2 = Tolerance(1e-2, 0.9999)


@dataclass(frozen=True)
class Precision:
    """A precision by name, and what the user wants otherwise for single graphs.

    Attributes:
        name: ``"fp32"``; ``"bf16"`` (matrix products of the GPT in bf16); on Neuron ``"bf16-all"`` (everything in GPT
            and vocoder in bf16); on the host ``"int8"``. `HOST` has what they mean there.
        arguments: neuronx-cc's arguments to add, by graph, such as ``{"vocoder": "-O2"}``; the last of several that
            contradict each other wins.
        release: on the host, move the weights that were converted out of memory, into the folder of the store, until
            `unpatch` brings them back. Fallbacks read them from there.
    """

    name: str = "fp32"
    arguments: Mapping[str, str] = field(default_factory=dict)
    release: bool = False

    def __post_init__(self) -> None:
        if self.name not in _CASTS and self.name not in HOST:
            names = ", ".join(map(repr, HOST | _CASTS))
            raise ValueError(f"precision {self.name!r} does not exist; choose one of {names}")
        for graph, arguments in self.arguments.items():
            if graph not in GRAPHS:
                raise ValueError(f"there is no graph {graph!r}; choose one of {', '.join(map(repr, GRAPHS))}")
            if not isinstance(arguments, str):
                raise TypeError(f"compiler arguments of {graph} must be a string, got a {type(arguments).__name__}")
        object.__setattr__(self, "arguments", dict(self.arguments))

    def rounds(self, graph: str) -> bool:
        """Whether a graph is compiled with weights in bf16, those that may be (`Graph.round_weights`)."""
        return not CATALOGUE[graph].moves and CATALOGUE[graph].family in _ROUNDED.get(self.name, ())

    def casts(self, graph: str) -> tuple[str, ...]:
        """The flags for automatic casts of one graph."""
        if CATALOGUE[graph].draws or CATALOGUE[graph].moves:
            return _EXACT
        return _CASTS[self.name].get(CATALOGUE[graph].family, _EXACT)

    def compiler_arguments(self, graph: str, target: str, compiler: str) -> tuple[str, ...]:
        """What neuronx-cc is given.

        Args:
            graph: its name.
            target: one of `device.TARGETS`.
            compiler: version of neuronx-cc.
        """
        spec = CATALOGUE[graph]
        arguments = [f"--target={target}", f"--model-type={spec.model_type}", *self.casts(graph)]
        if target in spec.optlevel:
            arguments.append(f"--optlevel={spec.optlevel[target]}")
        if target == "trn2" and Version(compiler) >= _INT64_FLAGS_SINCE:
            arguments += _INT64_FLAGS
        return (*arguments, *self.arguments.get(graph, "").split())

    def tolerance(self, graph: str, target: str) -> Tolerance:
        """How far a compiled graph may be off. Casts that the user added loosen it, those taken away do not tighten.

        Args:
            graph: its name.
            target: that it was compiled for.
        """
        added = re.search(r"--auto-cast[= ](all|matmult)", self.arguments.get(graph, ""))
        casts = {"all": _ALL_BF16, "matmult": _MATMULT_BF16}[added[1]] if added else self.casts(graph)
        if casts != _EXACT:
            return _TOLERANCES[casts]
        if self.rounds(graph):
            return _WITH_BF16_WEIGHTS
        return _EXACT_ON_TRN2 if target == "trn2" else _TOLERANCES[_EXACT]


def has_small_kernel_defect(compiler: str) -> bool:
    """Whether this neuronx-cc computes convolutions wrongly whose kernel is smaller than their dilation."""
    return Version(compiler) < SMALL_KERNELS_FIXED
