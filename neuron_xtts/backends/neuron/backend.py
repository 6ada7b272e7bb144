"""The Neuron backend: artifacts of the store, loaded onto a NeuronCore, with the KV cache kept on the device."""

from __future__ import annotations

import datetime
import logging
import math
import re
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor

from neuron_xtts.backends import Exclusive
from neuron_xtts.backends.host.operators import HostOperators
from neuron_xtts.backends.memory import lazy_zeros
from neuron_xtts.backends.neuron.device import import_module
from neuron_xtts.backends.neuron.store import Artifact, Recipe, Store
from neuron_xtts.backends.neuron.verification import deviations, rehearsal
from neuron_xtts.buckets import Bucket, BucketPlan, bucket_name, next_buckets
from neuron_xtts.coqui.hooks import check_unhooked
from neuron_xtts.coqui.weights import Digester, stamp, tensors_of
from neuron_xtts.errors import ArtifactError, Fallback, describe
from neuron_xtts.graphs.codes import Codes
from neuron_xtts.graphs.operators import Graph
from neuron_xtts.graphs.transformer import Decode, KeysAndValues
from neuron_xtts.precision import Precision, Tolerance

logger = logging.getLogger(__name__)

# After so many errors in a row a graph is given up: every attempt costs the time up to the error. A choice of ours.
_ERRORS = 3


# torch_neuronx's contexts for placement are documented as not thread-safe.
_LOADING = threading.Lock()


