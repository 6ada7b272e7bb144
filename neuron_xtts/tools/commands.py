"""What each command of ``neuron-xtts`` does with its arguments; each returns the exit status."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from neuron_xtts.backends.neuron.store import Store
from neuron_xtts.buckets import BucketPlan, bucket_name
from neuron_xtts.errors import NeuronMissingError, NeuronXttsError
from neuron_xtts.options import PatchOptions
from neuron_xtts.precision import Precision
from neuron_xtts.tables import table


def _plan(arguments: argparse.Namespace) -> BucketPlan:
    return replace(BucketPlan.static(), **dict(arguments.sizes))


def _precision(arguments: argparse.Namespace) -> Precision:
    return Precision(arguments.precision, dict(arguments.compiler_args))


def run_demo(arguments: argparse.Namespace) -> int:
    """Speak one sentence with plain coqui-tts and patched."""
    import transformers

    from neuron_xtts.coqui.models import SENTENCES
    from neuron_xtts.tools import demo

    transformers.logging.set_verbosity_error()  # a line for every max_new_tokens would break the progress bars
    print(
        demo.run(
            arguments.out,
            small=arguments.small,
            checkpoint=arguments.checkpoint,
            speaker_wav=arguments.speaker_wav,
            text=arguments.text or SENTENCES[0],
            language=arguments.language,
            codes=arguments.codes,
            seed=arguments.seed,
            **_patch_options(arguments),
        )
    )
    return 0


def _patch_options(arguments: argparse.Namespace) -> PatchOptions:
    return {
        "backend": arguments.backend,
        "precision": _precision(arguments),
        "buckets": _plan(arguments) if arguments.sizes else None,
        "store": arguments.store,
    }


def run_bench(arguments: argparse.Namespace) -> int:
    """Measure patched against unpatched coqui-tts."""
    import transformers

    from neuron_xtts.options import Options
    from neuron_xtts.precision import HOST_PRECISIONS, NEURON_PRECISIONS
    from neuron_xtts.tools.bench import Results
    from neuron_xtts.tools.bench.methods import bench_methods
    from neuron_xtts.tools.bench.sentence import bench_sentence
    from neuron_xtts.tools.bench.stream import bench_stream

    transformers.logging.set_verbosity_error()
    options = _patch_options(arguments)
    on_host = Options.make(**options, to_run=True).neuron is None
    precisions = arguments.precisions or (HOST_PRECISIONS if on_host else NEURON_PRECISIONS)
    common: dict[str, Any] = {"small": arguments.small, "checkpoint": arguments.checkpoint, "options": options}
    results: Results
    if arguments.what == "stream":
        lengths = arguments.codes or (100, 300, 600)
        results = bench_stream(lengths=lengths, size=arguments.chunk, rounds=arguments.rounds, **common)
    else:
        del options["precision"]
        common["precisions"] = precisions
        if arguments.what == "methods":
            results = bench_methods(iterations=arguments.iterations, warm_up=arguments.warm_up, **common)
        else:
            lengths = arguments.codes or (50, 100, 200, 400)
            results = bench_sentence(lengths=lengths, rounds=arguments.rounds, memory=on_host, **common)
    print(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results.to_dict(), indent=2) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(results.markdown())
    if arguments.png:
        results.draw(arguments.png)
    return 0


def run_compile(arguments: argparse.Namespace) -> int:
    """Compile graphs into the store."""
    import neuron_xtts
    from neuron_xtts.coqui.models import load_or_make

    summary = neuron_xtts.compile(
        load_or_make(arguments.checkpoint, arguments.small),
        backend="neuron",
        precision=_precision(arguments),
        buckets=_plan(arguments),
        store=arguments.store,
        target=arguments.target,
        jobs=arguments.jobs,
        timeout=arguments.timeout,
    )
    print(summary)
    return 0 if summary.ok else 1


def run_graphs(arguments: argparse.Namespace) -> int:
    """List, verify or prune the store, or lower graphs."""
    store = Store(arguments.store)
    if arguments.lower:
        return _lower(arguments)
    if arguments.prune:
        return _prune(store, arguments.prune == "stale")
    rows, faults = [], 0
    for artifact in store:
        state = artifact.quarantined or ("verified" if artifact.manifest["verification"] else "not verified yet")
        if arguments.verify:
            try:
                artifact.check()
            except NeuronXttsError as error:
                state, faults = str(error), faults + 1
        rows.append(artifact.manifest | {"folder": str(artifact.folder), "state": state})
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 1 if faults else 0
    header = ("graph", "bucket", "precision", "target", "neuronx-cc", "weights", "MB", "state")
    lines = []
    for row in rows:
        recipe = row["recipe"]
        identity = (recipe["graph"], bucket_name(recipe["bucket"]), recipe["precision"], recipe["target"])
        origin = (recipe["versions"]["neuronx-cc"], recipe["weights"][:8])
        lines.append((*identity, *origin, f"{row['bytes'] / 1e6:.1f}", row["state"]))
    print(f"{store.root}: {len(rows)} artifacts, {sum(row['bytes'] for row in rows) / 1e9:.2f} GB\n")
    print(table(header, lines))
    return 1 if faults else 0


def _prune(store: Store, stale: bool) -> int:
    from neuron_xtts.backends.neuron.device import find_neuron
    from neuron_xtts.backends.neuron.source import source_digest
    from neuron_xtts.graphs.catalogue import CATALOGUE

    installed = find_neuron().versions

    def is_stale(recipe: dict[str, Any]) -> bool:
        versions = {name: recipe["versions"][name] for name in ("torch-neuronx", "neuronx-cc")}
        known = recipe["graph"] in CATALOGUE
        return bool(
            not known
            or recipe["source"] != source_digest(recipe["graph"])
            or any(installed.get(name) != v for name, v in versions.items())
        )

    doomed = list(store.leftovers())
    doomed += [a.folder for a in store if a.quarantined or (stale and is_stale(a.manifest["recipe"]))]
    freed = 0
    for folder in doomed:
        freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder, ignore_errors=True)
        print(f"removed {folder}")
    print(f"{freed / 1e9:.2f} GB freed")
    return 0


def _lower(arguments: argparse.Namespace) -> int:
    from neuron_xtts.backends.neuron.compiler import lower_all
    from neuron_xtts.backends.neuron.lowering import frontend
    from neuron_xtts.coqui.models import load_or_make
    from neuron_xtts.coqui.recognise import make_graphs
    from neuron_xtts.coqui.surface import Networks

    frontend()
    xtts = load_or_make(arguments.checkpoint, arguments.small).synthesizer.tts_model
    graphs, missing = make_graphs(Networks.of(xtts))
    with tempfile.TemporaryDirectory() as scratch:
        lowered = lower_all(graphs, _plan(arguments), Path(scratch), progress=True)
    if arguments.json:
        print(json.dumps([asdict(lowering) for lowering in lowered], indent=2))
    else:
        rows = [
            (
                lowering.graph,
                lowering.bucket,
                str(sum(lowering.operators.values())),
                f"{lowering.flops / 1e9:.2f}",
                f"{lowering.bytes / 1e6:.1f}",
                "; ".join(lowering.problems) or "none",
            )
            for lowering in lowered
        ]
        print(table(("graph", "bucket", "operators", "GFLOP", "MB", "unlowered, disconnected or rejected"), rows))
    for graph, reason in missing.items():
        print(f"no {graph} graph: {reason}", file=sys.stderr)
    return 0 if lowered and not missing and not any(lowering.problems for lowering in lowered) else 1


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print what a bug report needs."""
    from neuron_xtts.coqui.models import load_or_make
    from neuron_xtts.options import Options
    from neuron_xtts.tools.doctor import examine

    precision, plan = _precision(arguments), _plan(arguments)
    try:
        options = Options.make("auto", precision, plan, arguments.store, to_run=False, target=arguments.target)
    except NeuronMissingError:  # which is among the problems
        options = Options.make("cpu", "fp32", plan, arguments.store, to_run=False)
    model = None
    if arguments.checkpoint or arguments.small:
        model = load_or_make(arguments.checkpoint, arguments.small).synthesizer.tts_model
    text, problems = examine(options.store, model, options)
    print(text)
    print("\nno problems found" if not problems else "\nproblems:\n" + "\n".join(f"* {p}" for p in problems))
    return 1 if problems else 0
