"""Decoding of rows on the host: the blocks of the trunk as one program of TorchScript, over a cache made for it.

The operators are those of the decode graph. Between some twenty of them in each of 30 blocks, Python takes as long as a
sixth of the fastest code; the program does without, and its small operators can afford a layout of the cache in which
attention of all rows, too, is two sums of weighted rows: of a table's, as an embedding bag computes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuron_xtts.backends.host.converted import Linears
from neuron_xtts.backends.host.kernels import WIDTH, linear_alike, product_of, rounded
from neuron_xtts.backends.host.programs import Norm, one_row_blocks, scripted, several_rows_blocks
from neuron_xtts.backends.host.smoothing import Units, linears_of
from neuron_xtts.backends.memory import lazy_zeros
from neuron_xtts.coqui.hooks import is_hooked
from neuron_xtts.graphs.transformer import Decode, KeysAndValues

# Positions by which what attention reads of a row's values grows, a choice of ours: what is beyond its end has a share
# of zero, and where everything is need not be found again at every step.
_STEP = 16
# That there are at least, so that a row that joins moves nobody's cache; a choice of ours.
_SLOTS = 16
# Elements that torch's GELU takes in one thread (GELU_MIN_ELEMENTS_FOR_MULTI_THREADING in ATen), and that all of its
# vectors divide: where its threads begin elsewhere, it computes single elements, which it rounds otherwise.
_SERIAL, _ALIGNED = 2**14, 32


@functools.cache
def _programs(kind: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The blocks for one row, and for several."""
    one, several = product_of(kind), product_of(kind, several=True)
    return scripted(one_row_blocks(one), one), scripted(several_rows_blocks(several), several)


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


