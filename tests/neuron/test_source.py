"""The digest of a graph's source: what shapes its program changes it, and nothing else does."""

import importlib
import inspect
import json
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import neuron_xtts
from neuron_xtts import graphs
from neuron_xtts.backends.neuron.source import shaping_source, source_digest
from neuron_xtts.backends.neuron.tracing import traceable
from neuron_xtts.coqui.recognise import make_graphs
from neuron_xtts.coqui.surface import Networks
from neuron_xtts.graphs.catalogue import CATALOGUE, GRAPHS
from neuron_xtts.graphs.operators import Graph

PACKAGE = Path(neuron_xtts.__file__).parent
TRANSFORMER = {"prefill", "decode", "codes", "latents"}
SIZES = {"prefill": (2, 3), "codes": (2, 8, 3), "move": (1, 2, 2, 3)}

# name: (file, text, what is put in its place, the graphs whose programs are others now)
EDITS = {
    "the scale of attention": ("graphs/operators.py", "** -0.5", "** -0.25", TRANSFORMER | {"conditioning"}),
    "the vocoder's operator": ("graphs/operators.py", "torch.maximum(x, x * slope)", "torch.maximum(x, slope * x)",
                               {"vocoder"}),
    "decode's operator": ("graphs/operators.py", "positions.long().view", "(positions + 0).long().view",
                          {"decode", "codes"}),
    "what is made ready": ("backends/neuron/tracing.py", "lowerable(fill=fill)", "lowerable(fill=not fill)",
                           set(GRAPHS)),
    "the mask's value": ("graphs/operators.py", "MASKED = -1e9", "MASKED = -1e8", TRANSFORMER - {"decode"}),
    "the trunk": ("graphs/transformer.py", 'tanh=True', 'tanh=False', TRANSFORMER),
    "prefill alone": ("graphs/transformer.py", "last.long()", "(last + 0).long()", {"prefill"}),
    "the form of decode": ("graphs/transformer.py", "state.clone() for", "(state + 0) for", {"decode", "codes"}),
    "a slope of the vocoder": ("graphs/vocoder.py", "LRELU_SLOPE = 0.1", "LRELU_SLOPE = 0.2", {"vocoder"}),
    "how codes are drawn": ("graphs/codes.py", "_PARTS, _CUTS = 32, 6", "_PARTS, _CUTS = 16, 6", {"codes"}),
    "what is as likely": ("graphs/codes.py", "_ALIKE, _EDGES = 1e-3", "_ALIKE, _EDGES = 1e-2", set()),
    "folding": ("graphs/vocoder.py", "conv.weight.detach().clone()", "conv.weight.detach() + 0", {"vocoder"}),
    "filled kernels": ("graphs/vocoder.py", "taps[:, :, ::dilation] = weight", "taps[:, :, 1::dilation] = weight",
                       {"vocoder"}),
    "a layer of the perceiver": ("graphs/conditioning.py", "operators.gelu(gates)", "F.silu(gates)", {"conditioning"}),
    "the trace": ("backends/neuron/tracing.py", "cpu_backend=True", "cpu_backend=False", set(GRAPHS)),
    "a docstring": ("graphs/transformer.py", "Latents of the last block's output.", "What latents are.", set()),
    "a comment": ("graphs/operators.py", "# torch's own lowers", "# It lowers", set()),
    "a type": ("graphs/transformer.py", "def causal_mask(length: int,", "def causal_mask(length: object,", set()),
    "the receptive field": ("graphs/vocoder.py", "hop = math.prod(", "hop = 1 * math.prod(", set()),
    "example inputs": ("graphs/transformer.py", "max(length - 2, 0)", "max(length - 3, 0)", set()),
    "verification's inputs": ("graphs/transformer.py", "0, positions - 1)]", "1, positions - 1)]", set()),
    "the form of prefill": ("graphs/transformer.py", "torch.cat([new, state", "torch.cat([new + 0, state", {"prefill"}),
    "what moves caches": ("graphs/move.py", ".bool(), padded, target", ".bool(), padded + 0, target", {"move"}),
    "a state": ("graphs/operators.py", "torch.zeros(*shape)", "torch.ones(*shape)", set(GRAPHS)),
    "the host's attention": ("backends/host/operators.py", "attn_mask=mask", "attn_mask=None", set()),
    "the worker": ("backends/neuron/worker.py", "faulthandler.enable()", "faulthandler.disable()", set()),
    "lowering's checks": ("backends/neuron/lowering.py", "64-bit floats", "doubles", set()),
}  # fmt: skip

PRINT = (
    "import json; from neuron_xtts.backends.neuron.source import source_digest; from neuron_xtts.graphs.catalogue "
    "import GRAPHS; print(json.dumps({name: source_digest(name, fill=False) for name in GRAPHS}))"
)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package to edit."""
    folder = tmp_path_factory.mktemp("edited") / "neuron_xtts"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def digests(folder):
    """Of a package in ``folder``, in a process that imports it."""
    command = [sys.executable, "-B", "-c", PRINT]
    found = subprocess.run(command, cwd=folder, capture_output=True, check=True, text=True)
    return json.loads(found.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_an_edit(package, name):
    path, before, after, changed = EDITS[name]
    file = package / path
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))
    try:
        found = digests(package.parent)
    finally:
        file.write_text(text)
    assert {graph for graph in GRAPHS if found[graph] != source_digest(graph, fill=False)} == changed


def test_every_part_of_a_graph_is_in_it(tts_original):
    """The class of every module of a graph that is ours, before and after it is made ready, and in its bucket."""
    made, unfit = make_graphs(Networks.of(tts_original.synthesizer.tts_model))
    assert not unfit
    for name, graph in made.items():
        bucket = SIZES.get(name, [2] * len(CATALOGUE[name].dimensions))
        forms = [graph, traceable({name: graph}, fill=True)[name].in_bucket(*bucket)]
        classes = {type(module) for form in forms for module in form.modules()}
        ours = {
            f"{kind.__module__}.{kind.__qualname__}" for kind in classes if kind.__module__.startswith("neuron_xtts.")
        }
        assert ours <= set(shaping_source(name))


def test_filled_kernels_are_another_program():
    """Only the vocoder has convolutions to fill."""
    changed = {name for name in GRAPHS if source_digest(name, fill=True) != source_digest(name, fill=False)}
    assert changed == {"vocoder"}


def test_graphs_are_rows_of_the_catalogue():
    """A graph that is no row is part of another, and every field of a plan is a dimension, or the steps of one."""
    classes = {
        f"{kind.__module__}.{kind.__qualname__}"
        for found in pkgutil.iter_modules(graphs.__path__, "neuron_xtts.graphs.")
        for kind in vars(importlib.import_module(found.name)).values()
        if inspect.isclass(kind) and issubclass(kind, Graph)
    }
    assert classes <= {name for graph in GRAPHS for name in shaping_source(graph)}
    dimensions = [name for spec in CATALOGUE.values() for name in (("steps",) if spec.draws else spec.dimensions)]
    assert sorted(dimensions) == sorted(neuron_xtts.BucketPlan.__dataclass_fields__)
