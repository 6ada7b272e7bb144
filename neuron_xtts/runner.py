"""The runner: what runs graphs in buckets on one backend, one at a time, and counts the runs."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Mapping, Sequence

from torch import Tensor

from neuron_xtts.backends import Backend, DecodeState
from neuron_xtts.buckets import Bucket, BucketPlan, Buckets, bucket_name
from neuron_xtts.coqui.hooks import is_hooked
from neuron_xtts.coqui.recognise import RECOGNISERS, code_tables
from neuron_xtts.coqui.surface import Networks
from neuron_xtts.coqui.weights import stamp, tensors_of
from neuron_xtts.errors import Fallback
from neuron_xtts.graphs.catalogue import CATALOGUE
from neuron_xtts.graphs.operators import Graph
from neuron_xtts.graphs.vocoder import halo_of
from neuron_xtts.recorder import Recorder
from neuron_xtts.report import RunCounters
from neuron_xtts.turns import Turns


class Runner:
    """The graphs of one model on a backend.

    Args:
        networks: of the model.
        graphs: by name, as `make_graphs` makes them of these.
        unfit: of the others, why they do not fit the model.
        backend: where the graphs run.
        turns: of the threads that compute with it.
        counters: of runs.
        recorder: of what utterances are at.

    Attributes:
        networks: of the model.
        halo: frames to either side that the audio of a frame depends on.
        backend: where the graphs run.
        buckets: the sizes that are to be had.
        turns: of the threads that compute with it.
        recorder: of what utterances are at.

    Raises:
        ValueError: a window of the vocoder has no room beside its halo.
    """

    def __init__(
        self,
        networks: Networks,
        graphs: Mapping[str, Graph],
        unfit: Mapping[str, str],
        backend: Backend,
        turns: Turns,
        counters: RunCounters,
        recorder: Recorder,
    ) -> None:
        self.networks = networks
        self._graphs = graphs
        self._unfit = backend.plan.lacking(unfit)
        self.halo = halo_of(graphs.values())
        check_windows(backend.plan, self.halo)
        self.backend = backend
        self.buckets = Buckets(backend.plan, backend.unavailable)
        self.turns = turns
        self.recorder = recorder
        self._counters = counters
        families = {CATALOGUE[name].family for name in graphs}
        self._made_of = {family: RECOGNISERS[family].made_of(networks) for family in families}
        self._tables = code_tables(networks.gpt) if "codes" in graphs else None

    def require(self, *graphs: str) -> None:
        """Raise `Fallback` unless these graphs are to be had, made of the modules that the model has now."""
        for graph in graphs:
            if () in self.buckets.plan.dimensions(graph):
                raise Fallback(f"no {graph} graph")
            if graph in self._unfit:
                raise Fallback(self._unfit[graph])
            family = CATALOGUE[graph].family
            same = RECOGNISERS[family].still_made_of(self._made_of[family], self.networks)
            if not same or (CATALOGUE[graph].draws and code_tables(self.networks.gpt) != self._tables):
                raise Fallback("the model's modules were replaced after patch()")
            self.backend.check(graph, self.turns.take)

    @property
    def decoder(self) -> str:
        """The graph that decodes, `BucketPlan.steps` codes in a call."""
        return self.backend.plan.decoder

    @property
    def steps(self) -> int:
        """Codes that one call of it decodes."""
        return self.backend.plan.steps

    def identity(self) -> Hashable:
        """What decoding depends on beside its inputs: modules, their hooks and weights."""
        module = self._graphs[self.decoder]
        modules = list(module.modules())
        return tuple(map(id, modules)), tuple(map(is_hooked, modules)), stamp(tensors_of(module))

    def check_state(self, graph: str) -> None:
        """Raise `Fallback` where the model is in a state in which it computes something else than a graph."""
        RECOGNISERS[CATALOGUE[graph].family].check_state(self.networks)

    def run(self, graph: str, bucket: Bucket, used: int, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Run a graph of one dimension on inputs that fill ``bucket``, of which ``used`` is not padding."""
        asked = time.perf_counter()
        with self.turns.take():
            start = time.perf_counter()
            outputs = self.backend.run(graph, bucket, *inputs)
            self._count(graph, bucket, start, used)
            self.recorder.ran(graph, asked, start)
        return outputs

    def new_state(self, slots: int, capacity: int) -> DecodeState:
        """The decode graph with an empty state; ``slots`` and ``capacity``, in positions, are a bucket."""
        return self.backend.new_state(slots, capacity)

    def step(
        self,
        state: DecodeState,
        bucket: Bucket,
        given: Sequence[Tensor],
        slots: Sequence[int],
        positions: Sequence[int],
    ) -> tuple[Tensor, ...]:
        """Run the graph that decodes in a bucket; see `DecodeState.step`."""
        start = time.perf_counter()
        outputs = state.step(given, slots, positions, bucket[1])
        used = sum(positions[slot] + 1 for slot in slots)
        self._count(self.decoder, bucket, start, used, used if None in self.buckets.plan.dimensions("decode") else None)
        return outputs

    def missing(self) -> dict[str, str]:
        """Graphs and buckets that are not to be had, as reports write them, with the reason."""
        unavailable = list(self.backend.unavailable.items())  # it may grow meanwhile
        return self._unfit | {f"{graph} {bucket_name(bucket)}": reason for (graph, bucket), reason in unavailable}

    def _count(self, graph: str, bucket: Bucket, start: float, used: int, padded: int | None = None) -> None:
        name = self.buckets.name(graph, bucket)
        self._counters.count(graph, name, time.perf_counter() - start, used, padded or math.prod(bucket))


def check_windows(plan: BucketPlan, halo: int) -> None:
    """Raise ValueError if a window of the vocoder has no room beside its halo."""
    if plan.vocoder and min(plan.vocoder) <= 2 * halo:
        raise ValueError(
            f"BucketPlan.vocoder has a window of {min(plan.vocoder)} frames; this vocoder needs more than "
            f"{2 * halo}, because {halo} on either side are halo"
        )
