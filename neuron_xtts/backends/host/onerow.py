"""Decoding of one row on the host: the blocks of the trunk as one program of TorchScript, over a cache made for it.

The operators are those of the decode graph. Between some twenty of them in each of 30 blocks, Python takes as long as a
sixth of the fastest code; the program does without, and its small operators can afford a layout of the cache in which
attention, too, is two sums of weighted rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuron_xtts.backends.host.converted import Linears, linears_of
from neuron_xtts.backends.host.kernels import compiled, lazy_zeros, product_source, rounded
from neuron_xtts.coqui.hooks import is_hooked
from neuron_xtts.graphs.transformer import Decode, KeysAndValues

# Positions whose keys lie side by side, a choice of ours: a row of them is a cache line or two.
_WIDTH = 64

# H heads, K channels per head, S slots, C chunks of W slots: keys (blocks, H, C, K, W), values (blocks, H, S, K).
_PROGRAM = """
def norm(x: Tensor, layer: Tuple[Tensor, Tensor, float]):
    return torch.layer_norm(x, [x.shape[-1]], layer[0], layer[1], layer[2])

def sums(table: Tensor, rows: Tensor, bags: Tensor, weights: Tensor):
    return torch.embedding_bag(table, rows, bags, False, 0, False, weights.to(table.dtype))[0]

def run(
    x: Tensor, keys: Tensor, values: Tensor, at: int, chunk_rows: Tensor, slot_rows: Tensor,
    norms: List[Tuple[Tensor, Tensor, float]], layers: List[{layer}],
):
    heads, channels, width = keys.shape[1], keys.shape[3], keys.shape[4]
    chunks, used = at // width + 1, at + 1
    chunk_rows = chunk_rows.narrow(1, 0, chunks * channels).reshape(-1)
    slot_rows = slot_rows.narrow(1, 0, used).reshape(-1)
    chunk_bags, slot_bags = torch.arange(heads * chunks) * channels, torch.arange(heads) * used
    for i in range(keys.shape[0]):
        k, v = keys[i], values[i]
        query, key, value = product(norm(x, norms[2 * i]), layers[4 * i]).view(3, heads, channels).unbind()
        k.select(3, at % width).select(1, at // width).copy_(key)
        v.select(1, at).copy_(value)
        query = (query * channels ** -0.5).unsqueeze(1).expand(heads, chunks, channels).reshape(-1)
        scores = sums(k.view(-1, width), chunk_rows, chunk_bags, query).view(heads, -1).narrow(1, 0, used)
        shares = torch.softmax(scores, -1, dtype=torch.float).view(-1)
        attended = sums(v.view(-1, channels), slot_rows, slot_bags, shares).to(x.dtype).view(x.shape)
        x = x + product(attended, layers[4 * i + 1])
        hidden = torch.ops.aten.gelu(product(norm(x, norms[2 * i + 1]), layers[4 * i + 2]), approximate="tanh")
        x = x + product(hidden, layers[4 * i + 3])
    return x
"""


@functools.cache
def _program(kind: str) -> Callable[..., Tensor]:
    layer, product = product_source(kind)
    return compiled(product + _PROGRAM.format(layer=layer), "run")


def _norm(module: Any) -> tuple[Tensor, Tensor, float]:
    if type(module) is not nn.LayerNorm or is_hooked(module) or module.weight is None or module.bias is None:
        raise LookupError(f"a {type(module).__name__} with hooks, without weights or of another kind")
    return module.weight, module.bias, module.eps


class OneRow:
    """See `DecodeState`; of one row, and what it sees is always what was written.

    Args:
        decode: the graph whose blocks are run.
        linears: how its linear layers are applied.
        positions: to hold at first.

    Raises:
        LookupError: a block has layers that the program does not know, or that somebody hooked.
    """

    def __init__(self, decode: Decode, linears: Linears, positions: int) -> None:
        self._decode = decode
        blocks = decode.trunk.h
        self._norms = [_norm(norm) for block in blocks for norm in (block.ln_1, block.ln_2)]
        self._layers = [linears.argument(layer) for block in blocks for layer in linears_of(block)]
        self._run = _program(linears.kind)
        self._dtype = torch.float32 if linears.kind == "fp32" else torch.float16
        self._allocate(positions)

    def _allocate(self, positions: int) -> None:
        _, heads, _, channels = self._decode.cache_shape(1, 1)
        blocks, chunks = len(self._decode.trunk.h), rounded(positions) // _WIDTH
        # Zeros, since what a slot holds before it is written must be finite.
        self._keys = lazy_zeros((blocks, heads, chunks, channels, _WIDTH), self._dtype)
        self._values = lazy_zeros((blocks, heads, chunks * _WIDTH, channels), self._dtype)
        # Where, in tables of W and K columns, the rows of each head are.
        self._chunk_rows = torch.arange(heads * chunks * channels).view(heads, -1)
        self._slot_rows = torch.arange(heads * chunks * _WIDTH).view(heads, -1)

    @property
    def capacity(self) -> int:
        """See `DecodeState.capacity`."""
        return self._values.shape[2]

    def fill(self, row: int, cache: KeysAndValues, length: int) -> None:
        """See `DecodeState.fill`."""
        chunks = -(-length // _WIDTH)
        for block, (k, v) in enumerate(cache.blocks()):
            keys, values = k[0, :, :length], v[0, :, :length]
            padded = F.pad(keys, (0, 0, 0, chunks * _WIDTH - length))  # (H, C W, K)
            self._keys[block, :, :chunks] = padded.view(len(padded), chunks, _WIDTH, -1).transpose(2, 3)
            self._values[block, :, :length] = values

    def grow(self, positions: int) -> None:
        """See `DecodeState.grow`."""
        keys, values = self._keys, self._values
        self._allocate(positions)
        self._keys[:, :, : keys.shape[2]] = keys
        self._values[:, :, : values.shape[2]] = values

    def step(self, embeds: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """See `DecodeState.step`."""
        x = self._run(
            embeds,
            self._keys,
            self._values,
            int(positions),
            self._chunk_rows,
            self._slot_rows,
            self._norms,
            self._layers,
        )
        return self._decode.outputs(x)

    def cached(self, row: int, length: int) -> KeysAndValues:
        """See `DecodeState.cached`."""
        keys = self._keys.transpose(3, 4).flatten(2, 3)  # (blocks, H, S, K)
        first = (tensor[:, :, :length].float().unbind(0) for tensor in (keys, self._values))
        return KeysAndValues(*first)