class Rows:
    """See `DecodeState`; what a row sees is always what was written for it.

    Inside, what int8 has other units for (`smoothing.py`) is in those, the cached values, too: norms and layers are
    those of when it was made, whatever is converted later.

    Args:
        decode: the graph whose blocks are run.
        linears: how its linear layers are applied.
        slots: for rows, at least. One that nothing is written to takes no memory.
        positions: to hold at first.

    Raises:
        LookupError: a block has layers that the program does not know, or that somebody hooked.
    """

    def __init__(self, decode: Decode, linears: Linears, slots: int, positions: int) -> None:
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
        self._behind_activations = [units and tuple(units) for units in map(linears.takes, _last_layers(decode))]
        self._one, self._several = _programs(linears.kind)
        self._dtype = torch.float32 if linears.kind == "fp32" else torch.float16
        self._allocate(max(slots, _SLOTS), positions)

    def _allocate(self, slots: int, positions: int) -> None:
        _, heads, _, channels = self._decode.trunk.cache_shapes(1, 1)[0]
        blocks, chunks = len(self._decode.trunk.h), rounded(positions) // WIDTH
        # Zeros, since what a slot holds before it is written must be finite.
        keys = lazy_zeros((blocks, slots, heads, chunks, channels, WIDTH), self._dtype)
        values = lazy_zeros((blocks, slots, heads, chunks * WIDTH, channels), self._dtype)
        self._slots, self._keys, self._values = slots, keys, values  # all of it, or nothing if there is no memory
        # Where, in tables of W and K columns, the rows of each head of the first slot are.
        self._chunk_rows = torch.arange(heads * chunks * channels).view(heads, -1)
        self._position_rows = torch.arange(heads * chunks * WIDTH).view(heads, -1)
        self._read: tuple[object, tuple[Tensor, ...]] = None, ()

    @property
    def capacity(self) -> int:
        """See `DecodeState.capacity`."""
        return self._values.shape[3]

    def fill(self, slot: int, cache: KeysAndValues, length: int) -> None:
        """See `DecodeState.fill`."""
        chunks = -(-length // WIDTH)
        for block, (k, v) in enumerate(cache.blocks()):
            keys, values, units = k[0, :, :length], v[0, :, :length], self._units[block]
            padded = F.pad(keys, (0, 0, 0, chunks * WIDTH - length))  # (H, C W, K)
            self._keys[block, slot, :, :chunks] = padded.view(len(padded), chunks, WIDTH, -1).transpose(2, 3)
            self._values[block, slot, :, :length] = units.into(values) if units else values

    def grow(self, slots: int, capacity: int, positions: Sequence[int]) -> None:
        """See `DecodeState.grow`."""
        if slots <= self._slots and capacity <= self.capacity:
            return
        lifted = [self.lift(slot, length) for slot, length in enumerate(positions)]
        self._allocate(max(self._slots, slots), max(self.capacity, capacity))
        for slot, (contents, length) in enumerate(zip(lifted, positions, strict=True)):
            self.put(slot, contents, length)

    def lift(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """See `DecodeState.lift`."""
        chunks = -(-length // WIDTH)
        return self._keys[:, slot, :, :chunks].clone(), self._values[:, slot, :, :length].clone()

    def put(self, slot: int, lifted: tuple[Tensor, Tensor], length: int) -> None:
        """See `DecodeState.put`."""
        keys, values = lifted
        self._keys[:, slot, :, : keys.shape[2]] = keys
        self._values[:, slot, :, :length] = values

    def clear(self, slot: int, length: int) -> None:
        """See `DecodeState.clear`."""
        self._keys[:, slot, :, : -(-length // WIDTH)] = 0
        self._values[:, slot, :, :length] = 0

    def step(
        self, given: Sequence[Tensor], slots: Sequence[int], positions: Sequence[int], width: int
    ) -> tuple[Tensor, Tensor]:
        """See `DecodeState.step`."""
        (embeds,) = given
        if len(slots) == 1:
            (slot,) = slots
            x = self._one(
                embeds,
                self._keys[:, slot],
                self._values[:, slot],
                positions[slot],
                self._chunk_rows,
                self._position_rows,
                self._norms,
                self._layers,
                self._behind_activations,
            )
        else:
            ends = [positions[slot] for slot in slots]
            x = self._several(
                embeds,
                self._keys,
                self._values,
                (*self._written(slots, ends), *self._seen(slots, ends)),
                _mask(ends),
                self._norms,
                self._layers,
                self._behind_activations,
                _together(len(slots), 4 * embeds.shape[-1]),
            )
        return self._outputs(x)

    def cached(self, slot: int, length: int) -> KeysAndValues:
        """See `DecodeState.cached`."""
        keys = self._keys[:, slot].transpose(3, 4).flatten(2, 3)[:, :, :length].float()  # (blocks, H, length, K)
        values = self._values[:, slot, :, :length].float()
        pairs = zip(self._units, values.unbind(0), strict=True)
        return KeysAndValues(keys.unbind(0), [units.out_of(v) if units else v for units, v in pairs])

    def _outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (R, D) and logits (R, V) of the last block's output (R, 1, D)."""
        if self._dtype is torch.float32:
            return self._decode.outputs(x)
        latents = self._decode.trunk.latents(x)[:, 0]
        return latents, linear_alike(self._decode.head, latents)

    def _written(self, slots: Sequence[int], ends: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Where rows write in a block: keys, among all elements (R, H, K); and values, among rows (R, H) of K."""
        channels, width = self._keys.shape[4:]
        slot, at = torch.tensor(slots).view(-1, 1, 1), torch.tensor(ends).view(-1, 1, 1)
        head, chunk = self._chunk_rows[:, :1], at // width * channels  # (H, 1), (R, 1, 1)
        rows = slot * self._chunk_rows.numel() + head + chunk + torch.arange(channels)  # (R, H, K)
        values = slot * self._position_rows.numel() + self._position_rows[:, :1] + at  # (R, H, 1)
        return rows * width + at % width, values.squeeze(2)

    def _seen(self, slots: Sequence[int], ends: Sequence[int]) -> tuple[Tensor, ...]:
        """What rows see in a block: see `Where` in programs.py."""
        chunks = [end // WIDTH + 1 for end in ends]
        steps = [-(-(end + 1) // _STEP) * _STEP for end in ends]
        key = slots, chunks, steps
        if key != self._read[0]:
            self._read = key, self._find(slots, chunks, steps)
        return self._read[1]

    def _find(self, slots: Sequence[int], chunks: Sequence[int], steps: Sequence[int]) -> tuple[Tensor, ...]:
        _, _, heads, _, channels, width = self._keys.shape
        most, rows = max(chunks), range(len(slots))
        key_rows = _gather(self._chunk_rows, slots, [count * channels for count in chunks])
        filled = (torch.arange(most) < torch.tensor(chunks)[:, None]).repeat_interleave(heads, 0)  # (R H, C)
        owners = torch.arange(len(slots) * heads).repeat_interleave(filled.sum(1))
        value_rows = _gather(self._position_rows, slots, steps)
        shares = torch.arange(heads * most * width).view(heads, -1)
        return (
            key_rows,
            _begins(filled.view(-1) * channels),
            owners,
            value_rows,
            _begins(torch.tensor(steps).repeat_interleave(heads)),
            _gather(shares, rows, steps),
        )


def _last_layers(decode: Decode) -> list[nn.Module]:
    return [block.mlp.c_proj for block in decode.trunk.h]


def _gather(table: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Of each slot the first rows of each head, one after another; ``table`` (H, N) has those of the first slot."""
    pairs = zip(slots, lengths, strict=True)
    return torch.cat([(table[:, :length] + slot * table.numel()).reshape(-1) for slot, length in pairs])


def _begins(lengths: Tensor) -> Tensor:
    """Where bags of some lengths begin."""
    return lengths.cumsum(0) - lengths


def _mask(ends: Sequence[int]) -> Tensor:
    """The mask (R, 1, C W) of rows of which each sees up to its end."""
    positions = torch.arange((max(ends) // WIDTH + 1) * WIDTH)
    beyond = positions > torch.tensor(ends).view(-1, 1, 1)
    return torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf)


def _together(rows: int, channels: int) -> int:
    """How many of ``rows`` an activation of so many ``channels`` may take at once, so that each is rounded as alone."""
    elements, threads = rows * channels, torch.get_num_threads()
    if elements <= _SERIAL or -(-elements // threads) % _ALIGNED == 0:
        return rows
    return max(_SERIAL // channels, 1)
