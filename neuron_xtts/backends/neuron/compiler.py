"""Compiling the graphs of a plan: what is missing is lowered, compiled, stored and verified."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from tqdm import tqdm

from neuron_xtts.backends.neuron.artifacts import NOT_AVAILABLE, compile_artifact, keep_log, verify_plan
from neuron_xtts.backends.neuron.canary import Trial, try_canary
from neuron_xtts.backends.neuron.device import TARGET_VARIABLE, Neuron
from neuron_xtts.backends.neuron.jobs import TIMEOUT, JobError, Jobs
from neuron_xtts.backends.neuron.lowering import Lowering
from neuron_xtts.backends.neuron.source import source_digest
from neuron_xtts.backends.neuron.store import Artifact, Recipe, Store
from neuron_xtts.buckets import Bucket, BucketPlan, bucket_name
from neuron_xtts.coqui.weights import Digester, tensors_of
from neuron_xtts.errors import ModelNotReadyError
from neuron_xtts.graphs.operators import Graph, states_of
from neuron_xtts.precision import Precision, has_small_kernel_defect
from neuron_xtts.tables import table

logger = logging.getLogger(__name__)


# Why a graph failed that was not tried; what is wrong with the canary is said once.
_UNTRIED = "not tried, because the canary failed"


@dataclass
class Entry:
    """What became of one graph in one bucket.

    Attributes:
        graph: its name.
        bucket: its sizes.
        status: ``compiled``, ``found`` (it was there already), ``failed`` or ``quarantined``.
        seconds: it took.
        bytes: of the artifact.
        reason: why it failed or must not be used.
        log: the compiler's log.
    """

    graph: str
    bucket: Bucket
    status: str
    seconds: float = 0.0
    bytes: int = 0
    reason: str | None = None
    log: Path | None = None


@dataclass
class CompileSummary:
    """What `compile` did; ``print`` it.

    Attributes:
        entries: one for each graph and bucket.
        missing: graphs that cannot be had for this model, with the reason.
        store: the folder of the artifacts; None where nothing needs to be compiled.
        canary: what became of the canary, without which nothing else is compiled; None where all was found.
        weights: how much was read to identify the weights, and how fast.
        seconds: all of it.
    """

    entries: list[Entry] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    store: Path | None = None
    canary: Trial | None = None
    weights: Digester = field(default_factory=Digester)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every graph can be used."""
        return all(entry.status in ("compiled", "found") for entry in self.entries)

    def __str__(self) -> str:
        if self.store is None:
            return "The host backend needs no compilation."
        rows = [
            (e.graph, bucket_name(e.bucket), e.status, f"{e.seconds:.1f} s", f"{e.bytes / 1e6:.1f} MB")
            for e in self.entries
        ]
        failures = [
            f"{e.graph} {bucket_name(e.bucket)}: {e.reason}" + (f"\nlog: {e.log}" if e.log else "")
            for e in self.entries
            if e.reason and e.reason != _UNTRIED
        ]
        canary = []
        if self.canary and self.canary.failure:
            canary = [f"{self.canary}\nNo other graph was tried."]
        elif self.canary and self.canary.obstacle:
            canary = [str(self.canary)]
        missing = [f"no {graph} graph: {reason}" for graph, reason in self.missing.items()]
        head = f"{self.store}, in {self.seconds:.1f} s; {self.weights}"
        return "\n\n".join([table(("graph", "bucket", "", "took", "size"), rows), *canary, *failures, *missing, head])


def make_recipes(
    graphs: Mapping[str, Graph], plan: BucketPlan, precision: Precision, neuron: Neuron, digester: Digester
) -> list[Recipe]:
    """What the artifacts of a plan are made by, one recipe for each graph and bucket.

    Args:
        graphs: by name, as `make_graphs` makes them.
        plan: the buckets; a dimension without sizes is an error.
        precision: of the graphs.
        neuron: what there is of Neuron, with a target.
        digester: of the weights.
    """
    assert neuron.target is not None
    compiler = neuron.versions["neuronx-cc"]
    versions = {"torch": torch.__version__, **{name: neuron.versions[name] for name in ("torch-neuronx", "neuronx-cc")}}
    recipes = []
    for name, graph in graphs.items():
        buckets = plan.buckets(name)
        weights = digester.digest(graph) if buckets else ""
        for bucket in buckets:
            room = plan.room(name, bucket)
            with torch.random.fork_rng(devices=[]):
                module, inputs = graph.in_bucket(*bucket, *room), graph.example(*bucket, *room)
            recipes.append(
                Recipe(
                    graph=name,
                    bucket=bucket,
                    room=room,
                    source=source_digest(name, fill=has_small_kernel_defect(compiler)),
                    inputs=tuple((key, str(tensor.dtype), tuple(tensor.shape)) for key, tensor in inputs.items()),
                    states=len(states_of(module)),
                    weights=weights,
                    precision=precision.name,
                    arguments=precision.compiler_arguments(name, neuron.target, compiler),
                    target=neuron.target,
                    versions=versions,
                )
            )
    return recipes


