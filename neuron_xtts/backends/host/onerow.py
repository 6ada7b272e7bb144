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

from neuron_xtts.backends.host.converted import Linears
from neuron_xtts.backends.host.kernels import WIDTH, product_of, rounded
from neuron_xtts.backends.host.programs import Norm, one_row_blocks, scripted
from neuron_xtts.backends.host.smoothing import Units, linears_of
from neuron_xtts.backends.memory import lazy_zeros
from neuron_xtts.coqui.hooks import is_hooked
from neuron_xtts.graphs.transformer import Decode, KeysAndValues


@functools.cache
def _program(kind: str) -> Callable[..., Tensor]:
    product = product_of(kind)
    return scripted(one_row_blocks(product), product)


def _norm(module: Any, units: Units | None) -> Norm:
    """The norm, whose output is in ``units``."""
    if type(module) is not nn.LayerNorm or is_hooked(module) or module.weight is None or module.bias is None:
        raise LookupError(f"a {type(module).__name__} with hooks, without weights or of another kind")
    if units is None:
        return module.weight, module.bias, module.eps
    return *units.given(module.weight.detach(), module.bias.detach()), module.eps


def _per_head(units: Units | None, heads: int) -> Units | None:
    """The units of values (H, S, K)."""
    return units and Units(*(tensor.view(heads, 1, -1) for tensor in units))


class OneRow:
    """See `DecodeState`; of one row, and what it sees is always what was written.

    Inside, what int8 has other units for (`smoothing.py`) is in those, the cached values, too: norms and layers are
    those of when it was made, whatever is converted later.

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
        self._norms = [
            _norm(norm, linears.takes(layer))
            for block in blocks
            for norm, layer in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc))
        ]
        self._layers = [linears.argument(layer) for block in blocks for layer in linears_of(block)]
        heads = decode.trunk.heads
        self._units = [_per_head(linears.takes(block.attn.c_proj), heads) for block in blocks]
        # Units behind an activation have no offset.
        self._factors = [units and units.factor for units in (linears.takes(block.mlp.c_proj) for block in blocks)]
        self._run = _program(linears.kind)
        self._dtype = torch.float32 if linears.kind == "fp32" else torch.float16
        self._allocate(positions)

    def _allocate(self, positions: int) -> None:
        _, heads, _, channels = self._decode.cache_shape(1, 1)
        blocks, chunks = len(self._decode.trunk.h), rounded(positions) // WIDTH
        # Zeros, since what a slot holds before it is written must be finite.
        self._keys = lazy_zeros((blocks, heads, chunks, channels, WIDTH), self._dtype)
        self._values = lazy_zeros((blocks, heads, chunks * WIDTH, channels), self._dtype)
        # Where, in tables of W and K columns, the rows of each head are.
        self._chunk_rows = torch.arange(heads * chunks * channels).view(heads, -1)
        self._slot_rows = torch.arange(heads * chunks * WIDTH).view(heads, -1)

    @property
    def capacity(self) -> int:
        """See `DecodeState.capacity`."""
        return self._values.shape[2]

    def fill(self, slot: int, cache: KeysAndValues, length: int) -> None:
        """See `DecodeState.fill`."""
        chunks = -(-length // WIDTH)
        for block, (k, v) in enumerate(cache.blocks()):
            keys, values, units = k[0, :, :length], v[0, :, :length], self._units[block]
            padded = F.pad(keys, (0, 0, 0, chunks * WIDTH - length))  # (H, C W, K)
            self._keys[block, :, :chunks] = padded.view(len(padded), chunks, WIDTH, -1).transpose(2, 3)
            self._values[block, :, :length] = units.into(values) if units else values

    def grow(self, capacity: int) -> None:
        """See `DecodeState.grow`."""
        keys, values = self._keys, self._values
        self._allocate(capacity)
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
            self._factors,
        )
        return self._decode.outputs(x)

    def cached(self, slot: int, length: int) -> KeysAndValues:
        """See `DecodeState.cached`."""
        keys = self._keys.transpose(3, 4).flatten(2, 3)[:, :, :length].float()  # (blocks, H, length, K)
        values = self._values[:, :, :length].float()
        pairs = zip(self._units, values.unbind(0), strict=True)
        return KeysAndValues(keys.unbind(0), [units.out_of(v) if units else v for units, v in pairs])
