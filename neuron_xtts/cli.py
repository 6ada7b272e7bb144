"""The command ``neuron-xtts``."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from neuron_xtts.buckets import BucketPlan, bucket_name
from neuron_xtts.errors import NeuronMissingError, NeuronXttsError
from neuron_xtts.precision import Precision
from neuron_xtts.report import table
from neuron_xtts.store import Store
from neuron_xtts.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        status: int = arguments.run(arguments)
        return status
    except (NeuronXttsError, OSError, ValueError) as error:
        print(f"neuron-xtts: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neuron-xtts", description="coqui-tts's XTTS v2 on AWS Neuron and on the host"
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--checkpoint", type=Path, metavar="DIR", help="a real XTTS v2 checkpoint")
    model.add_argument("--small", action="store_true", help="a small model, for a quick look")

    plan = argparse.ArgumentParser(add_help=False)
    plan.add_argument("--store", type=Path, metavar="DIR", help="of compiled graphs (default: the user's cache)")
    plan.add_argument(
        "--sizes", type=_sizes, action="append", default=[], metavar="FIELD=N,N",
        help="of the bucket plan, such as decode=512 or slots=1,4; nothing after the = leaves the graph out",
    )  # fmt: skip
    neuron = argparse.ArgumentParser(add_help=False, parents=[plan])
    neuron.add_argument(
        "--precision",
        default="fp32",
        metavar="NAME",
        help="fp32, bf16, int8 (host), bf16-all (Neuron); default: fp32",
    )
    neuron.add_argument(
        "--compiler-args", type=_assignment, action="append", default=[], metavar="GRAPH=ARGS",
        help="of neuronx-cc for one graph, such as vocoder=-O2",
    )  # fmt: skip

    demo = commands.add_parser(
        "demo",
        parents=[model, neuron],
        help="speak one sentence with plain coqui-tts and patched, and compare",
        description="Speak one sentence with plain coqui-tts and patched, with the same seed; compare time and audio. "
        "Without --checkpoint the weights are random: the time is real, the audio is noise.",
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--speaker-wav", type=Path, metavar="FILE", help="the voice to clone (default: a tone it makes)")
    demo.add_argument("--text", help="the sentence")
    demo.add_argument("--language", default="en", help="of the sentence (default: %(default)s)")
    demo.add_argument("--codes", type=_positive, default=100, help="with random weights (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    demo.add_argument("--backend", default="auto", help="auto, cpu, neuron or neuron:N (default: %(default)s)")
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="(default: %(default)s)")

    compiling = commands.add_parser(
        "compile",
        parents=[neuron],
        help="compile the graphs for Neuron",
        description="Compile the graphs of a model for Neuron and put them into the store, from which patch() loads "
        "them. It takes minutes a graph, and needs Neuron's packages but no device. Exits with 1 if a graph failed.",
    )
    compiling.set_defaults(run=_compile)
    which = compiling.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", type=Path, metavar="DIR", help="a real XTTS v2 checkpoint")
    which.add_argument("--small", action="store_true", help="a small model with random weights")
    which.add_argument("--random", action="store_true", help="a full-size model with random weights")
    compiling.add_argument("--target", help="inf2, trn1, trn1n or trn2 (default: this machine)")
    compiling.add_argument("--jobs", type=_positive, help="graphs at a time (default: what memory allows)")
    compiling.add_argument("--timeout", type=float, metavar="SECONDS", help="for one graph (default: an hour)")

    bench = commands.add_parser(
        "bench",
        parents=[model, neuron],
        help="measure, patched against unpatched",
        description="Measure patched against unpatched coqui-tts, in turns, in one process, with a known voice. "
        "sentence: seconds by stage in every precision, first audio, accuracy, memory. stream: time to first audio and "
        "time per chunk. graphs: GPT.forward, vocoder and generation by themselves, mean and deviation. Full size "
        "takes half an hour on two cores.",
    )
    bench.set_defaults(run=_bench)
    bench.add_argument(
        "what", choices=("sentence", "stream", "graphs"), nargs="?", default="sentence", help="(default: sentence)"
    )
    bench.add_argument(
        "--codes", type=_positive, nargs="+", help="of each sentence or stream (default: 50 100 200 400; 100 300 600)"
    )
    bench.add_argument("--chunk", type=_positive, default=20, help="codes per chunk of a stream (default: %(default)s)")
    bench.add_argument(
        "--precisions", nargs="+", metavar="NAME", help="of sentences and graphs (default: all that the backend has)"
    )
    bench.add_argument("--rounds", type=_positive, default=3, help="of sentences and streams (default: %(default)s)")
    bench.add_argument(
        "--iterations", type=_positive, default=100, help="of graphs; a tenth of generation (default: %(default)s)"
    )
    bench.add_argument("--warm-up", type=_positive, default=10, help="iterations not counted (default: %(default)s)")
    bench.add_argument("--backend", default="auto", help="auto, cpu, neuron or neuron:N (default: %(default)s)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all samples and the figures made of them")
    bench.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    bench.add_argument("--png", type=Path, metavar="FILE", help="draw the RTF, the time per chunk, or the means")

    graphs = commands.add_parser(
        "graphs",
        parents=[model, plan],
        help="list, verify and prune compiled graphs; lower them",
        description="Without options, list the store. --lower shows what the installed XLA frontend (torch-xla, or "
        "torch-neuronx's) makes of every graph of the static bucket plan, and whatever stands against compiling it.",
    )
    graphs.set_defaults(run=_graphs)
    what = graphs.add_mutually_exclusive_group()
    what.add_argument("--lower", action="store_true", help="lower the graphs; exit with 1 if anything is against them")
    what.add_argument(
        "--verify", action="store_true", help="check all checksums, set aside what is corrupt; exit with 1 if any is"
    )
    what.add_argument(
        "--prune",
        choices=("broken", "stale"),
        nargs="?",
        const="broken",
        help="remove what cannot be used (broken, the default), or also what other versions made (stale)",
    )
    graphs.add_argument("--json", action="store_true", help="a list of objects instead of a table")

    doctor = commands.add_parser(
        "doctor",
        parents=[model, neuron],
        help="print everything a bug report needs",
        description="Print versions, hardware and store, with --checkpoint also which of its graphs are ready. Exits "
        "with 1 if there are problems.",
    )
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--target", help="inf2, trn1, trn1n or trn2 (default: this machine)")
    return parser


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _assignment(value: str) -> tuple[str, str]:
    name, equals, rest = value.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=VALUE")
    return name, rest


def _sizes(value: str) -> tuple[str, tuple[int, ...]]:
    name, sizes = _assignment(value)
    if name not in {field.name for field in fields(BucketPlan)}:
        raise argparse.ArgumentTypeError(f"{name!r} is not a field of BucketPlan")
    return name, tuple(_positive(size) for size in sizes.split(",") if size)


def _plan(arguments: argparse.Namespace) -> BucketPlan:
    return replace(BucketPlan.static(), **dict(arguments.sizes))


def _precision(arguments: argparse.Namespace) -> Precision:
    return Precision(arguments.precision, dict(arguments.compiler_args))


def _demo(arguments: argparse.Namespace) -> int:
    import transformers

    from neuron_xtts import demo

    transformers.logging.set_verbosity_error()  # a line for every max_new_tokens would break the progress bars
    print(
        demo.run(
            arguments.out,
            small=arguments.small,
            checkpoint=arguments.checkpoint,
            speaker_wav=arguments.speaker_wav,
            text=arguments.text or demo.SENTENCES[0],
            language=arguments.language,
            codes=arguments.codes,
            seed=arguments.seed,
            **_patch_options(arguments),
        )
    )
    return 0


def _patch_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "backend": arguments.backend,
        "precision": _precision(arguments),
        "buckets": _plan(arguments) if arguments.sizes else None,
        "store": arguments.store,
    }


def _bench(arguments: argparse.Namespace) -> int:
    import transformers

    from neuron_xtts.benchmarks import Results
    from neuron_xtts.benchmarks.graphs import bench_graphs
    from neuron_xtts.benchmarks.sentence import bench_sentence
    from neuron_xtts.benchmarks.stream import bench_stream
    from neuron_xtts.options import Options
    from neuron_xtts.precision import HOST_PRECISIONS, NEURON_PRECISIONS

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
        if arguments.what == "graphs":
            results = bench_graphs(iterations=arguments.iterations, warm_up=arguments.warm_up, **common)
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


def _compile(arguments: argparse.Namespace) -> int:
    import neuron_xtts
    from neuron_xtts import demo

    summary = neuron_xtts.compile(
        demo.load_or_make(arguments.checkpoint, arguments.small),
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


def _graphs(arguments: argparse.Namespace) -> int:
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
    from neuron_xtts.compiler import source_digest
    from neuron_xtts.device import find_neuron

    installed, source = find_neuron().versions, source_digest()

    def is_stale(recipe: dict[str, Any]) -> bool:
        versions = {name: recipe["versions"][name] for name in ("torch-neuronx", "neuronx-cc")}
        return bool(recipe["source"] != source or any(installed.get(name) != v for name, v in versions.items()))

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
    from neuron_xtts import demo
    from neuron_xtts.compiler import lower_all
    from neuron_xtts.engine import make_graphs
    from neuron_xtts.lowering import frontend

    frontend()
    xtts = demo.load_or_make(arguments.checkpoint, arguments.small).synthesizer.tts_model
    graphs, missing = make_graphs(xtts.gpt, xtts.hifigan_decoder)
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


def _doctor(arguments: argparse.Namespace) -> int:
    from neuron_xtts import demo
    from neuron_xtts.doctor import examine
    from neuron_xtts.options import Options

    precision, plan = _precision(arguments), _plan(arguments)
    try:
        options = Options.make("auto", precision, plan, arguments.store, to_run=False, target=arguments.target)
    except NeuronMissingError:  # which is among the problems
        options = Options.make("cpu", "fp32", plan, arguments.store, to_run=False)
    model = None
    if arguments.checkpoint or arguments.small:
        model = demo.load_or_make(arguments.checkpoint, arguments.small).synthesizer.tts_model
    text, problems = examine(options.store, model, options)
    print(text)
    print("\nno problems found" if not problems else "\nproblems:\n" + "\n".join(f"* {p}" for p in problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
