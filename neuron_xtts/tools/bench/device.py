"""What a user with a Neuron device can send: everything from the doctor to streams, from one command."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import neuron_xtts
from neuron_xtts.backends.neuron.backend import LoadedGraph, NeuronBackend
from neuron_xtts.buckets import bucket_name
from neuron_xtts.errors import describe
from neuron_xtts.options import Options, PatchOptions
from neuron_xtts.patching.patch import find_patch
from neuron_xtts.tables import Table
from neuron_xtts.tools.bench import Benchmark, Figures, Subject, in_precision, machine
from neuron_xtts.tools.bench.sentence import SentenceResults, bench_sentence
from neuron_xtts.tools.bench.stream import StreamResults, bench_stream
from neuron_xtts.tools.doctor import examine

logger = logging.getLogger(__name__)

SENTENCES = (50, 200)  # codes
STREAMS = (100,)


@dataclass
class GraphTimes:
    """A compiled graph by itself.

    Attributes:
        graph: its name.
        bucket: its sizes.
        bytes: of its artifact.
        deviation: its largest error against the host, as it was noted when it was verified.
        run: seconds of every call.
        state: bytes of its state.
        returned: where a call leaves the new contents of its state, such as ``cpu``; None without a state.
        read: seconds in which its state came to the host.
        write: seconds in which it went to the device.
    """

    graph: str
    bucket: str
    bytes: int
    deviation: float | str | None
    run: list[float] = field(default_factory=list)
    state: int = 0
    returned: str | None = None
    read: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Medians: milliseconds of a run, and GB/s of the state to the host and back."""
        found = {"ms": 1e3 * statistics.median(self.run)}
        for name, taken in (("GB/s to the host", self.read), ("GB/s to the device", self.write)):
            if taken:
                found[name] = self.state / 1e9 / statistics.median(taken)
        return found


