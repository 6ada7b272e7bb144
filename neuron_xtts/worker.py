"""One graph in a process of its own: lowered, compiled or verified. `compiler` starts it with a job file.

In the process that asks for it, an operator without a lowering, or a compiler out of memory, would end everything.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuron_xtts.lowering import in_bucket
from neuron_xtts.store import MODEL, Store, write_json

RESULT = "result.json"


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        mode: ``lower``, ``compile`` or ``verify``.
        graph: its name.
        bucket: its sizes.
        graphs: file of the graphs, by name.
        folder: where the result goes.
        arguments: of the compiler.
        recipe: of the artifact to verify.
        store: where that is.
        precision: name and arguments by graph, for the tolerance.
        machine: to note as the place where it was verified.
    """

    mode: str
    graph: str
    bucket: list[int]
    graphs: str
    folder: str
    arguments: list[str] = field(default_factory=list)
    recipe: dict[str, Any] | None = None
    store: str | None = None
    precision: dict[str, Any] = field(default_factory=dict)
    machine: str | None = None

    def load(self) -> Any:
        """The graph. Its weights stay in the file until they are read, and are shared with other processes."""
        graphs: dict[str, nn.Module] = torch.load(self.graphs, mmap=True, weights_only=False)
        return graphs[self.graph]


def lower_graph(job: Job) -> dict[str, Any]:
    """Lower it with the installed frontend."""
    from neuron_xtts.lowering import frontend, lower

    device = frontend().device()
    module, inputs = in_bucket(job.load(), tuple(job.bucket))
    return asdict(lower(job.graph, "x".join(map(str, job.bucket)), module.to(device), inputs))


def compile_graph(job: Job) -> dict[str, Any]:
    """Compile it without touching a device, and save it."""
    import torch_neuronx

    module, inputs = in_bucket(job.load(), tuple(job.bucket))
    states = list(getattr(module, "states", []))
    folder = Path(job.folder)
    with warnings.catch_warnings(), torch.no_grad():
        # What is only a warning to torch_neuronx would be a graph that ignores an input or an option.
        warnings.filterwarnings("error", message="Received an input tensor that was unused")
        warnings.filterwarnings("error", message="Unexpected keyword arguments")
        traced = torch_neuronx.trace(
            module.eval(),
            tuple(inputs.values()),
            input_output_aliases={state: i + 2 for i, state in enumerate(states)},  # after latents and logits
            compiler_workdir=str(folder / f"{job.graph}-{'x'.join(map(str, job.bucket))}"),
            compiler_args=list(job.arguments),
            cpu_backend=True,
        )
    torch.jit.save(traced, str(folder / MODEL))  # type: ignore[no-untyped-call]
    return {}


def verify_graph(job: Job) -> dict[str, Any]:
    """Run an artifact on the device and compare it with the host; the store's manifest takes the result."""
    from neuron_xtts.backends.neuron import LoadedGraph, verify
    from neuron_xtts.precision import Precision
    from neuron_xtts.store import Recipe

    assert job.recipe is not None
    data = job.recipe
    inputs = tuple((name, dtype, tuple(shape)) for name, dtype, shape in data["inputs"])
    recipe = Recipe(
        **{**data, "bucket": tuple(data["bucket"]), "arguments": tuple(data["arguments"]), "inputs": inputs}
    )
    artifact = Store(job.store).find(recipe)
    assert artifact is not None
    loaded = LoadedGraph(artifact, recipe, core=0)
    reason = verify(loaded, job.load(), artifact, recipe, Precision(**job.precision), job.machine)
    return {"reason": reason, "verification": artifact.manifest["verification"]}


MODES = {"lower": lower_graph, "compile": compile_graph, "verify": verify_graph}


def main(path: str) -> int:
    """Do the job in a file; returns the exit status."""
    job = Job(**json.loads(Path(path).read_text()))
    try:
        result = MODES[job.mode](job)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}".strip().partition("\n")[0]}
    write_json(Path(job.folder) / RESULT, result)
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
