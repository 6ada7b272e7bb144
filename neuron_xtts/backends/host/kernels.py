"""Products of the host backend for few rows, where a step is bound by reading weights and cache from memory.

All are operators of torch; what is measured of them stands in docs/performance.md.
"""

from __future__ import annotations

import functools
import logging
import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from neuron_xtts.coqui.hooks import is_hooked

logger = logging.getLogger(__name__)

# What torch.compile makes of linear layers; torch has no public name for it in fp32.
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)

_PACKED = "__torch__.torch.classes.quantized.LinearPackedParamsBase"

# The product of a linear layer and one row, or more in fp16 and int8, and the type of the layer, in TorchScript: called
# from Python, an operator with packed weights takes 15 us before it begins; from TorchScript 6. (Strings, because
# torch.jit.script wants the source file at run time.)
_PRODUCTS = {
    "fp32": (
        "Tuple[Tensor, Tensor, Tensor, Tensor]",
        """
def product(x: Tensor, layer: Tuple[Tensor, Tensor, Tensor, Tensor]):
    weight, bias, rows, bags = layer
    sums = torch.embedding_bag(weight, rows, bags, False, 0, False, x.reshape(-1))[0]
    return (sums.sum(0) + bias).view(list(x.shape[:-1]) + [-1])
""",
    ),
    "fp16": (
        _PACKED,
        f"""
def product(x: Tensor, layer: {_PACKED}):
    return torch.ops.quantized.linear_dynamic_fp16(x, layer)
""",
    ),
    "int8": (
        _PACKED,
        f"""
def product(x: Tensor, layer: {_PACKED}):
    return torch.ops.quantized.linear_dynamic(x, layer, REDUCE_RANGE)
""",
    ),
}


def product_source(kind: str) -> tuple[str, str]:
    """The type of a linear layer and its product as ``product(x, layer)``, in TorchScript.

    Args:
        kind: of weights: ``"fp32"``, for one row only, ``"fp16"`` or ``"int8"``.
    """
    layer, source = _PRODUCTS[kind]
    # Without VNNI, FBGEMM adds pairs of products in 16 bits, where only 7 bits of an activation are safe.
    return layer, source.replace("REDUCE_RANGE", str(not cpu_has("avx512_vnni", "avx_vnni")))


@functools.cache
def _product(kind: str) -> Callable[[Tensor, Any], Tensor]:
    return compiled(product_source(kind)[1], "product")


def compiled(source: str, name: str) -> Callable[..., Tensor]:
    """The function ``name`` of a source in TorchScript, or in Python, if torch, which gives it up, has it no more."""
    try:
        return getattr(torch.jit.CompilationUnit(source), name)  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError) as error:
        logger.warning("decoding is slower than it could be without TorchScript: %s", error)
        namespace: dict[str, Any] = {"torch": torch}
        exec(f"from __future__ import annotations\n{source}", namespace)
        return namespace[name]  # type: ignore[no-any-return]


def linear(module: Any, x: Tensor) -> Tensor:
    """``module(x)``, faster than MKL's product, which is what torch takes in fp32.

    One row of a GPT-2 ``Conv1D`` is bound by reading the weight. It is a weighted sum of the weight's rows, which is
    what an embedding bag computes, and FBGEMM's reads at the memory's bandwidth. Everything else is oneDNN's.
    """
    kind = type(module)
    if kind not in (Conv1D, nn.Linear) or is_hooked(module):
        whole: Tensor = module(x)
        return whole
    weight: Tensor = module.weight  # (channels in, channels out) of a Conv1D, else the other way round
    if kind is Conv1D and x.numel() == x.shape[-1] and weight.is_contiguous():
        return _product("fp32")(x, row_layer(module))
    if not _HAS_ONEDNN or not (x.dtype is weight.dtype is torch.float32) or not weight.is_cpu:
        whole = module(x)
        return whole
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight.t() if kind is Conv1D else weight, module.bias, "none", [], ""
    )
    return product


def row_layer(module: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A ``Conv1D`` as ``product`` in fp32 wants it: its weight's rows in equal parts, one per thread if possible."""
    channels = module.weight.shape[0]
    parts = torch.get_num_threads()
    while channels % parts:
        parts -= 1
    return module.weight, module.bias, *_every_row(channels, parts)


@functools.cache
@torch.inference_mode(False)
def _every_row(rows: int, bags: int) -> tuple[Tensor, Tensor]:
    """All rows of a table in as many bags: their indices, and where each bag begins."""
    return torch.arange(rows), torch.arange(bags) * (rows // bags)


def pack(kind: str, weight: Tensor, bias: Tensor) -> Any:
    """Weights (channels in, channels out) and bias for `multiply`.

    Args:
        kind: ``"fp16"``, or ``"int8"`` with a scale per output channel.
        weight: in fp32.
        bias: likewise; it stays in fp32.
    """
    transposed = weight.t().contiguous()  # (channels out, channels in)
    if kind == "fp16":
        return torch.ops.quantized.linear_prepack_fp16(transposed, bias)
    scales = transposed.abs().amax(1).clamp_min(1e-12) / 127
    zeros = torch.zeros(len(scales), dtype=torch.long)
    quantized = torch.quantize_per_channel(transposed, scales.double(), zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(quantized, bias)


def multiply(kind: str, x: Tensor, packed: Any, bias: Tensor) -> Tensor:
    """``x @ weight + bias`` with what `pack` made of them: in fp32 with weights in fp16, or in int8.

    In int8 every row of ``x`` has a scale of its own, found when it comes: rows do not know of each other.
    """
    product = _product(kind)
    if kind == "fp16" or x.numel() == x.shape[-1]:
        return product(x, packed)
    # The operator knows one scale for all rows: make them alike first.
    size = x.abs().amax(-1, keepdim=True).clamp_min_(1e-12)
    return product(x / size, packed).sub_(bias).mul_(size).add_(bias)


# Positions, of all rows together, by which a KV cache grows: growing copies, and XTTS v2 has 1044 at most.
GROWTH = 1152


def rounded(positions: int, rows: int = 1) -> int:
    """The positions to allocate for each of ``rows``."""
    growth = GROWTH // min(rows, 9)  # so that many rows still grow by 128 at a time
    return -(-positions // growth) * growth


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros whose memory the operating system hands out as they are written, in small pages."""
    # Not numpy.zeros: it asks for huge pages, of which a KV cache soon touches every one.
    private: dict[str, int] = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **private)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def cpu_has(*flags: str) -> bool:
    """Whether the CPU has one of these instruction sets, as Linux names them."""
    try:
        with open("/proc/cpuinfo") as file:
            line = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return not set(flags).isdisjoint(line.split())
