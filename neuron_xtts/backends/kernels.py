"""Products of the host backend for few rows, where a step is bound by reading weights and cache from memory.

All are operators of torch; what is measured of them stands in docs/performance.md.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from neuron_xtts.graphs.transformer import attention

# What torch.compile makes of linear layers; torch has no public name for it in fp32.
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)

# Called from Python, an operator with packed weights takes 15 us before it begins; from TorchScript 6. (A string,
# because torch.jit.script wants the source file at run time.)
_script = torch.jit.CompilationUnit(
    """
def attend(q: Tensor, k: Tensor, v: Tensor, slots: int, indices: Tensor, offsets: Tensor):
    heads, used, channels = k.shape[1], k.shape[2], k.shape[3]
    scores = torch.bmm(q[0], k[0].transpose(1, 2)).mul_(channels ** -0.5)
    shares = torch.softmax(scores, -1).view(-1)
    table = v.as_strided([(heads - 1) * slots + used, channels], [channels, 1])
    return torch.embedding_bag(table, indices, offsets, False, 0, False, shares)[0].view(q.shape)

def fp16(x: Tensor, weight: __torch__.torch.classes.quantized.LinearPackedParamsBase):
    return torch.ops.quantized.linear_dynamic_fp16(x, weight)

def int8(x: Tensor, weight: __torch__.torch.classes.quantized.LinearPackedParamsBase, reduce_range: bool):
    return torch.ops.quantized.linear_dynamic(x, weight, reduce_range)
"""
)

Product = Callable[[Tensor], Tensor]


def linear(module: Any, x: Tensor) -> Tensor:
    """``module(x)``, faster than MKL's product, which is what torch takes in fp32.

    One row of a GPT-2 ``Conv1D`` is bound by reading the weight. It is a weighted sum of the weight's rows, which is
    what an embedding bag computes, and FBGEMM's reads at the memory's bandwidth. Everything else is oneDNN's.
    """
    kind = type(module)
    if kind not in (Conv1D, nn.Linear) or module._forward_hooks or module._forward_pre_hooks:
        whole: Tensor = module(x)
        return whole
    weight: Tensor = module.weight  # (channels in, channels out) of a Conv1D, else the other way round
    if kind is Conv1D and x.numel() == x.shape[-1] and weight.is_contiguous():
        sums = _bags(weight, *_every_row(weight.shape[0], _parts(weight.shape[0])), x.reshape(-1))
        one: Tensor = sums.sum(0) + module.bias
        return one.view(*x.shape[:-1], -1)
    if not _HAS_ONEDNN or not (x.dtype is weight.dtype is torch.float32) or not weight.is_cpu:
        whole = module(x)
        return whole
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight.t() if kind is Conv1D else weight, module.bias, "none", [], ""
    )
    return product


def _parts(channels: int) -> int:
    """How many equal parts, one per thread if that is possible."""
    parts = torch.get_num_threads()
    while channels % parts:
        parts -= 1
    return parts


def _bags(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of ``table``, one per bag."""
    sums: Tensor = torch.embedding_bag(table, indices, offsets, False, 0, False, weights)[0]
    return sums


@functools.cache
@torch.inference_mode(False)
def _every_row(rows: int, bags: int) -> tuple[Tensor, Tensor]:
    """All rows of a table in as many bags: their indices, and where each bag begins."""
    return torch.arange(rows), torch.arange(bags) * (rows // bags)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _first_rows(heads: int, slots: int, used: int) -> tuple[Tensor, Tensor]:
    """Of a table of ``slots`` rows per head the first ``used``, a bag per head."""
    indices = torch.arange(heads)[:, None] * slots + torch.arange(used)
    return indices.view(-1), torch.arange(heads) * used


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention`, where one query (1, H, 1, K) meets a cache in two products that read it at the memory's speed."""
    heads, used, channels = k.shape[1:]
    slots = v.stride(1) // channels
    if mask is not None or q.shape[0] != 1 or q.shape[2] != 1 or v.stride()[1:] != (slots * channels, channels, 1):
        return attention(q, k, v, mask)
    # Scores (H, 1, S), their softmax, and every row of values weighted by its share: an embedding bag per head.
    attended: Tensor = _script.attend(q, k, v, slots, *_first_rows(heads, slots, used))
    return attended


def fp16_product(weight: Tensor, bias: Tensor) -> tuple[Product, int]:
    """``x @ weight + bias`` with weights kept in fp16 and computed with in fp32, and the bytes they take."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight.t().contiguous(), bias)
    multiply = _script.fp16

    def product(x: Tensor) -> Tensor:
        y: Tensor = multiply(x, packed)
        return y

    return product, 2 * weight.numel()


def int8_product(weight: Tensor, bias: Tensor) -> tuple[Product, int]:
    """``x @ weight + bias`` in int8, and the bytes the weights take.

    One scale per output channel, and one per row of ``x``, found when it comes: rows do not know of each other.
    """
    transposed = weight.t().contiguous()  # (channels out, channels in)
    scales = transposed.abs().amax(1).clamp_min(1e-12) / 127
    zeros = torch.zeros(len(scales), dtype=torch.long)
    quantized = torch.quantize_per_channel(transposed, scales.double(), zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, bias)
    # Without VNNI, FBGEMM adds pairs of products in 16 bits, where only 7 bits of an activation are safe.
    reduce_range = not cpu_has("avx512_vnni", "avx_vnni")
    multiply = _script.int8

    def product(x: Tensor) -> Tensor:
        y: Tensor
        if x.numel() == x.shape[-1]:
            y = multiply(x, packed, reduce_range)
            return y
        # The operator knows one scale for all rows: make them alike first.
        size = x.abs().amax(-1, keepdim=True).clamp_min_(1e-12)
        y = multiply(x / size, packed, reduce_range)
        return y.sub_(bias).mul_(size).add_(bias)

    return product, weight.numel()


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
