"""Products of the host backend for few rows, where a step is bound by reading weights and cache from memory.

All are operators of torch; what is measured of them stands in docs/performance.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from neuron_xtts.backends.host.programs import product_fp16, product_fp32, product_int8, scripted
from neuron_xtts.coqui.hooks import is_hooked

# What torch.compile makes of linear layers; torch has no public name for it in fp32.
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)


def product_of(kind: str) -> Callable[[Tensor, Any], Tensor]:
    """The product of rows and a linear layer as ``product(x, layer)``, in Python.

    Args:
        kind: of weights: ``"fp32"``, for one row only, ``"fp16"`` or ``"int8"``.
    """
    if kind == "int8":
        # Without VNNI, FBGEMM adds pairs of products in 16 bits, where only 7 bits of an activation are safe.
        return product_int8(reduce_range=not cpu_has("avx512_vnni", "avx_vnni"))
    return {"fp32": product_fp32, "fp16": product_fp16}[kind]


@functools.cache
def _product(kind: str) -> Callable[[Tensor, Any], Tensor]:
    return scripted(product_of(kind))


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
    """A ``Conv1D`` as `product_fp32` takes it: its weight's rows in equal parts, one per thread if possible."""
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


def pack(kind: str, weight: Tensor, bias: Tensor) -> torch.ScriptObject:
    """Weights (channels in, channels out) and bias for `multiply`.

    Args:
        kind: ``"fp16"``, or ``"int8"`` with a scale per output channel.
        weight: in fp32.
        bias: likewise; it stays in fp32.
    """
    transposed = weight.t().contiguous()  # (channels out, channels in)
    if kind == "fp16":
        half: torch.ScriptObject = torch.ops.quantized.linear_prepack_fp16(transposed, bias)
        return half
    scales = transposed.abs().amax(1).clamp_min(1e-12) / 127
    zeros = torch.zeros(len(scales), dtype=torch.long)
    quantized = torch.quantize_per_channel(transposed, scales.double(), zeros, 0, torch.qint8)
    packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(quantized, bias)
    return packed


def multiply(kind: str, x: Tensor, packed: torch.ScriptObject, bias: Tensor) -> Tensor:
    """``x @ weight + bias`` with what `pack` made of them: in fp32 with weights in fp16, or in int8.

    In int8 every row of ``x`` has a scale of its own, found when it comes: rows do not know of each other.
    """
    product = _product(kind)
    if kind == "fp16" or x.numel() == x.shape[-1]:
        return product(x, packed)
    # The operator knows one scale for all rows: make them alike first.
    size = x.abs().amax(-1, keepdim=True).clamp_min_(1e-12)
    return product(x / size, packed).sub_(bias).mul_(size).add_(bias)


# Positions whose keys lie side by side in the cache of one row, a choice of ours: a row of them is a cache line or two.
WIDTH = 64
# Positions, of all rows together, by which a KV cache grows: growing copies, and XTTS v2 has 1044 at most.
GROWTH = 18 * WIDTH


def rounded(positions: int, rows: int = 1) -> int:
    """The positions to allocate for each of ``rows``."""
    growth = GROWTH // min(rows, 9)  # so that many rows still grow by 128 at a time
    return -(-positions // growth) * growth


def cpu_has(*flags: str) -> bool:
    """Whether the CPU has one of these instruction sets, as Linux names them."""
    try:
        with open("/proc/cpuinfo") as file:
            line = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return not set(flags).isdisjoint(line.split())
