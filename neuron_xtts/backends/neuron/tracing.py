"""From a graph to the program that is compiled: the form that lowers, and the trace.

Whatever shapes the program stands here or in ``neuron_xtts.graphs``, and is part of `source.source_digest`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from neuron_xtts.buckets import Bucket
from neuron_xtts.coqui.hooks import without_recorders
from neuron_xtts.graphs.operators import PLAIN, Graph
from neuron_xtts.graphs.transformer import OUTPUTS


def traceable(graphs: Mapping[str, Graph], *, fill: bool = False) -> dict[str, Graph]:
    """The graphs with plain operators, which lower, and without what cannot be pickled; the originals stay as they are.

    Args:
        graphs: by name, as `make_graphs` makes them.
        fill: as for `Graph.lowerable`.
    """
    found = {name: without_recorders(graph.lowerable(fill=fill)) for name, graph in graphs.items()}
    for graph in found.values():
        graph.use(PLAIN)
    return found


def trace(graph: Graph, bucket: Bucket, workdir: Path, arguments: Sequence[str]) -> torch.jit.ScriptModule:
    """Compile a graph without touching a device.

    Args:
        graph: of `traceable`.
        bucket: its sizes.
        workdir: where the compiler leaves what it makes.
        arguments: of the compiler.
    """
    import torch_neuronx

    module, inputs = graph.in_bucket(*bucket), graph.example(*bucket)
    states = [parameter for name, parameter in module.named_parameters() if name.startswith("states.")]
    with warnings.catch_warnings(), torch.no_grad():
        # What is only a warning to torch_neuronx would be a graph that ignores an input or an option.
        warnings.filterwarnings("error", message="Received an input tensor that was unused")
        warnings.filterwarnings("error", message="Unexpected keyword arguments")
        traced: torch.jit.ScriptModule = torch_neuronx.trace(
            module.eval(),
            tuple(inputs.values()),
            input_output_aliases={state: i + OUTPUTS for i, state in enumerate(states)},
            compiler_workdir=str(workdir),
            compiler_args=list(arguments),
            cpu_backend=True,
        )
    return traced
