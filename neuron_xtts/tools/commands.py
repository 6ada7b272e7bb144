"""What each command of ``neuron-xtts`` does with its arguments; each returns the exit status."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import neuron_xtts
from neuron_xtts.backends.memory import Aside
from neuron_xtts.backends.neuron.compiler import lower_all
from neuron_xtts.backends.neuron.lowering import Lowering, frontend
from neuron_xtts.backends.neuron.store import Store
from neuron_xtts.buckets import BucketPlan
from neuron_xtts.coqui.models import load_or_make
from neuron_xtts.coqui.recognise import make_graphs
from neuron_xtts.coqui.surface import Networks
from neuron_xtts.errors import NeuronMissingError
from neuron_xtts.options import Options, PatchOptions
from neuron_xtts.precision import HOST_PRECISIONS, NEURON_PRECISIONS, Precision
from neuron_xtts.tables import table
from neuron_xtts.tools import demo
from neuron_xtts.tools.bench import Benchmark, Results, Subject, batch, device, methods, sentence, serve, stream
from neuron_xtts.tools.doctor import examine
from neuron_xtts.tools.inventory import listing, remove, take_inventory, unusable
from neuron_xtts.tools.judge import Judge, by_name
from neuron_xtts.tools.judge.gates import Gate


def run_demo(arguments: argparse.Namespace) -> int:
    """Speak one sentence with plain coqui-tts and patched."""
    quieten()
    parts = demo.run(
        arguments.out,
        small=arguments.small,
        checkpoint=arguments.checkpoint,
        speaker_wav=arguments.speaker_wav,
        text=arguments.text,
        language=arguments.language,
        codes=arguments.codes,
        seed=arguments.seed,
        **patch_options(arguments),
    )
    for part in parts:
        print(part, end="\n\n", flush=True)
    return 0


def run_bench(arguments: argparse.Namespace) -> int:
    """Measure patched against unpatched coqui-tts."""
    quieten()
    check_files(arguments.json, arguments.markdown, arguments.png)
    results = _measure(arguments)
    _write(results, arguments)
    if arguments.png:
        results.draw(arguments.png)
        results.draw_timelines(arguments.png)
    return 0


def _measure(arguments: argparse.Namespace) -> Benchmark:
    options = patch_options(arguments)
    subject = Subject(arguments.checkpoint, arguments.small, arguments.speaker_wav)
    texts = _texts(arguments.texts) if arguments.texts else ()
    on_host = Options.make(**options, to_run=True).neuron is None
    if arguments.what == "stream":
        return stream.bench_stream(
            subject,
            lengths=arguments.codes or stream.LENGTHS,
            texts=texts,
            size=arguments.chunk,
            rounds=arguments.rounds,
            options=options,
        )
    precisions = arguments.precisions or (HOST_PRECISIONS if on_host else NEURON_PRECISIONS)
    if arguments.what == "methods":
        if arguments.texts:
            raise ValueError("bench methods takes no --texts: its inputs are random tokens and codes")
        return methods.bench_methods(
            subject,
            iterations=arguments.iterations,
            warm_up=arguments.warm_up,
            precisions=precisions,
            options=options,
        )
    if arguments.what == "device":
        if on_host:
            raise NeuronMissingError(
                "bench device measures a Neuron device, and there is none: neuron-xtts doctor says why"
            )
        return device.bench_device(
            subject, iterations=arguments.iterations, rounds=arguments.rounds, precisions=precisions, options=options
        )
    if arguments.what == "serve":
        return serve.bench_serve(
            subject,
            callers=arguments.callers or serve.CALLERS,
            codes=(arguments.codes or [serve.CODES])[0],
            rounds=arguments.rounds,
            precision=arguments.precision,
            options=options,
        )
    if arguments.what == "batch":
        if arguments.codes and len(arguments.codes) > 1:
            raise ValueError(
                f"bench batch takes one number of --codes, which each caller has said, not {arguments.codes}"
            )
        if not arguments.rate > 0:
            raise ValueError(f"--rate {arguments.rate:g}; expected calls a second, such as {batch.RATE}")
        return batch.bench_batch(
            subject,
            callers=arguments.callers or batch.CALLERS,
            codes=(arguments.codes or [batch.CODES])[0],
            texts=texts,
            scenes=arguments.scenes,
            rate=arguments.rate,
            rounds=arguments.rounds,
            precisions=precisions,
            options=options,
        )
    return sentence.bench_sentence(
        subject,
        lengths=arguments.codes or sentence.LENGTHS,
        texts=texts,
        rounds=arguments.rounds,
        precisions=precisions,
        memory=on_host,
        options=options,
    )


def run_judge(arguments: argparse.Namespace) -> int:
    """Judge speech; the status is 1 if a gate failed."""
    quieten()
    check_files(arguments.json, arguments.markdown)
    if arguments.audio:
        _check_folder(arguments.audio)
    options = patch_options(arguments)
    on_host = Options.make(**options, to_run=True).neuron is None
    judge = Judge(
        texts=_texts(arguments.texts)[: arguments.limit],
        recordings=by_name(arguments.speaker_wav),
        in_turn=arguments.in_turn,
        precisions=arguments.precisions or (HOST_PRECISIONS if on_host else NEURON_PRECISIONS),
        seeds=arguments.seeds,
        recognizers=arguments.recognizers,
        baseline=arguments.baseline,
        espeak_voices=arguments.espeak_voice,
        espeak_speed=arguments.espeak_speed,
        espeak_range=arguments.espeak_range,
        gates=[
            *(Gate.parse(text) for text in arguments.gate),
            *(Gate.parse(text, by_interval=True) for text in arguments.gate_interval),
        ],
        options=options,
    )
    results = judge.run(arguments.checkpoint, arguments.audio)
    results.judged["arguments"] = arguments.given
    _write(results, arguments)
    return 0 if results.passed else 1


def _texts(path: Path) -> list[str]:
    """The sentences in a UTF-8 file, one a line; empty lines are left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    texts = [line.strip() for line in text.splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{path} has no text; expected one sentence a line")
    return texts


def check_files(*files: Path | None) -> None:
    """Raise, before hours have gone by, if results could not be written.

    Raises:
        OSError: a file cannot be written.
        ValueError: two are the same.
    """
    asked = [file for file in files if file is not None]
    if len({file.resolve() for file in asked}) < len(asked):
        raise ValueError(f"{', '.join(map(str, asked))}: two of these are the same file; name another one")
    for file in asked:
        if not file.parent.is_dir():
            raise FileNotFoundError(f"{file} cannot be written: there is no folder {file.parent}; make it first")
        if file.is_dir():
            raise IsADirectoryError(f"{file} cannot be written: it is a folder")
        there = file.exists()
        try:
            file.open("ab").close()
        except OSError as error:
            raise OSError(f"{file} cannot be written: {error.strerror}; name another file") from error
        if not there:
            file.unlink()


def _check_folder(folder: Path) -> None:
    """Make a folder; raise OSError, before hours have gone by, if nothing can be written into it."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder; name another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{folder} cannot be written into: {error.strerror}; name another folder") from error


def _write(results: Results, arguments: argparse.Namespace) -> None:
    """Print results, and write them to the files that were asked for."""
    print(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results.to_dict(), indent=2) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(results.markdown())


def run_compile(arguments: argparse.Namespace) -> int:
    """Compile graphs into the store."""
    model = load_or_make(arguments.checkpoint, arguments.small)
    aside = Aside(Store(arguments.store).root / "aside")
    for parameter in model.synthesizer.tts_model.parameters():  # compilers need the memory, and nothing is spoken here
        aside.move(parameter)
    summary = neuron_xtts.compile(
        model,
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
    if arguments.lower:
        return _lower(arguments)
    store = Store(arguments.store)
    if arguments.prune:
        return _prune(store, stale=arguments.prune == "stale")
    items = take_inventory(store, verify=arguments.verify)
    print(json.dumps([item.to_dict() for item in items], indent=2) if arguments.json else listing(store, items))
    return 1 if any(item.fault for item in items) else 0


def _prune(store: Store, *, stale: bool) -> int:
    freed = 0
    for folder in unusable(store, stale=stale):
        freed += remove(folder)
        print(f"removed {folder}")
    print(f"{freed / 1e9:.2f} GB freed")
    return 0


def _lower(arguments: argparse.Namespace) -> int:
    frontend()  # before a model is made: it may not be installed
    xtts = load_or_make(arguments.checkpoint, arguments.small).synthesizer.tts_model
    plan = _plan(arguments)
    graphs, unfit = make_graphs(Networks.of(xtts))
    missing = plan.lacking(unfit)
    with tempfile.TemporaryDirectory() as scratch:
        lowered = lower_all(graphs, plan, _precision(arguments), Path(scratch), progress=True)
    if arguments.json:
        print(json.dumps([asdict(lowering) for lowering in lowered], indent=2))
    else:
        print(_lowering_table(lowered))
    for graph, reason in missing.items():
        print(f"no {graph} graph: {reason}", file=sys.stderr)
    return 0 if lowered and not missing and not any(lowering.problems for lowering in lowered) else 1


def _lowering_table(lowered: Sequence[Lowering]) -> str:
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
    return table(("graph", "bucket", "operators", "GFLOP", "MB", "unlowered, disconnected or rejected"), rows)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print what a bug report needs, and a verdict."""
    options = _options_to_examine(arguments)
    model = None
    if arguments.checkpoint or arguments.small:
        model = load_or_make(arguments.checkpoint, arguments.small).synthesizer.tts_model
    findings = examine(options, model, canary=arguments.canary)
    print(findings.report)
    print("\nproblems:" if findings.problems else "\nno problems found")
    for problem in findings.problems:
        print(f"* {problem}")
    print(f"\n{findings.verdict}")
    return 1 if findings.problems else 0


def _options_to_examine(arguments: argparse.Namespace) -> Options:
    precision, plan = _precision(arguments), _plan(arguments)
    try:
        return Options.make("auto", precision, plan, arguments.store, to_run=False, target=arguments.target)
    except NeuronMissingError:  # which is among the problems
        return Options.make("cpu", "fp32", plan, arguments.store, to_run=False)


def _plan(arguments: argparse.Namespace) -> BucketPlan:
    return replace(BucketPlan.static(), **dict(arguments.sizes))


def _precision(arguments: argparse.Namespace) -> Precision:
    return Precision(arguments.precision, dict(arguments.compiler_args))


def patch_options(arguments: argparse.Namespace) -> PatchOptions:
    """The options of `neuron_xtts.patch` that arguments name."""
    return {
        "backend": arguments.backend,
        "precision": _precision(arguments),
        "buckets": _plan(arguments) if arguments.sizes else None,
        "store": arguments.store,
    }


def quieten() -> None:
    """Keep transformers from saying something for every max_new_tokens, which would break the progress bars."""
    import transformers

    transformers.logging.set_verbosity_error()
