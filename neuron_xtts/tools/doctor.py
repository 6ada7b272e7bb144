"""The doctor: everything a bug report needs, the traps that users of Neuron and coqui-tts fall into, and a verdict."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from neuron_xtts.backends.neuron.canary import Trial, try_canary
from neuron_xtts.backends.neuron.device import (
    NATIVE,
    OLDEST,
    PACKAGES,
    Neuron,
    find_neuron,
    import_module,
    installed,
)
from neuron_xtts.backends.neuron.store import Store
from neuron_xtts.buckets import bucket_name
from neuron_xtts.coqui.find import SUPPORTED
from neuron_xtts.coqui.recognise import make_graphs
from neuron_xtts.coqui.surface import Networks, Xtts
from neuron_xtts.errors import describe
from neuron_xtts.options import Options
from neuron_xtts.tables import table
from neuron_xtts.version import __version__

_OTHERS = ("torchaudio", "torchcodec", "torch-xla", "wrapt", "six")
_VARIABLES = (
    "NEURON_RT_VISIBLE_CORES",
    "NEURON_RT_NUM_CORES",
    "NEURON_PLATFORM_TARGET_OVERRIDE",
    "NEURON_CC_FLAGS",
    "NEURON_XTTS_CACHE",
    "NEURON_XTTS_DISABLE",
)


class Findings(NamedTuple):
    """What the doctor found.

    Attributes:
        report: what a bug report needs, as text.
        problems: each with its remedy.
        verdict: what they come to, in a few sentences. It claims nothing that was not tried.
    """

    report: str
    problems: list[str]
    verdict: str


def examine(options: Options, model: Xtts | None = None, *, canary: bool = False) -> Findings:
    """Look at everything that decides how this library works here.

    Args:
        options: of the compilation whose graphs to look for, and whose store.
        model: an ``Xtts`` whose graphs to look for; None for none.
        canary: compile a small graph, and run it, if Neuron is there.
    """
    neuron = options.neuron or find_neuron()
    trial = None
    if canary and options.neuron:
        with tempfile.TemporaryDirectory() as scratch:
            trial = try_canary(Path(scratch), options.store, precision=options.precision, neuron=options.neuron)
    unready = [*_version_problems(), *_traps()]
    unfit = list(neuron.device_problems()) if neuron.there else []
    if neuron.there:
        unready += [*neuron.package_problems(), *neuron.compiler_problems()] or neuron.target_problems()
    if trial and trial.failure:
        unready.append(f"a graph of two small layers {trial.failure.what}: {trial.failure.remedy}")
    sections = [
        f"neuron_xtts {__version__}, Python {platform.python_version()}, {platform.platform()}",
        table(("package", "installed", "supported"), list(_packages(neuron))),
        table(("Neuron", ""), list(_hardware(neuron))),
        table(("store", ""), list(_store(options.store))),
    ]
    if model is not None and options.neuron is not None:
        sections.append(table(("graph", "bucket", "state"), list(_graphs(model, options))))
    if trial:
        sections.append(str(trial))
    return Findings("\n\n".join(sections), [*unready, *unfit], _verdict(neuron, unready, unfit, trial))


def _verdict(neuron: Neuron, unready: Sequence[str], unfit: Sequence[str], trial: Trial | None) -> str:
    """What was found comes to.

    Args:
        neuron: what there is of Neuron.
        unready: what has to be mended first.
        unfit: what keeps graphs from running on this machine.
        trial: what became of the canary; None if it was not tried.
    """
    if unready:
        more = f" And {len(unready) - 1} more: see the problems above." if len(unready) > 1 else ""
        return f"Not ready: {unready[0]}.{more}"
    if not neuron.there:
        return "Nothing of Neuron is here; patch() runs graphs on the host."
    if trial is None:
        if unfit:
            known, untried = f"Graphs cannot be run here: {unfit[0]}.", "can be compiled"
        else:
            known, untried = "Nothing is known to be wrong.", "compile and run here"
        return f"{known} Whether graphs {untried} was not tried; neuron-xtts doctor --canary tries it."
    if trial.obstacle:
        done = "Graphs can be compiled here, but not run" if trial.compiled else "Compiling could not be tried"
        return f"{done}: {trial.obstacle}."
    return (
        f"Ready: a small graph was compiled for {neuron.target}, ran on one of the {neuron.cores} NeuronCores that "
        "this process may use, and computed what the host does."
    )


def _packages(neuron: Neuron) -> Iterator[tuple[str, ...]]:
    for package, supported in SUPPORTED.items():
        yield package, installed(package) or "-", supported
    for package in _OTHERS:
        yield package, installed(package) or "-", ""
    for package in PACKAGES:
        supported = f">={OLDEST[package]}" if package in OLDEST else ""
        supported += f",<{NATIVE}" if package == "torch-neuronx" else ""
        yield package, neuron.versions.get(package, "-"), supported
    yield "islpy", neuron.islpy or "-", ""


def _hardware(neuron: Neuron) -> Iterator[tuple[str, ...]]:
    if not neuron.there:
        yield "nothing of Neuron is here", "graphs run on the host"
        return
    yield "instance", neuron.instance or "unknown"
    yield "compiler target", neuron.target or "none"
    yield "driver", "loaded" if neuron.driver else "not loaded"
    yield "devices", str(neuron.devices)
    yield "NeuronCores for this process", str(neuron.cores)
    for name in _VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]


def _store(store: Store) -> Iterator[tuple[str, ...]]:
    artifacts = list(store)
    yield "folder", str(store.root)
    yield "artifacts", str(len(artifacts))
    yield "of them verified on a device", str(sum(bool(a.manifest["verification"]) for a in artifacts))
    yield "of them quarantined", str(sum(a.quarantined is not None for a in artifacts))
    yield "size", f"{sum(a.manifest['bytes'] for a in artifacts) / 1e9:.2f} GB"
    there = next(path for path in (store.root, *store.root.parents) if path.exists())
    yield "free on that disk", f"{shutil.disk_usage(there).free / 1e9:.1f} GB"


def _graphs(model: Xtts, options: Options) -> Iterator[tuple[str, ...]]:
    """The state of every graph that a patch with these options would load."""
    graphs, missing = make_graphs(Networks.of(model))
    for recipe in options.recipes(graphs):
        artifact = options.store.find(recipe)
        if artifact is None:
            state = options.store.explain(recipe)
        elif artifact.quarantined:
            state = f"quarantined: {artifact.quarantined}"
        else:
            state = "ready" if artifact.manifest["verification"] else "ready, not yet verified on a device"
        yield recipe.graph, bucket_name(recipe.bucket), state
    for graph, reason in options.static_plan.lacking(missing).items():
        yield graph, "", reason


def _version_problems() -> Iterator[str]:
    for package, supported in SUPPORTED.items():
        there = installed(package)
        if there is None:
            yield f'{package} is not installed: pip install "{package}{supported}"'
        elif not SpecifierSet(supported).contains(there, prereleases=True):
            yield f'{package} {there} is not supported: pip install "{package}{supported}"'


def _traps() -> Iterator[str]:
    """What is known to go wrong with these packages, if it did."""
    coqui, transformers = installed("coqui-tts"), installed("transformers")
    if coqui and transformers and Version(transformers) >= Version("5") and Version(coqui) < Version("0.27.5"):
        yield (
            f"coqui-tts {coqui} does not work with transformers {transformers} (ImportError: cannot import name "
            "'isin_mps_friendly'): pip install \"transformers<5\", or a newer coqui-tts; or this is not the virtual "
            f"environment you meant ({sys.prefix})"
        )
    if installed("six") is None:
        yield "six is not installed, which coqui-tts imports without saying so: pip install six"
    torch, neuronx = installed("torch"), installed("torch-neuronx")
    if (
        torch
        and neuronx
        and Version(neuronx) > Version("2")
        and Version(torch).release[:2] != Version(neuronx).release[:2]
    ):
        yield (
            f"torch {torch} and torch-neuronx {neuronx} do not go together, another package has replaced torch: "
            f'pip install "torch=={".".join(map(str, Version(neuronx).release[:2]))}.*"'
        )
    for module in ("torch_xla", "torch_neuronx") if neuronx else ():
        yield from _import_problem(module)
    yield from _import_problem("TTS.api")


def _import_problem(module: str) -> Iterator[str]:
    try:
        import_module(module)
    except Exception as error:
        yield f"import {module} fails: {describe(error)}"
