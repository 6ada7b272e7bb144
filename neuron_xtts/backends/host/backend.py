"""The host backend: graphs run eagerly, in exact shapes where that is fastest, unless told otherwise."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from neuron_xtts.backends import Exclusive
from neuron_xtts.backends.host.converted import HostVocoder, Linears
from neuron_xtts.backends.host.kernels import cpu_has, rounded
from neuron_xtts.backends.host.operators import HostOperators
from neuron_xtts.backends.host.rows import Rows
from neuron_xtts.backends.memory import Aside, lazy_zeros
from neuron_xtts.buckets import Bucket, BucketPlan
from neuron_xtts.coqui.sample import Sample
from neuron_xtts.errors import Fallback
from neuron_xtts.graphs.operators import Graph
from neuron_xtts.graphs.transformer import Decode, KeysAndValues, Trunk
from neuron_xtts.graphs.vocoder import Vocoder, halo_of
from neuron_xtts.precision import HOST, HostPrecision

logger = logging.getLogger(__name__)

# Frames of the vocoder's windows. oneDNN takes 0.03 to 0.1 s to prepare the convolutions for a length that is new to
# it, and keeps those of some 24 lengths; longer windows outgrow the caches. Fine steps where streams have windows.
_WINDOWS = (*range(30, 241, 15), *range(270, 511, 30))


def host_plan(graphs: Mapping[str, Graph]) -> BucketPlan:
    """The default plan: exact shapes, but for the vocoder."""
    halo = halo_of(graphs.values())
    return BucketPlan(vocoder=tuple(size for size in _WINDOWS if size > 2 * halo) or None)


class CpuBackend:
    """Runs graphs on the host CPU.

    Args:
        graphs: the graphs by name, as `Backend.run` knows them, and ``decode``.
        plan: the buckets; None for `host_plan`.
        precision: of the graphs.
        aside: a folder where the model's own weights go while converted ones stand in for them; None to keep them.
        sample: of what comes in front of the trunk; without one, int8 is coarse where channels are large.
    """

    name = "cpu"
    where = "host"
    over_host: str | None = None

    def __init__(
        self,
        graphs: Mapping[str, Graph],
        plan: BucketPlan | None,
        precision: HostPrecision = HOST["fp32"],
        aside: Path | None = None,
        sample: Sample | None = None,
    ) -> None:
        self.plan = replace(plan, steps=1) if plan else host_plan(graphs)
        self.precision = precision.name
        self.unavailable: dict[tuple[str, Bucket], str] = {}
        self._linears = Linears(precision.linears, Aside(aside) if aside else None, sample)
        in_bf16 = precision.vocoder == "bf16" and cpu_has("avx512_bf16", "amx_bf16")
        self._graphs: dict[str, Graph | HostVocoder] = {}
        for name, graph in graphs.items():
            if isinstance(graph, Vocoder):
                self._graphs[name] = HostVocoder(graph, torch.bfloat16 if in_bf16 else torch.float32)
            else:
                graph.use(HostOperators(self._linears))
                self._graphs[name] = graph
        for name in graphs:
            with contextlib.suppress(Fallback):  # the calls will say so
                self.check(name)

    @property
    def copied(self) -> int:
        """See `Backend.copied`."""
        vocoders = (graph for graph in self._graphs.values() if isinstance(graph, HostVocoder))
        return self._linears.bytes + sum(vocoder.bytes for vocoder in vocoders)

    def check(self, graph: str, exclusive: Exclusive = contextlib.nullcontext) -> None:
        """See `Backend.check`: what was converted of other weights is converted again."""
        found = self._graphs[graph]
        if isinstance(found, HostVocoder):
            if not found.is_current():
                with exclusive():
                    found.convert()
            return
        for module in found.children():
            if isinstance(module, Trunk) and not self._linears.is_current(module):
                with exclusive():
                    self._linears.convert(module)

    def run(self, graph: str, bucket: Bucket, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """See `Backend.run`."""
        found: Callable[..., tuple[Tensor, ...]] = self._graphs[graph]
        outputs = found(*inputs)
        return outputs

    def close(self) -> None:
        """See `Backend.close`."""
        if self._linears.aside:
            self._linears.aside.bring_back()

    def unload(self) -> None:
        """See `Backend.unload`: there is no device, and what runs here goes on."""

    def new_state(self, slots: int, capacity: int) -> HostState | Rows:
        """See `Backend.new_state`."""
        decode = self._graphs["decode"]
        assert isinstance(decode, Decode)
        if self.plan.decode is None:
            try:
                return Rows(decode, self._linears, slots, capacity)
            except LookupError as error:
                logger.info("decoding operator by operator, which is slower: %s", error)
        return HostState(decode, slots, capacity)


class HostState:
    """The decode graph with its keys and values in one tensor (2 * blocks, B, H, S, K), as `KeysAndValues.together`.

    Zeros, since what a slot holds before it is written must be finite.
    """

    def __init__(self, decode: Decode, rows: int, positions: int) -> None:
        self._decode = decode
        shapes = decode.trunk.cache_shapes(rows, rounded(positions, rows))
        self._data = lazy_zeros((len(shapes), *shapes[0]), decode.trunk.ln_f.weight.dtype)

    @property
    def capacity(self) -> int:
        """See `DecodeState.capacity`."""
        return self._data.shape[3]

    def fill(self, slot: int, cache: KeysAndValues, length: int) -> None:
        """See `DecodeState.fill`."""
        for slots, tensor in zip(self._data[:, slot], cache.together(), strict=True):
            slots[:, :length] = tensor[0, :, :length]

    def grow(self, slots: int, capacity: int, positions: Sequence[int]) -> None:
        """See `DecodeState.grow`."""
        blocks, rows, heads, held, channels = self._data.shape
        if slots <= rows and capacity <= held:
            return
        slots = max(slots, rows)
        grown = lazy_zeros((blocks, slots, heads, rounded(max(capacity, held), slots), channels), self._data.dtype)
        grown[:, :rows, :, :held] = self._data
        self._data = grown

    def lift(self, slot: int, length: int) -> Tensor:
        """See `DecodeState.lift`."""
        return self._data[:, slot, :, :length].clone()

    def put(self, slot: int, lifted: Tensor, length: int) -> None:
        """See `DecodeState.put`."""
        self._data[:, slot, :, :length] = lifted

    def clear(self, slot: int, length: int) -> None:
        """See `DecodeState.clear`."""
        self._data[:, slot, :, :length] = 0

    def step(
        self, given: Sequence[Tensor], slots: Sequence[int], positions: Sequence[int], width: int
    ) -> tuple[Tensor, Tensor]:
        """See `DecodeState.step`."""
        cache = self._data[:, :, :, :width].unbind(0)
        embeds, at, mask = self._decode.arrange(given, slots, positions, width)
        latents, logits = self._decode(embeds, at, mask if mask.any() else None, *cache)
        return latents[slots], logits[slots]

    def cached(self, slot: int, length: int) -> KeysAndValues:
        """See `DecodeState.cached`."""
        return KeysAndValues.split(self._data[:, slot, :, :length].unbind(0))
