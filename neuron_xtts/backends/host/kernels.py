"""Products of the host backend for few rows, where a step is bound by reading weights and cache from memory.

All are operators of torch; what is measured of them stands in docs/performance.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from neuron_xtts.backends.host.programs import (
    product_fp16,
    product_fp32,
    product_fp32_of_rows,
    product_int8,
    scripted,
)
from neuron_xtts.coqui.hooks import is_hooked

# What torch.compile makes of linear layers; torch has no public name for it in fp32.
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)


Product = Callable[[Tensor, Any], Tensor]  # of rows and a layer

# Rows that decode together at most, of which each is computed as if alone; a choice of ours.
_MOST_ROWS = 64


def product_of(kind: str, *, several: bool = False) -> Product:
    """The product of rows and a linear layer as ``product(x, layer)``, in Python.

    Args:
        kind: of weights: ``"fp32"``, ``"fp16"`` or ``"int8"``.
        several: rows; of fp32 it is for one only, unless asked.
    """
    one: dict[str, Product] = {"fp32": product_fp32, "fp16": product_fp16, "int8": product_int8}
    products = one | {"fp32": product_fp32_of_rows} if several else one
    return products[kind]


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


def linear_alike(module: Any, x: Tensor) -> Tensor:
    """``linear(module, x)`` of rows (R, C), each of which has the same result in any company.

    oneDNN's products are summed in another order for another number of rows, and sometimes for other places among
    them. They are taken in groups of a size, filled up with zeros, in which no place differs on this CPU.
    """
    if type(module) is not nn.Linear or is_hooked(module):
        return linear(module, x)
    size = _group(module.in_features, module.out_features, torch.get_num_threads())
    parts = [linear(module, F.pad(part, (0, 0, 0, size - len(part))))[: len(part)] for part in torch.split(x, size)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@functools.cache
def _group(channels_in: int, channels_out: int, threads: int) -> int:
    """How many rows a product of a linear layer takes so that a row's place is nothing to its result."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Not initialized, which would draw from torch's global generator in the midst of somebody's codes.
        module = nn.utils.skip_init(nn.Linear, channels_in, channels_out)  # type: ignore[no-untyped-call]
        module.weight.normal_(generator=generator)
        module.bias.zero_()
        row = torch.randn(1, channels_in, generator=generator)
        for size in (4, 8, 16, 2):
            places = linear(module, row.expand(size, -1).contiguous())
            if bool((places == places[0]).all()):
                return size
    return 1


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


def pack(kind: str, weight: Tensor, bias: Tensor, *, positive: bool = False) -> Any:
    """Weights (channels in, channels out) and bias as a layer that `multiply` takes.

    Args:
        kind: ``"fp16"``, or ``"int8"`` with a scale per output channel.
        weight: in fp32.
        bias: likewise; it stays in fp32.
        positive: whether no input of the layer is below zero, of which int8 then keeps no steps free.
    """
    transposed = weight.t().contiguous()  # (channels out, channels in)
    if kind == "fp16":
        packed = torch.ops.quantized.linear_prepack_fp16(transposed, bias)
        return packed, _rows_to_make(len(weight), torch.get_num_threads())
    scales = transposed.abs().amax(1).clamp_min(1e-12) / 127
    zeros = torch.zeros(len(scales), dtype=torch.long)
    quantized = torch.quantize_per_channel(transposed, scales.double(), zeros, 0, torch.qint8)
    steps = 255 if cpu_has("avx512_vnni", "avx_vnni") else _steps_that_fit(quantized.int_repr())
    half = (steps + 1) // 2
    scale, zero_point = (1 / steps, 0) if positive else (1 / (half - 1), half)
    return torch.ops.quantized.linear_prepack(quantized, None), bias, scale, zero_point


def _steps_that_fit(weight: Tensor, share: float = 1e-4) -> int:
    """How many steps an activation may have where FBGEMM adds pairs of products in 16 bits, as it does without VNNI.

    So many that, but for a share of the pairs, the largest two activations side by side do not overflow.

    Args:
        weight: (channels out, channels in) in int8; pairs are neighbours.
        share: of pairs.
    """
    some = weight[::8]  # enough to tell, and sooner told
    pairs = F.pad(some, (0, weight.shape[1] % 2)).to(torch.int16).view(len(some), -1, 2)
    sizes = torch.maximum(pairs.clamp_min(0).sum(-1), -pairs.clamp_max(0).sum(-1))
    counts = torch.bincount(sizes.flatten(), minlength=1)
    beyond = counts.sum() - counts.cumsum(0)  # pairs that are larger
    largest = int((beyond <= share * sizes.numel()).int().argmax())
    return min((2**15 - 1) // max(largest, 1), 255)


@functools.cache
def _rows_to_make(channels: int, threads: int) -> list[int]:
    """How many rows, by filling up with zeros, FBGEMM's product with weights in fp16 is to make of a number of rows.

    It has a kernel for each number of rows that are left, and some sum in another order than most: rows of a batch, and
    one by itself, would be rounded in their own ways.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, channels, generator=generator)
    packed = torch.ops.quantized.linear_prepack_fp16(weight, torch.zeros(64))
    row = torch.randn(1, channels, generator=generator)

    def product(rows: int) -> Tensor:
        result: Tensor = torch.ops.quantized.linear_dynamic_fp16(row.expand(rows, -1).contiguous(), packed)
        return result

    usual = product(_MOST_ROWS)[0]
    alike = [rows > 0 and bool((product(rows) == usual).all()) for rows in range(_MOST_ROWS + 1)]
    return [next((more for more in range(rows, len(alike)) if alike[more]), rows) for rows in range(len(alike))]


def multiply(kind: str, x: Tensor, layer: Any) -> Tensor:
    """``x @ weight + bias`` with what `pack` made of them: in fp32 with weights in fp16, or in int8.

    In int8 every row of ``x`` has a scale of its own, found when it comes: rows do not know of each other.
    """
    return _product(kind)(x, layer)


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
