"""Artifacts: compiled in a job, published in the store, and compared with the host on the device."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neuron_xtts.backends.neuron.device import TARGET_VARIABLE
from neuron_xtts.backends.neuron.jobs import Jobs
from neuron_xtts.backends.neuron.store import LOG, MODEL, Artifact, Recipe, Store
from neuron_xtts.buckets import BucketPlan
from neuron_xtts.precision import Precision, Tolerance
from neuron_xtts.version import __version__

#: What the runtime says where another process has the cores. Compiling needs none; whether torch_neuronx takes one all
#: the same is not documented.
NOT_AVAILABLE = "Core(s) not available"


def compile_artifact(jobs: Jobs, recipe: Recipe, store: Store) -> Artifact:
    """Compile a graph, and put what comes of it into the store.

    Raises:
        JobError: it cannot be compiled.
        OSError: the store cannot be written.
    """
    environment, arguments = {TARGET_VARIABLE: recipe.target}, list(recipe.arguments)
    done = jobs.run("compile", recipe.graph, recipe.sizes, environment, arguments=arguments)
    folder = done.folder / "artifact"
    folder.mkdir()
    for name in (MODEL, LOG):
        (done.folder / name).rename(folder / name)
    created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return store.publish(folder, recipe, created=created, seconds=done.seconds, neuron_xtts=__version__)


def verify_artifact(jobs: Jobs, recipe: Recipe, tolerance: Tolerance, store: Store, machine: str | None) -> None:
    """Run an artifact on the device and compare it with the host; its manifest takes the result.

    Args:
        jobs: that have the graph.
        recipe: of the artifact.
        tolerance: how far it may be off.
        store: where it is.
        machine: to note as the place where it was verified.

    Raises:
        JobError: what kept it from ending.
    """
    _on_device(jobs, [recipe], store, tolerance=asdict(tolerance), machine=machine)


def verify_plan(
    jobs: Jobs, plan: BucketPlan, recipes: Sequence[Recipe], precision: Precision, store: Store, machine: str | None
) -> None:
    """Compare what is new of a plan's artifacts with the host, each by itself and one after another.

    Args:
        jobs: that have the graphs.
        plan: the buckets.
        recipes: of its artifacts.
        precision: of the graphs.
        store: where the artifacts are.
        machine: to note as the place where they were verified.

    Raises:
        JobError: what kept it from ending. Manifests know how far it came.
    """
    named = {"name": precision.name, "arguments": dict(precision.arguments)}
    _on_device(jobs, recipes, store, plan=plan.to_dict(), precision=named, machine=machine)


def _on_device(jobs: Jobs, recipes: Sequence[Recipe], store: Store, **options: Any) -> None:
    environment = {} if os.environ.get("NEURON_RT_VISIBLE_CORES") else {"NEURON_RT_NUM_CORES": "1"}
    largest = max((recipe.graph for recipe in recipes), key=lambda graph: jobs.bytes[graph])
    wanted = [(recipe.plain(), jobs.file(recipe.graph)) for recipe in recipes]
    jobs.run("verify", largest, (), environment, recipes=wanted, store=str(store.root), **options)


def keep_log(log: Path, store: Store, name: str) -> Path:
    """Copy a job's log, which is gone with the job's folder, into the store's; returns where it is."""
    folder = store.root / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(log, folder / f"{name}.log"))
