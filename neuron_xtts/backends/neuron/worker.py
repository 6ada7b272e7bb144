"""The program that `jobs` starts with a job in a file: it lowers or compiles one graph, or verifies several.

In the process that asks for it, an operator without a lowering, or a compiler out of memory, would end everything.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from neuron_xtts.backends.neuron.store import MODEL, Store, write_json
from neuron_xtts.backends.neuron.tracing import trace
from neuron_xtts.buckets import bucket_name
from neuron_xtts.errors import describe
from neuron_xtts.graphs.operators import Graph

RESULT = "result.json"


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        mode: of `MODES`.
        graph: its name.
        bucket: its sizes.
        graphs: file of the graph, by name, and of others.
        folder: where the result goes.
        parent: process that wants it.
        arguments: of the compiler.
        recipes: of the artifacts to verify, each with the file of its graph.
        plan: that they are of, its buckets by name; of one by itself nothing.
        precision: of the plan, its name and arguments by graph.
        tolerance: of one artifact by itself.
        store: where they are.
        machine: to note as the place where they were verified.
    """

    mode: str
    graph: str
    bucket: list[int]
    graphs: str
    folder: str
    parent: int
    arguments: list[str] = field(default_factory=list)
    recipes: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=dict)
    store: str | None = None
    machine: str | None = None


def load(file: str, graph: str) -> Graph:
    """A graph. Its weights stay in the file until they are read, and are shared with other processes."""
    graphs: dict[str, Graph] = torch.load(file, mmap=True, weights_only=False)
    return graphs[graph]


def lower_graph(job: Job) -> dict[str, Any]:
    """Lower a graph with the installed frontend."""
    from neuron_xtts.backends.neuron.lowering import frontend, lower

    device = frontend().device()
    graph = load(job.graphs, job.graph)
    module, inputs = graph.in_bucket(*job.bucket), graph.example(*job.bucket)
    return asdict(lower(job.graph, bucket_name(job.bucket), module.to(device), inputs))


def compile_graph(job: Job) -> dict[str, Any]:
    """Compile a graph, and save the program."""
    folder = Path(job.folder)
    workdir = folder / f"{job.graph}-{bucket_name(job.bucket)}"
    traced = trace(load(job.graphs, job.graph), tuple(job.bucket), workdir, job.arguments)
    torch.jit.save(traced, str(folder / MODEL))  # type: ignore[no-untyped-call]
    return {}


def verify_graph(job: Job) -> dict[str, Any]:
    """Run an artifact on the device and compare it with the host; its manifest takes the result."""
    from neuron_xtts.backends.host.operators import HostOperators
    from neuron_xtts.backends.neuron.backend import LoadedGraph, verify
    from neuron_xtts.backends.neuron.store import Recipe
    from neuron_xtts.precision import Tolerance

    ((data, file),) = job.recipes
    recipe = Recipe.parse(data)
    artifact = Store(job.store).find(recipe)
    assert artifact is not None
    graph = load(file, recipe.graph)
    graph.use(HostOperators())  # what artifacts are compared with is not computed as they are
    verify(LoadedGraph(artifact, recipe, core=0), graph, Tolerance(**job.tolerance), job.machine)
    return {}


def verify_plan(job: Job) -> dict[str, Any]:
    """Load a plan's artifacts, which compares the new ones with the host; the store's manifests take the results."""
    from neuron_xtts.backends.neuron.backend import NeuronBackend
    from neuron_xtts.backends.neuron.store import Recipe
    from neuron_xtts.buckets import BucketPlan
    from neuron_xtts.precision import Precision

    files = {data["graph"]: file for data, file in job.recipes}
    store, recipes = Store(job.store), [Recipe.parse(data) for data, _ in job.recipes]
    backend = NeuronBackend(
        {graph: load(file, graph) for graph, file in files.items()},
        BucketPlan(**job.plan),
        recipes,
        precision=Precision(**job.precision),
        store=store,
        core=0,
        machine=job.machine,
    )
    for recipe in recipes:
        artifact = store.find(recipe)
        if artifact and not artifact.quarantined and not artifact.manifest["verification"]:
            return {"error": backend.unavailable[recipe.graph, recipe.bucket]}
    return {}


def verify_artifacts(job: Job) -> dict[str, Any]:
    """Verify the artifacts of a plan, or one by itself."""
    return verify_plan(job) if job.plan else verify_graph(job)


MODES = {"lower": lower_graph, "compile": compile_graph, "verify": verify_artifacts}


def end_with_parent(parent: int) -> None:
    """End this process, and the compiler's own, when the one that started it is gone: nobody wants the result then."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main(path: str) -> int:
    """Do the job in a file; returns the exit status."""
    faulthandler.enable()  # so that the log says where a process died
    job = Job(**json.loads(Path(path).read_text()))
    threading.Thread(target=end_with_parent, args=(job.parent,), daemon=True).start()
    try:
        result = MODES[job.mode](job)
    except Exception as error:
        traceback.print_exc()
        result = {"error": describe(error)}
    write_json(Path(job.folder) / RESULT, result)
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