def check_exact(graphs: Mapping[str, Graph]) -> None:
    """Raise `ModelNotReadyError` unless all weights are in fp32 on the CPU: the compiler does the rest."""
    for name, graph in graphs.items():
        for tensor in tensors_of(graph):
            inexact = tensor.is_floating_point() and tensor.dtype != torch.float32
            if tensor.device.type != "cpu" or inexact:
                raise ModelNotReadyError(
                    f"The {name} graph has weights of {tensor.dtype} on {tensor.device}; expected torch.float32 on the "
                    'CPU: model.to("cpu").float(), compile, and choose the precision with precision=...'
                )


def lower_all(
    graphs: Mapping[str, Graph], plan: BucketPlan, precision: Precision, scratch: Path, *, progress: bool
) -> list[Lowering]:
    """Lower every graph in every bucket, each in a process of its own.

    Args:
        graphs: by name, as `make_graphs` makes them.
        plan: the buckets.
        precision: of the graphs.
        scratch: an empty folder.
        progress: show a bar.

    Returns:
        one for each; of a process that failed, the reason is what is `rejected`.
    """
    buckets = [(name, bucket) for name in graphs for bucket in plan.buckets(name)]
    rounded = list(filter(precision.rounds, graphs))
    with Jobs(scratch, graphs, workers=None, timeout=TIMEOUT, fill=False, rounded=rounded) as jobs:
        futures = [jobs.pool.submit(_lowering, jobs, name, bucket, plan.room(name, bucket)) for name, bucket in buckets]
        for _ in tqdm(as_completed(futures), total=len(futures), desc="lowering", unit="graph", disable=not progress):
            pass
        return [future.result() for future in futures]


def _lowering(jobs: Jobs, graph: str, bucket: Bucket, room: Bucket) -> Lowering:
    try:
        return replace(_lower(jobs, graph, (*bucket, *room), _ON_HOST), bucket=bucket_name(bucket))
    except JobError as error:
        return Lowering(graph, bucket_name(bucket), {}, 0, 0, [], [], [str(error)])


def _lower(jobs: Jobs, graph: str, bucket: Bucket, environment: Mapping[str, str]) -> Lowering:
    return Lowering(**jobs.run("lower", graph, bucket, environment).data)


# The frontend's own CPU device: lowering must not need, or take, a NeuronCore.
_ON_HOST = {"PJRT_DEVICE": "CPU"}


def compile_all(
    graphs: Mapping[str, Graph],
    plan: BucketPlan,
    recipes: Sequence[Recipe],
    store: Store,
    *,
    precision: Precision,
    neuron: Neuron,
    progress: bool,
    workers: int | None = None,
    timeout: float | None = None,
) -> tuple[list[Entry], Trial | None]:
    """Make the artifacts that the store lacks, if the canary is well.

    Args:
        graphs: by name, as `make_graphs` makes them.
        plan: the buckets.
        recipes: of its artifacts.
        store: where they go.
        precision: for the tolerance, where there is a device to verify them on.
        neuron: what there is of Neuron.
        progress: show a bar.
        workers: processes at a time; None for as many as memory and processors allow.
        timeout: seconds for one graph; None for an hour, for the canary ten minutes.

    Returns:
        what became of each, and of the canary; None if nothing was to be made.
    """
    entries = {recipe.name: _found(recipe, store) for recipe in recipes}
    wanted = [recipe for recipe in recipes if entries[recipe.name] is None]
    made: dict[str, Entry] = {}
    trial = _try_canary(store, precision, neuron, progress, timeout) if wanted else None
    if trial and trial.failure:
        made = {recipe.name: Entry(recipe.graph, recipe.bucket, "failed", reason=_UNTRIED) for recipe in wanted}
    elif wanted:
        fill = has_small_kernel_defect(neuron.versions["neuronx-cc"])
        limits: dict[str, Any] = {"workers": workers, "timeout": timeout or TIMEOUT}
        rounded = list(filter(precision.rounds, graphs))
        with store.scratch() as scratch, Jobs(scratch, graphs, **limits, fill=fill, rounded=rounded) as jobs:
            made = _compile_each(jobs, wanted, store, progress)
            new = [recipe for recipe in wanted if made[recipe.name].status == "compiled"]
            if new and not list(neuron.device_problems()):
                problem = _verify(jobs, plan, recipes, store, precision, neuron)
                made |= {recipe.name: _verified(made[recipe.name], store.find(recipe), problem) for recipe in new}
                entries = {recipe.name: entries[recipe.name] and _found(recipe, store) for recipe in recipes}
    return [entries[recipe.name] or made[recipe.name] for recipe in recipes], trial


