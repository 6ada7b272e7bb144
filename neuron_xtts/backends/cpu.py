"""The host backend: graphs run eagerly, over the model's own parameters, in exact shapes unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from neuron_xtts.buckets import Bucket, BucketPlan
from neuron_xtts.graphs.transformer import Decode, Trunk

# Positions by which a state grows: growing copies, and this keeps it rare where shapes are exact.
_GROWTH = 128

# Rows up to which a split product was faster, measured at 1 to 32; prefill and latents have more.
_SPLIT_ROWS = 32


class CpuBackend:
    """Runs graphs on the host CPU.

    Args:
        graphs: the graphs by name, as `Backend.run` knows them, and ``decode``.
        plan: the buckets; None for exact shapes.
    """

    name = "cpu"
    precision = "fp32"

    def __init__(self, graphs: Mapping[str, Any], plan: BucketPlan | None) -> None:
        self.graphs = graphs
        self.plan = plan or BucketPlan()
        self.missing: dict[tuple[str, Bucket], str] = {}
        for graph in graphs.values():
            for module in graph.children():
                if isinstance(module, Trunk):
                    module.linear = linear

    def check(self, graph: str) -> None:
        """See `Backend.check`: graphs of the model's own modules always do."""

    def run(self, graph: str, bucket: Bucket, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """See `Backend.run`."""
        outputs: tuple[Tensor, ...] = self.graphs[graph](*inputs)
        return outputs

    def new_state(self, rows: int, positions: int) -> HostState:
        """See `Backend.new_state`."""
        return HostState(self.graphs["decode"], rows, positions)


class HostState:
    """The decode graph with its keys and values in one tensor (2 * blocks, B, H, S, K): all keys, then all values.

    Zeros, since what a slot holds before it is written must be finite. The operating system hands out their memory
    only as slots are written.
    """

    def __init__(self, decode: Decode, rows: int, positions: int) -> None:
        self._decode = decode
        trunk = decode.trunk
        channels = trunk.ln_f.weight.shape[0] // trunk.heads
        shape = (2 * len(trunk.h), rows, trunk.heads, _rounded(positions), channels)
        self._data = torch.zeros(shape, dtype=trunk.ln_f.weight.dtype)

    @property
    def positions(self) -> int:
        """See `DecodeState.positions`."""
        return self._data.shape[3]

    def fill(self, row: int, keys_and_values: Sequence[Tensor], length: int) -> None:
        """See `DecodeState.fill`."""
        for slots, tensor in zip(self._data[:, row], keys_and_values, strict=True):
            slots[:, :length] = tensor[0, :, :length]

    def grow(self, positions: int) -> None:
        """See `DecodeState.grow`."""
        blocks, rows, heads, held, channels = self._data.shape
        grown = self._data.new_zeros((blocks, rows, heads, _rounded(positions), channels))
        grown[:, :, :, :held] = self._data
        self._data = grown

    def step(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """See `DecodeState.step`."""
        cache = self._data[:, :, :, : mask.shape[-1]].unbind(0)
        latents, logits = self._decode(embeds, positions, mask, *cache)
        return latents, logits

    def prefix(self, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """See `DecodeState.prefix`."""
        keys, values = self._data[:, row, :, :length].chunk(2)
        return list(zip(keys, values, strict=True))


def _rounded(positions: int) -> int:
    return -(-positions // _GROWTH) * _GROWTH


def linear(module: Any, x: Tensor) -> Tensor:
    """``module(x)``; for few rows and a GPT-2 ``Conv1D`` the product is split so that every thread streams weights.

    With few rows the product is bound by reading the weight. MKL reads it well below the memory's bandwidth; one
    product per thread, each over its share of the input channels, comes closer (measured in docs/performance.md).
    """
    rows = x.numel() // x.shape[-1]
    if rows > _SPLIT_ROWS or type(module) is not Conv1D or module._forward_hooks or module._forward_pre_hooks:
        whole: Tensor = module(x)
        return whole
    weight: Tensor = module.weight  # (channels in, channels out)
    parts = torch.get_num_threads()
    while weight.shape[0] % parts:
        parts -= 1
    x_parts = x.reshape(rows, parts, -1).transpose(0, 1)  # (parts, rows, channels in / parts)
    products = torch.bmm(x_parts, weight.view(parts, -1, weight.shape[1]))  # (parts, rows, channels out)
    product: Tensor = products.sum(0) + module.bias
    return product.view(*x.shape[:-1], -1)
