"""The canary: a graph of two small layers that is compiled, and run where there is a device, before any other.

What goes wrong with it would go wrong with every graph, and is known before the large ones are tried.
"""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from neuron_xtts.backends.neuron.artifacts import NOT_AVAILABLE, compile_artifact, keep_log, verify_artifact
from neuron_xtts.backends.neuron.device import INSTALL, ISLPY_REMEDY, PACKAGES, TARGETS, VERSIONS, Neuron
from neuron_xtts.backends.neuron.jobs import JobError, Jobs, tail
from neuron_xtts.backends.neuron.store import LOG, Artifact, Recipe, Store
from neuron_xtts.graphs.operators import Graph, Stateful
from neuron_xtts.precision import Precision

#: Its name as a graph.
CANARY = "canary"

_NAMED = "The canary, a graph of two small layers,"

# Seconds for each of its jobs, unless told otherwise. A choice of ours, not yet tried with neuronx-cc.
_TIMEOUT = 600.0
# As large as a program that neuronx-cc is reported to fail with (github.com/aws-neuron/aws-neuron-sdk/issues/1391).
_ROWS = _CHANNELS = 64
# It is compiled with the arguments of this graph, and may be as far off: nothing is spoken without it.
_LIKE = "decode"

_BUSY = re.compile(rf"{re.escape(NOT_AVAILABLE)}|cores busy")
_NO_RUNTIME = re.compile("untime (could not|cannot) be initialized")
_MORE_MEMORY = "end what uses the memory of this machine, or compile on a larger one"
# What a log says, and what helps.
_REMEDIES = {
    "NCC_ISMP902": ISLPY_REMEDY,
    "neuronx-cc failed with -9": _MORE_MEMORY,
    "killed, probably for want of memory": _MORE_MEMORY,
}


class Canary(Graph):
    """Two linear layers with a GELU between them, and a state that the second adds to, as decoding has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(_CHANNELS, _CHANNELS)
        self.second = nn.Linear(_CHANNELS, _CHANNELS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the second layer takes and what it gives, each (R, C), of ``x`` (R, C): R rows of C channels."""
        hidden = self.operators.gelu(self.operators.linear(self.first, x), tanh=True)
        return hidden, self.operators.linear(self.second, hidden)

    def example(self, *bucket: int) -> dict[str, Tensor]:
        """Inputs by name for a number of rows."""
        (rows,) = bucket
        return {"x": torch.randn(rows, _CHANNELS)}

    def in_bucket(self, *bucket: int) -> nn.Module:
        """The same with its state."""
        return StatefulCanary(self, *bucket)