class NeuronBackend:
    """Runs graphs on a NeuronCore. What the store lacks, and what fails to load or to verify, is `unavailable`.

    Args:
        graphs: by name, as `make_graphs` makes them.
        plan: the buckets.
        recipes: of every artifact that the plan needs.
        precision: of the graphs.
        store: where the artifacts are.
        core: the NeuronCore, counted among those that the process may use.
        machine: what to note as the place where artifacts were verified.

    Attributes:
        over_host: why caches do not move on the device, from graph to graph; None if they do.
    """

    name = "neuron"
    copied = 0  # the device holds them

    def __init__(
        self,
        graphs: Mapping[str, Graph],
        plan: BucketPlan,
        recipes: Sequence[Recipe],
        *,
        precision: Precision,
        store: Store,
        core: int,
        machine: str | None,
    ) -> None:
        self.where = f"core {core}"
        self.graphs = graphs
        for graph in graphs.values():
            graph.use(HostOperators())  # what artifacts are compared with is not computed as they are
        self.plan = plan
        self.precision = precision.name
        self.unavailable: dict[tuple[str, Bucket], str] = {}
        self.over_host: str | None = None
        self._error: str | None = None  # that is why, and may be gone in the next process
        self._loaded: dict[tuple[str, Bucket], LoadedGraph] = {}
        self._recipes = {recipe.graph: recipe for recipe in recipes}
        self._stamps = {name: (stamp(tensors_of(graph)), True) for name, graph in graphs.items()}
        for recipe in recipes:
            try:
                loaded = self._load(recipe, store, precision, core, machine)
            except Exception as error:
                self.unavailable[recipe.graph, recipe.bucket] = first_line(error)
                logger.debug("%s %s", recipe.graph, recipe.bucket, exc_info=True)
            else:
                self._loaded[recipe.graph, recipe.bucket] = loaded
        for bucket in reversed(self._buckets(plan.decoder)):  # the last ones first: others go on there
            self._rehearse(bucket, precision)
        if self.over_host:
            logger.warning("caches go by way of the host: %s", self.over_host)
        if self.unavailable:
            lines = "".join(
                f"\n  {graph} {bucket_name(b)}: {reason}" for (graph, b), reason in self.unavailable.items()
            )
            logger.warning(
                "%d of %d graphs are not to be had, and coqui-tts's own code serves their calls, but that without a "
                "move caches go by way of the host. Graphs that are not compiled: neuron_xtts.compile(model), or "
                "neuron-xtts compile --checkpoint DIR%s",
                len(self.unavailable),
                len(recipes),
                lines,
            )

    def _load(self, recipe: Recipe, store: Store, precision: Precision, core: int, machine: str | None) -> LoadedGraph:
        artifact = store.find(recipe)
        if artifact is None:
            raise ArtifactError(store.explain(recipe))
        if artifact.quarantined:
            raise ArtifactError(artifact.quarantined)
        artifact.check()
        loaded = LoadedGraph(artifact, recipe, core)
        graph = self.graphs[recipe.graph]
        if artifact.manifest["verification"]:
            loaded.warm_up(graph)
        else:
            reason = verify(loaded, graph, precision.tolerance(recipe.graph, recipe.target), machine)
            if reason:
                raise ArtifactError(reason)
        return loaded

    @property
    def decoder(self) -> Decode | Codes:
        """The graph that decodes."""
        graph = self.graphs[self.plan.decoder]
        assert isinstance(graph, (Decode, Codes))
        return graph

    @property
    def loaded(self) -> list[LoadedGraph]:
        """The graphs that are on the device."""
        return list(self._loaded.values())

    def _buckets(self, graph: str) -> list[Bucket]:
        """Those of a graph that are loaded, smallest first."""
        return sorted(bucket for name, bucket in self._loaded if name == graph)

    def _rehearse(self, bucket: Bucket, precision: Precision) -> None:
        """Decode from every prefill on in a bucket, and from there on in the next ones, unless that was done before.

        Where caches that stay on the device give wrong results, or errors, they go by way of the host from now on. What
        gives wrong results then, too, is quarantined; what gives errors is not to be had in this process.
        """
        decoder = self.plan.decoder
        artifact = self._loaded[decoder, bucket].artifact
        ways = [(bucket, other) for other in next_buckets(bucket, self._buckets(decoder))]
        used = {(decoder, other) for _, other in ways} | {key for key in self._loaded if key[0] in ("prefill", "move")}
        names = sorted(self._loaded[key].recipe.name for key in used)
        known = artifact.manifest.get("rehearsed") or {}
        if known.get("with") == names:
            self.over_host = self.over_host or known["over host"]
            return
        wrong = error = None
        if not self.over_host:
            wrong, self._error = self._tried(bucket, ways, precision)
            self.over_host = wrong or self._error
        if self.over_host:
            wrong, error = self._tried(bucket, ways, precision)
        if wrong:
            artifact.record(quarantined=wrong)
        if reason := wrong or error:
            self.unavailable[decoder, bucket] = reason
            del self._loaded[decoder, bucket]
        else:
            artifact.record(rehearsed=None if self._error else {"with": names, "over host": self.over_host})

    def _tried(
        self, bucket: Bucket, ways: Sequence[tuple[Bucket, ...]], precision: Precision
    ) -> tuple[str | None, str | None]:
        """What is wrong with decoding in a bucket, and what error kept that from being known."""
        try:
            return self._wrong(bucket, ways, precision), None
        except Exception as error:
            return None, first_line(error)

    @torch.no_grad()
    def _wrong(self, bucket: Bucket, ways: Sequence[tuple[Bucket, ...]], precision: Precision) -> str | None:
        """What is wrong with decoding in a bucket, and from there on along some ways; None if nothing is."""
        prefill, steps = self.graphs["prefill"], self.plan.steps
        target = self._loaded[self.plan.decoder, bucket].recipe.target
        # What prefill made was accepted by its own limits, and decoding is as far off as what it decodes from.
        tolerance = precision.tolerance(self.plan.decoder, target).or_looser(precision.tolerance("prefill", target))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for length, way in product(self._buckets("prefill"), ways or [(bucket,)]):
                inputs = prefill.example(*length)
                filled = min(
                    int(inputs["last"]) + 1, bucket[1] - steps * len(way)
                )  # so that there is room for their steps
                inputs["last"].fill_(filled - 1)
                _, _, *known = prefill(*inputs.values())
                _, _, *ours = self.run("prefill", length, *inputs.values())
                caches = KeysAndValues.split(ours), KeysAndValues.split(known)
                found = rehearsal(self.new_state(*bucket), self.decoder, steps, way, *caches, filled)
                if reason := next(filter(None, [each.beyond(tolerance) for each in found]), None):
                    return reason
        return None

    def check(self, graph: str, exclusive: Exclusive = nullcontext) -> None:
        """See `Backend.check`. Nothing is changed."""
        module = self.graphs[graph]
        check_unhooked(list(module.modules()))
        now = stamp(tensors_of(module))
        then, same = self._stamps[graph]
        if now != then:
            same = graph in self._recipes and Digester().digest(module) == self._recipes[graph].weights
            self._stamps[graph] = now, same
        if not same:
            raise Fallback("weights changed")

    def run(self, graph: str, bucket: Bucket, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """See `Backend.run`. What a graph has for its state is on the device, and there until it runs again."""
        outputs = self.call(graph, bucket, *(tensor for tensor in inputs if tensor is not None))
        states = self._loaded[graph, bucket].states
        return (*outputs[: len(outputs) - len(states)], *states)

    def call(self, graph: str, bucket: Bucket, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run a loaded graph; one that keeps failing is given up."""
        with self.counting(graph, bucket) as loaded:
            outputs = loaded(*inputs)
        loaded.errors = 0
        return outputs

    @contextmanager
    def counting(self, graph: str, bucket: Bucket) -> Iterator[LoadedGraph]:
        """A loaded graph, for the length of a ``with`` block whose error counts as one of its own."""
        loaded = self._loaded.get((graph, bucket))
        if loaded is None:
            raise Fallback(f"no {graph} graph: {self.unavailable[graph, bucket]}")
        try:
            yield loaded
        except Exception as error:
            loaded.errors += 1
            if loaded.errors == _ERRORS:
                self.unavailable[graph, bucket] = f"given up after {_ERRORS} errors in a row: {first_line(error)}"
                logger.warning("%s %s: %s", graph, bucket_name(bucket), self.unavailable[graph, bucket])
            raise

    def close(self) -> None:
        """See `Backend.close`: there is nothing to do."""

    def unload(self) -> None:
        """See `Backend.unload`."""
        self.unavailable |= dict.fromkeys(self._loaded, "another patch took its place")
        self._loaded.clear()

    def new_state(self, slots: int, capacity: int) -> NeuronState:
        """See `Backend.new_state`. Several may be in use: what a graph holds of one moves to the host for another."""
        return NeuronState(self, self._loaded, (slots, capacity))


class LoadedGraph:
    """An artifact on a NeuronCore. One call at a time.

    Args:
        artifact: as the store found it.
        recipe: what it was made by.
        core: the NeuronCore.

    Attributes:
        artifact: as the store found it.
        recipe: what it was made by.
        states: its state on the device, in the order of the recipe's outputs.
        errors: how many calls failed since the last that did not.
    """

    def __init__(self, artifact: Artifact, recipe: Recipe, core: int) -> None:
        torch_neuronx = import_module("torch_neuronx")
        self.artifact = artifact
        self.recipe = recipe
        self.states: list[Tensor] = []
        self._owner: weakref.ref[NeuronState] | None = None
        self.errors = 0
        self._lock = threading.Lock()
        self._expected = [(dtype, shape) for _, dtype, shape in recipe.inputs]
        with _LOADING, torch_neuronx.neuron_cores_context(start_nc=core, nc_count=1):
            self._module: Any = torch.jit.load(str(artifact.model))  # type: ignore[no-untyped-call]
        if recipe.states:
            torch_neuronx.move_trace_to_device(self._module, core)
            # Only now: the move has put new tensors in place of the old ones.
            named = [(name, state) for name, state in self._module.named_parameters() if name.startswith("states.")]
            self.states = [state for _, state in sorted(named, key=lambda item: _natural(item[0]))]
            if len(self.states) != recipe.states:
                raise ArtifactError(f"it has {len(self.states)} states, not {recipe.states}")

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run it. What a runtime says to inputs of another shape is not documented, so they are checked here."""
        found = [(str(tensor.dtype), tuple(tensor.shape)) for tensor in inputs]
        if found != self._expected:
            raise ArtifactError(f"{self.recipe.graph} was given {found}; it was compiled for {self._expected}")
        with self._lock:
            outputs = self._module(*(tensor.contiguous() for tensor in inputs))
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    @torch.no_grad()
    def write(self, contents: Sequence[Tensor], first: int = 0) -> None:
        """Replace the state, or some of its tensors, whole ones: writing parts of a tensor there is not documented.

        Args:
            contents: on the host, or the state of another graph on the same device.
            first: which of the tensors the first one replaces.
        """
        with self._lock:
            for state, tensor in zip(self.states[first : first + len(contents)], contents, strict=True):
                state.copy_(tensor)

    @torch.no_grad()
    def read(self) -> list[Tensor]:
        """The state, on the host."""
        with self._lock:
            return [state.detach().cpu() for state in self.states]

    @property
    def owner(self) -> NeuronState | None:
        """Whose state is on the device; None once nobody needs it any more."""
        return None if self._owner is None else self._owner()

    def disown(self) -> None:
        """Nobody's state is on the device."""
        self._owner = None

    def take_over(self, owner: NeuronState) -> None:
        """Make way for another's state."""
        last = self.owner
        if last is not None and last is not owner and last.on_device:
            try:
                last.leave()
            except Exception:
                # Its next step says so. Whoever comes now need not suffer for it.
                logger.warning("a decode state could not be moved to the host", exc_info=True)
        self._owner = weakref.ref(owner)

    def warm_up(self, graph: Graph) -> None:
        """One call, so that the first real one does not pay for what the runtime sets up."""
        with torch.random.fork_rng(devices=[]):
            inputs = graph.example(*self.recipe.sizes)
        self(*inputs.values())


def verify(loaded: LoadedGraph, graph: Graph, tolerance: Tolerance, machine: str | None) -> str | None:
    """Compare an artifact with the host and note the result in its manifest; returns the reason if it is wrong."""
    found = list(deviations(loaded, graph, loaded.recipe.sizes))
    reason = next(filter(None, (each.beyond(tolerance) for each in found)), None)
    error, pcc = max(each.error for each in found), min(each.pcc for each in found)
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    note = {"error": error if math.isfinite(error) else str(error), "pcc": pcc, "machine": machine, "when": when}
    loaded.artifact.record(verification=note, quarantined=reason)
    return reason


class NeuronState:
    """The state of a loaded decode graph while one call decodes; see `DecodeState`.

    It is on the host while it is empty, or another call decodes on the same graph, else on the device. It moves whole.
    """

    def __init__(
        self, backend: NeuronBackend, loaded: Mapping[tuple[str, Bucket], LoadedGraph], bucket: Bucket
    ) -> None:
        self._backend = backend
        self._name = backend.plan.decoder
        self._loaded = loaded
        self._length = 0  # positions written so far
        self._enter(bucket)

    def _enter(self, bucket: Bucket) -> None:
        """Go on in a bucket, with an empty cache on the host."""
        self._bucket = bucket
        self._graph = self._loaded[self._name, bucket]
        self._on_host: list[Tensor] | None = self._empty()

    @property
    def _shapes(self) -> list[tuple[int, int, int, int]]:
        return self._backend.decoder.trunk.cache_shapes(*self._bucket)

    def _empty(self) -> list[Tensor]:
        """Zeros: what a slot holds must be finite."""
        shapes = self._shapes
        return list(lazy_zeros((len(shapes), *shapes[0]), torch.float32))

    @property
    def capacity(self) -> int:
        """See `DecodeState.capacity`."""
        return self._bucket[1]

    @property
    def on_device(self) -> bool:
        """Whether it is there, as long as its graph belongs to it."""
        return self._on_host is None

    def fill(self, slot: int, cache: KeysAndValues, length: int) -> None:
        """See `DecodeState.fill`."""
        tensors = cache.together()
        if self._joins(slot, tensors):
            self._length = max(self._length, length)
        else:
            self.put(slot, [tensor.detach().cpu()[0, :, :length] for tensor in tensors], length)

    def _joins(self, slot: int, cache: Sequence[Tensor]) -> bool:
        """Have a slot take a cache on the device; false if it has to go by way of the host."""
        alone = self._length == 0
        if self._backend.over_host or cache[0].device.type == "cpu" or not (alone or self.on_device):
            return False
        rows, _, positions, _ = cache[0].shape
        if (rows, positions) == self._bucket:
            self._arrive(cache)
            return True
        move = self._move((rows, positions), self._bucket)
        if move is None:
            return False
        if not alone:
            self._check_owner()
            move.write(self._graph.states, len(cache))
        # Into all slots if they are empty: what they hold must be finite.
        taken = [float(alone or other == slot) for other in range(self._bucket[0])]
        self._arrive(self._moved(move, cache, taken))
        return True

    def _move(self, start: Bucket, end: Bucket) -> LoadedGraph | None:
        """What moves caches on the device between buckets, if it is to be had."""
        key = "move", (*start, *end)
        return None if key in self._backend.unavailable else self._loaded.get(key)

    def _moved(self, move: LoadedGraph, cache: Sequence[Tensor], taken: Sequence[float]) -> Sequence[Tensor]:
        with self._backend.counting("move", move.recipe.bucket):
            move.write(cache)
        self._backend.call("move", move.recipe.bucket, torch.tensor(taken))
        return move.states[len(cache) :]

    def _arrive(self, contents: Sequence[Tensor]) -> None:
        """Have the graph hold these contents."""
        with self._backend.counting(self._name, self._bucket):
            self._graph.take_over(self)
            try:
                self._graph.write(contents)
            except BaseException:
                self._graph.disown()  # it holds some of both: no row may step on that
                raise
        self._on_host = None

    def grow(self, slots: int, capacity: int, positions: Sequence[int]) -> None:
        """See `DecodeState.grow`."""
        self._length = max(positions, default=0)
        move = self._move(self._bucket, (slots, capacity))
        if move is not None and self.on_device and not self._backend.over_host:
            self._check_owner()
            moved = self._moved(move, self._graph.states, slots * [1.0])
            self._bucket, self._graph = (slots, capacity), self._loaded[self._name, (slots, capacity)]
            self._arrive(moved)
        else:
            contents = self._read()
            self._enter((slots, capacity))
            self._copy_to_host(contents)

    def lift(self, slot: int, length: int) -> list[Tensor]:
        """See `DecodeState.lift`."""
        return [tensor[slot, :, :length].clone() for tensor in self._read()]

    def put(self, slot: int, lifted: Sequence[Tensor], length: int) -> None:
        """See `DecodeState.put`. The other rows come along to the host, and go back with the next step."""
        if self._on_host is None:
            self._check_owner()
            self.leave()
        assert self._on_host is not None
        self._length = max(self._length, length)
        for slots, tensor in zip(self._on_host, lifted, strict=True):
            slots[slot, :, :length] = tensor

    def clear(self, slot: int, length: int) -> None:
        """See `DecodeState.clear`."""
        self.put(slot, [torch.zeros(heads, length, channels) for _, heads, _, channels in self._shapes], length)

    def step(
        self, given: Sequence[Tensor], slots: Sequence[int], positions: Sequence[int], width: int
    ) -> tuple[Tensor, ...]:
        """See `DecodeState.step`."""
        if self._on_host is not None:
            self._arrive(self._on_host)
        self._check_owner()
        inputs = self._backend.decoder.arrange(given, slots, positions, self._bucket[1])
        outputs = self._backend.call(self._name, self._bucket, *inputs)
        self._length = max(self._length, min(max(positions) + self._backend.plan.steps, self._bucket[1]))
        return tuple(output[slots] for output in outputs[: len(outputs) - len(self._graph.states)])

    def cached(self, slot: int, length: int) -> KeysAndValues:
        """See `DecodeState.cached`."""
        return KeysAndValues.split([tensor[slot, :, :length] for tensor in self._read()])

    def leave(self) -> None:
        """Make way for another call: move to the host."""
        contents = self._graph.read()
        self._on_host = self._empty()
        self._copy_to_host(contents)

    def _copy_to_host(self, contents: Sequence[Tensor]) -> None:
        assert self._on_host is not None
        for slots, tensor in zip(self._on_host, contents, strict=True):
            slots[: len(tensor), :, : self._length] = tensor[:, :, : self._length]

    def _read(self) -> list[Tensor]:
        if self._on_host is not None:
            return self._on_host
        self._check_owner()
        return self._graph.read()

    def _check_owner(self) -> None:
        if self._graph.owner is not self:
            raise Fallback("another call took over the decode graph")


def first_line(error: BaseException) -> str:
    """What an error says, short enough to be a reason."""
    text = str(error).partition("\n")[0] if isinstance(error, ArtifactError) else describe(error)
    return text[:200]


def _natural(name: str) -> list[int | str]:
    """A sort key that puts ``states.10`` after ``states.9``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