def _try_canary(store: Store, precision: Precision, neuron: Neuron, progress: bool, timeout: float | None) -> Trial:
    with store.scratch() as scratch, tqdm(total=1, desc="canary", unit="graph", disable=not progress) as bar:
        trial = try_canary(scratch, store, precision=precision, neuron=neuron, timeout=timeout)
        bar.update()
    return trial


def _compile_each(jobs: Jobs, recipes: Sequence[Recipe], store: Store, progress: bool) -> dict[str, Entry]:
    """What became of each artifact, by its name."""
    made = {}
    # Those with most weights first, so that the last to finish is a short one.
    ordered = sorted(recipes, key=lambda recipe: -jobs.bytes[recipe.graph])
    with tqdm(total=len(recipes), desc="compiling", unit="graph", disable=not progress) as bar:
        futures = {jobs.pool.submit(_compile, jobs, recipe, store): recipe for recipe in ordered}
        for future in as_completed(futures):
            entry = made[futures[future].name] = future.result()
            bar.set_postfix_str(f"{entry.graph} {bucket_name(entry.bucket)} {entry.status}")
            bar.update()
    for recipe in ordered:  # those that found the cores taken, maybe by each other, once more, one after another
        reason = made[recipe.name].reason or ""
        if NOT_AVAILABLE in reason and not reason.startswith("compile: stopped"):
            made[recipe.name] = _compile(jobs, recipe, store)
    return made


def _found(recipe: Recipe, store: Store) -> Entry | None:
    artifact = store.find(recipe)
    if artifact is None:
        return None
    status = "quarantined" if artifact.quarantined else "found"
    reason = f"{artifact.quarantined}; neuron-xtts graphs --prune removes it" if artifact.quarantined else None
    return Entry(recipe.graph, recipe.bucket, status, bytes=artifact.manifest["bytes"], reason=reason)


def _compile(jobs: Jobs, recipe: Recipe, store: Store) -> Entry:
    start = time.monotonic()
    entry = Entry(recipe.graph, recipe.bucket, "failed")
    try:
        with _locked(jobs, recipe, store):
            if found := _found(recipe, store):  # another process was faster
                return found
            start = time.monotonic()
            artifact = _make(jobs, recipe, store)
        entry.status, entry.bytes = "compiled", artifact.manifest["bytes"]
    except (JobError, OSError) as error:
        entry.reason = str(error)
        if isinstance(error, JobError) and error.log:
            entry.log = keep_log(error.log, store, recipe.name)
    entry.seconds = time.monotonic() - start
    return entry


@contextmanager
def _locked(jobs: Jobs, recipe: Recipe, store: Store) -> Iterator[None]:
    """Hold the lock of an artifact, which another process may have for as long as it compiles."""
    lock = store.lock(recipe)
    while not lock.is_locked:
        if jobs.stopped:
            raise JobError("stopped")
        with suppress(Timeout):
            lock.acquire(timeout=0.5)
    try:
        yield
    finally:
        lock.release()


def _make(jobs: Jobs, recipe: Recipe, store: Store) -> Artifact:
    try:
        environment = {TARGET_VARIABLE: recipe.target} | _ON_HOST
        problems = _lower(jobs, recipe.graph, recipe.sizes, environment).problems
    except JobError as error:
        if jobs.stopped or error.spent:
            raise
        # What is wrong with the graph, or with torch_neuronx's frontend where it is not compiling: that job tells.
        logger.warning("%s cannot be looked at before it is compiled: %s", recipe.name, str(error).partition("\n")[0])
        problems = []
    if problems:
        raise JobError("; ".join(problems))
    return compile_artifact(jobs, recipe, store)


def _verify(
    jobs: Jobs, plan: BucketPlan, recipes: Sequence[Recipe], store: Store, precision: Precision, neuron: Neuron
) -> str | None:
    """Verify new artifacts on the device, each by itself and all of them together.

    Returns:
        what kept it from ending, if so. Manifests know how far it came.
    """
    try:
        verify_plan(jobs, plan, recipes, precision, store, neuron.instance)
    except JobError as error:
        return str(error)
    return None


def _verified(entry: Entry, artifact: Artifact | None, problem: str | None) -> Entry:
    """What became of a compiled graph, now that its verification was tried; what was not verified, `patch` verifies."""
    if artifact and artifact.quarantined:
        return replace(entry, status="quarantined", reason=artifact.quarantined)
    if artifact and artifact.manifest["verification"]:
        return entry
    return replace(entry, reason="not verified yet, patch() will" + (f": {problem}" if problem else ""))