class StatefulCanary(Stateful):
    """`Canary` with a state.

    Args:
        canary: the graph.
        rows: of the state, R.
    """

    def __init__(self, canary: Canary, rows: int) -> None:
        super().__init__([(rows, _CHANNELS)])
        self.canary = canary

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run the layers; returns the outputs of `Canary.forward`, then the state (R, C), to which the last adds."""
        hidden, y = self.canary(x)
        return hidden, y, self.states[0] + y


@dataclass(frozen=True)
class Failure:
    """What went wrong with the canary; ``print`` it.

    Attributes:
        what: it does, in one line.
        remedy: what to do.
        lines: the last of the log.
        versions: of whatever takes part in compiling.
        log: the whole of it, if it could be kept.
    """

    what: str
    remedy: str
    lines: str
    versions: str
    log: Path | None

    def __str__(self) -> str:
        what = f"{_NAMED} {self.what}"
        log = f"log: {self.log}" if self.log else ""
        return "\n".join(filter(None, [what, self.lines, self.versions, log, f"remedy: {self.remedy}"]))


@dataclass(frozen=True)
class Trial:
    """What became of the canary; ``print`` it. Without obstacle and failure it ran, and computed what the host does.

    Attributes:
        compiled: whether it was compiled.
        obstacle: what kept it from being compiled or run, and is no fault of the compiler's; None if nothing did.
        failure: what went wrong; None if nothing did.
    """

    compiled: bool
    obstacle: str | None = None
    failure: Failure | None = None

    def __str__(self) -> str:
        if self.failure:
            return str(self.failure)
        if self.obstacle:
            done = "compiled, but not run" if self.compiled else "not compiled"
            return f"{_NAMED} was {done}: {self.obstacle}"
        return f"{_NAMED} was compiled, ran, and computed what the host does."


def try_canary(
    scratch: Path, store: Store, *, precision: Precision, neuron: Neuron, timeout: float | None = None
) -> Trial:
    """Compile the canary as any graph is compiled, and run it if there is a device.

    Args:
        scratch: an empty folder.
        store: of the graphs. The log of a failure is kept there.
        precision: of the graphs. What the user added for single ones is left out.
        neuron: what there is of Neuron, with a target.
        timeout: seconds for compiling it, and for running it; None for ten minutes.

    Raises:
        OSError: the folder cannot be written.
    """
    own, precision = Store(scratch / "store"), Precision(precision.name)
    own.root.mkdir()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = Canary()
        recipe = _recipe(graph, precision, neuron)
    compiled, log = False, None
    try:
        with Jobs(scratch, {CANARY: graph}, workers=1, timeout=timeout or _TIMEOUT, fill=False) as jobs:
            log = compile_artifact(jobs, recipe, own).folder / LOG
            compiled = True
            if obstacle := _obstacle(neuron):
                return Trial(compiled, obstacle)
            verify_artifact(jobs, recipe, precision.tolerance(_LIKE, recipe.target), own, neuron.instance)
        wrong = _wrong(own.find(recipe))
    except JobError as error:
        if obstacle := _no_core(error, compiled):
            return Trial(compiled, obstacle)
        first, log = str(error).partition("\n")[0], error.log
        wrong = f"{'compiles, but does not run' if compiled else 'does not compile'} ({first})"
    return Trial(compiled, failure=_failure(wrong, log, neuron, store) if wrong else None)


def _recipe(graph: Canary, precision: Precision, neuron: Neuron) -> Recipe:
    """What the canary's artifact is made by; in a store of its own, nothing has to be told apart."""
    assert neuron.target is not None
    compiler, inputs = neuron.versions["neuronx-cc"], graph.example(_ROWS)
    return Recipe(
        graph=CANARY,
        bucket=(_ROWS,),
        room=(),
        source="",
        inputs=tuple((key, str(tensor.dtype), tuple(tensor.shape)) for key, tensor in inputs.items()),
        states=1,
        weights="",
        precision=precision.name,
        arguments=precision.compiler_arguments(_LIKE, neuron.target, compiler),
        target=neuron.target,
        versions={},
    )


def _obstacle(neuron: Neuron) -> str | None:
    """What keeps anything from running here, as far as can be known without trying."""
    if problem := next(neuron.device_problems(), None):
        return problem
    if neuron.family in TARGETS and neuron.family != neuron.target:
        return f"it is compiled for {neuron.target}, and this machine is an {neuron.instance}"
    return None


def _wrong(artifact: Artifact | None) -> str | None:
    """What is wrong with an artifact that has run; None if nothing is."""
    if artifact is None or not artifact.manifest["verification"]:
        return "compiles and runs, but how far its results are from the host's was not noted"
    if artifact.quarantined:
        return f"compiles and runs, but not as on the host ({artifact.quarantined})"
    return None


def _no_core(error: JobError, compiled: bool) -> str | None:
    """What an error says, if it is that there is no core to run on; the compiler is not to blame for that."""
    if _BUSY.search(str(error)) and (compiled or not error.spent):
        return (
            "another process has the NeuronCores; end it, or give each process cores of its own with "
            "NEURON_RT_VISIBLE_CORES"
        )
    if compiled and _NO_RUNTIME.search(str(error)):
        return "Neuron's runtime finds no device that it can use; dmesg and neuron-ls may say why"
    return None


def _failure(wrong: str, log: Path | None, neuron: Neuron, store: Store) -> Failure:
    versions = {"torch": torch.__version__, **{name: neuron.versions.get(name, "not installed") for name in PACKAGES}}
    versions |= {"islpy": neuron.islpy or "not installed", "Python": platform.python_version()}
    kept = None
    if log:
        with suppress(OSError):  # a store that cannot be written
            kept = keep_log(log, store, CANARY)
    return Failure(
        wrong,
        _remedy(wrong + (log.read_text(errors="replace") if log else ""), neuron),
        tail(log) if log else "",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        kept,
    )


def _remedy(text: str, neuron: Neuron) -> str:
    """What helps against what is said in a text."""
    for sign, remedy in _REMEDIES.items():
        if sign in text:
            return remedy
    if any(neuron.versions[name].partition("+")[0] != version for name, version in VERSIONS.items()):
        return INSTALL
    return "please report it, with the log and what neuron-xtts doctor prints"
