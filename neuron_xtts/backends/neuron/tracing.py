"""From a graph to the program that is compiled: the form that lowers, and the trace.

Whatever shapes the program stands here or in ``neuron_xtts.graphs``, and is part of `source.source_digest`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from neuron_xtts.buckets import Bucket
from neuron_xtts.coqui.hooks import without_recorders
from neuron_xtts.graphs.operators import PLAIN, Graph, Stateful


def traceable(graphs: Mapping[str, Graph], *, fill: bool = False, rounded: Collection[str] = ()) -> dict[str, Graph]:
    """The graphs with plain operators, which lower, and without what cannot be pickled; the originals stay as they are.

    Args:
        graphs: by name, as `make_graphs` makes them.
        fill: as for `Graph.lowerable`.
        rounded: those of them that multiply by weights in bf16.
    """
    found = {name: without_recorders(graph.lowerable(fill=fill)) for name, graph in graphs.items()}
    known: dict[int, Tensor] = {}
    for name, graph in found.items():
        graph.use(PLAIN)
        if name in rounded:
            graph.round_weights(known)
    return found


def trace(graph: Graph, bucket: Bucket, workdir: Path, arguments: Sequence[str]) -> torch.jit.ScriptModule:
    """Compile a graph without touching a device.

    Args:
        graph: of `traceable`.
        bucket: its sizes, and that of its state.
        workdir: where the compiler leaves what it makes.
        arguments: of the compiler.
    """
    import torch_neuronx

    module, inputs = graph.in_bucket(*bucket), graph.example(*bucket)
    aliases = dict(zip(module.states, count(module.outputs))) if isinstance(module, Stateful) else {}
    with warnings.catch_warnings(), torch.no_grad():
        # What is only a warning to torch_neuronx would be a graph that ignores an input or an option.
        warnings.filterwarnings("error", message="Received an input tensor that was unused")
        warnings.filterwarnings("error", message="Unexpected keyword arguments")
        traced: torch.jit.ScriptModule = torch_neuronx.trace(
            module.eval(),
            tuple(inputs.values()),
            input_output_aliases=aliases,
            compiler_workdir=str(workdir),
            compiler_args=list(arguments),
            cpu_backend=True,
        )
    return traced