@dataclass(kw_only=True)
class DeviceResults(Benchmark):
    """What one command measured on a device.

    Attributes:
        doctor: what it found.
        verdict: what that comes to.
        compiled: of each precision, what became of its graphs: name and bucket, status, seconds, bytes, reason.
        graphs: of each precision, its graphs by themselves.
        over_host: of each precision, why caches go by way of the host; None if they stay on the device.
        sentence: sentences; None if nothing could be spoken on the device.
        stream: streams, likewise, in the first precision.
    """

    doctor: str
    verdict: str
    compiled: dict[str, list[tuple[str, str, float, int, str | None]]] = field(default_factory=dict)
    graphs: dict[str, list[GraphTimes]] = field(default_factory=dict)
    over_host: dict[str, str | None] = field(default_factory=dict)
    sentence: SentenceResults | None = None
    stream: StreamResults | None = None

    def medians(self) -> dict[str, Figures]:
        """By precision and graph: see `GraphTimes.figures`."""
        return {
            precision: {f"{times.graph} {times.bucket}": times.figures() for times in graphs}
            for precision, graphs in self.graphs.items()
        }

    def tables(self) -> list[Table]:
        """Compilation, graphs, then the tables of sentences and streams."""
        tables: list[Table] = [(("verdict",), [(line,) for line in self.verdict.splitlines()])]
        for precision, entries in self.compiled.items():
            rows = [
                (name, status, f"{seconds:.0f} s", f"{size / 1e6:.1f} MB", (reason or "").partition("\n")[0])
                for name, status, seconds, size, reason in entries
            ]
            tables.append(((f"compiled, {precision}", "", "took", "size", "reason"), rows))
        for precision, graphs in self.graphs.items():
            tables.append(
                (
                    (precision, "ms a run", "MB", "error", "state, MB", "left on", "GB/s to the host", "to the device"),
                    [_row(times) for times in graphs],
                )
            )
        ways = [(name, reason or "stay on the device") for name, reason in self.over_host.items()]
        tables += [(("caches", ""), ways)] if ways else []
        for results in (self.sentence, self.stream):
            tables += results.tables() if results else []
        return tables

    def markdown(self) -> str:
        """Every table, and what the doctor found."""
        return f"{super().markdown()}\n```\n{self.doctor}\n```\n"

    def draw(self, path: Path) -> None:
        """Draw what a run of each graph takes into a PNG file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1 + 0.3 * sum(map(len, self.graphs.values()))), layout="constrained")
        axes = figure.subplots()
        found = [
            (f"{name}, {precision}", figures["ms"])
            for precision, graphs in self.medians().items()
            for name, figures in graphs.items()
        ]
        axes.barh([name for name, _ in found], [ms for _, ms in found])
        axes.set(xlabel="ms a run, median", title=str(self.machine["instance"]))
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
        figure.savefig(path, dpi=120)


def _row(times: GraphTimes) -> tuple[str, ...]:
    figures = times.figures()
    error = times.deviation if isinstance(times.deviation, str) or times.deviation is None else f"{times.deviation:.1e}"
    return (
        f"{times.graph} {times.bucket}",
        f"{figures['ms']:.2f}",
        f"{times.bytes / 1e6:.1f}",
        error or "",
        f"{times.state / 1e6:.1f}" if times.state else "",
        times.returned or "",
        *(f"{figures[name]:.2f}" if name in figures else "" for name in ("GB/s to the host", "GB/s to the device")),
    )


def bench_device(
    subject: Subject, *, iterations: int, rounds: int, precisions: Sequence[str], options: PatchOptions
) -> DeviceResults:
    """Examine, compile, verify, and time graphs, sentences and streams on a device.

    What goes wrong is in the results, which end there: with the canary nothing else is tried.

    Args:
        subject: the model and the voice.
        iterations: of each graph, after one that does not count.
        rounds: of sentences and streams.
        precisions: the precisions, each of which is compiled.
        options: keyword arguments of `neuron_xtts.patch`, but for the precision.

    Raises:
        NeuronMissingError: there is no device.
    """
    xtts, _ = subject.prepare()
    chosen = Options.make(**in_precision(options, precisions[0]), to_run=True)
    assert chosen.neuron is not None
    findings = examine(chosen, xtts, canary=True)
    facts: dict[str, str | int] = {
        "instance": chosen.neuron.instance or "unknown",
        "cores": chosen.neuron.cores,
        **chosen.neuron.versions,
    }
    results = DeviceResults(machine={**machine(), **facts}, doctor=findings.report, verdict=findings.verdict)
    try:
        _measure(results, xtts, subject, iterations, rounds, precisions, options)
    except Exception as error:  # of a device that nobody has tried: what was found so far is what is wanted
        logger.warning("the benchmark ended early", exc_info=True)
        results.verdict += f"\nThe benchmark ended early: {describe(error)}"
    return results


def _measure(
    results: DeviceResults,
    xtts: Any,
    subject: Subject,
    iterations: int,
    rounds: int,
    precisions: Sequence[str],
    options: PatchOptions,
) -> None:
    """Put what is measured into the results, one after another."""
    for precision in precisions:
        wanted = in_precision(options, precision)
        summary = neuron_xtts.compile(
            xtts, backend="neuron", precision=precision, buckets=wanted["buckets"], store=wanted["store"]
        )
        results.compiled[precision] = [
            (f"{entry.graph} {bucket_name(entry.bucket)}", entry.status, entry.seconds, entry.bytes, entry.reason)
            for entry in summary.entries
        ]
        if summary.canary is not None and summary.canary.failure:
            results.verdict = str(summary.canary.failure)
            return
        neuron_xtts.patch(xtts, **wanted)
        try:
            _time_all(results, precision, xtts, iterations)
        finally:
            neuron_xtts.unpatch(xtts)
    first = in_precision(options, precisions[0])
    results.sentence = bench_sentence(
        subject, lengths=SENTENCES, rounds=rounds, precisions=precisions, memory=False, options=first
    )
    results.stream = bench_stream(subject, lengths=STREAMS, rounds=rounds, options=first)
    results.fallbacks = {**results.sentence.fallbacks, **results.stream.fallbacks}


def _time_all(results: DeviceResults, precision: str, xtts: Any, iterations: int) -> None:
    """Time every graph; nothing here keeps them on the device beside those of the next precision."""
    patch = find_patch(xtts)
    assert patch is not None
    backend = patch.runner.backend
    assert isinstance(backend, NeuronBackend)
    results.over_host[precision] = backend.over_host
    times = results.graphs[precision] = []
    for loaded in backend.loaded:
        times.append(_time(loaded, backend, iterations))


@torch.no_grad()
def _time(loaded: LoadedGraph, backend: NeuronBackend, iterations: int) -> GraphTimes:
    recipe, manifest = loaded.recipe, loaded.artifact.manifest
    inputs = list(backend.graphs[recipe.graph].example(*recipe.sizes).values())
    error = (manifest["verification"] or {}).get("error")
    times = GraphTimes(recipe.graph, bucket_name(recipe.bucket), manifest["bytes"], error)
    outputs = loaded(*inputs)
    times.run = [_seconds(lambda: loaded(*inputs)) for _ in range(iterations)]
    if loaded.states:
        contents = loaded.read()
        times.state, times.returned = sum(tensor.nbytes for tensor in contents), outputs[-1].device.type
        times.read = [_seconds(loaded.read) for _ in range(3)]
        times.write = [_seconds(lambda: loaded.write(contents)) for _ in range(3)]
    return times


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
