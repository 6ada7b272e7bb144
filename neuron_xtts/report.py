"""What ran where, and why not: counters, and the report that is made of them."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any

from neuron_xtts.locks import Lock
from neuron_xtts.tables import Table, html, table
from neuron_xtts.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LATEST = 24  # utterances that a picture shows one by one: a page, a choice of ours


@dataclass
class RouteCounts:
    """What became of the calls of one route.

    Attributes:
        served: calls that did not fall back.
        handed_over: those of them whose result was already there: latents that decoding had made, audio of the same
            latents, a known voice.
        seconds: time in graphs and around them, fallbacks included.
        fallbacks: calls that coqui-tts served, by reason.
    """

    served: int = 0
    handed_over: int = 0
    seconds: float = 0.0
    fallbacks: Counter[str] = field(default_factory=Counter)

    @property
    def calls(self) -> int:
        """Calls of the route, whoever served them."""
        return self.served + self.fallbacks.total()


@dataclass
class GraphCounts:
    """The runs of one graph in one bucket.

    Attributes:
        runs: how many.
        seconds: time in them.
        used: sizes of the inputs: positions, or frames, times rows.
        padded: the same with padding.
    """

    runs: int = 0
    seconds: float = 0.0
    used: int = 0
    padded: int = 0

    @property
    def waste(self) -> float:
        """The share of the work that went into padding (of a vocoder window, the halo too)."""
        return 1 - self.used / self.padded if self.padded else 0.0


@dataclass
class BatchCounts:
    """The rows that decode together.

    Attributes:
        slots: rows that may.
        decoding: rows that have a slot now.
        waiting: calls that wait for slots now.
        steps: decode steps, by how many rows they had.
        calls: that got slots.
        seconds: that those waited, from being made to their prefill.
        longest: seconds that one of them waited.
        refused: calls that found the queue full.
        cancelled: calls that were given up before their end, such as streams that were closed.
    """

    slots: int = 0
    decoding: int = 0
    waiting: int = 0
    steps: Counter[int] = field(default_factory=Counter)
    calls: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    refused: int = 0
    cancelled: int = 0

    def __add__(self, other: BatchCounts) -> BatchCounts:
        """Both together, as of two engines."""
        return BatchCounts(
            slots=self.slots + other.slots,
            decoding=self.decoding + other.decoding,
            waiting=self.waiting + other.waiting,
            steps=self.steps + other.steps,
            calls=self.calls + other.calls,
            seconds=self.seconds + other.seconds,
            longest=max(self.longest, other.longest),
            refused=self.refused + other.refused,
            cancelled=self.cancelled + other.cancelled,
        )

    def waited(self, seconds: float) -> None:
        """Count a call that got slots."""
        self.calls += 1
        self.seconds += seconds
        self.longest = max(self.longest, seconds)


@dataclass
class GuardCounts:
    """What the guard against tails did.

    Attributes:
        capped: sentences that reached as many codes as the guard lets them have.
        retried: those of them that were said once more.
        ended: those of these that then ended by themselves.
        trimmed: calls whose end was cut off.
        seconds: that were cut off.
    """

    capped: int = 0
    retried: int = 0
    ended: int = 0
    trimmed: int = 0
    seconds: float = 0.0


class GuardCounters:
    """What the guard of one patched model did. Threads may count and read at the same time."""

    def __init__(self) -> None:
        self._counts = GuardCounts()
        self._lock = Lock()  # reentrant: as of `CallCounters`

    def capped(self, *, retried: bool = False, ended: bool = False) -> None:
        """Count a sentence that reached its cap, whether it was said once more, and then ended by itself."""
        with self._lock:
            self._counts.capped += 1
            self._counts.retried += retried
            self._counts.ended += ended

    def trimmed(self, seconds: float) -> None:
        """Count a call whose end was cut off."""
        with self._lock:
            self._counts.trimmed += 1
            self._counts.seconds += seconds

    def snapshot(self) -> GuardCounts:
        """A copy of the counts."""
        with self._lock:
            return copy.copy(self._counts)


class CallCounters:
    """What became of the calls of one patched model, by route. Threads may count and read at the same time."""

    def __init__(self) -> None:
        self._routes: dict[str, RouteCounts] = {}
        self._lock = Lock()  # reentrant: a stream that is collected anywhere is counted, too

    def served(self, route: str, *, handed_over: bool = False) -> None:
        """Count a call that did not fall back, and whether its result was already there."""
        with self._lock:
            counts = self._route(route)
            counts.served += 1
            counts.handed_over += handed_over

    def fell_back(self, route: str, reason: str) -> bool:
        """Count a call that coqui-tts serves; true for the first of its reason."""
        with self._lock:
            fallbacks = self._route(route).fallbacks
            fallbacks[reason] += 1
            return fallbacks[reason] == 1

    def took(self, route: str, seconds: float) -> None:
        """Add time to a route."""
        with self._lock:
            self._route(route).seconds += seconds

    def snapshot(self, routes: Iterable[str]) -> dict[str, RouteCounts]:
        """Copies of the counts of ``routes``, in that order."""
        with self._lock:
            return copy.deepcopy({name: self._route(name) for name in routes})

    def _route(self, name: str) -> RouteCounts:
        return self._routes.setdefault(name, RouteCounts())


class RunCounters:
    """The runs of the graphs of one patched model. Threads may count and read at the same time."""

    def __init__(self) -> None:
        self._graphs: dict[str, dict[str, GraphCounts]] = {}
        self._lock = Lock()  # reentrant: a stream that is collected anywhere is counted, too

    def count(self, graph: str, bucket: str, seconds: float, used: int, padded: int) -> None:
        """Count a run of a graph in a bucket, with what `GraphCounts` keeps of it."""
        with self._lock:
            counts = self._graphs.setdefault(graph, {}).setdefault(bucket, GraphCounts())
            counts.runs += 1
            counts.seconds += seconds
            counts.used += used
            counts.padded += padded

    def snapshot(self) -> dict[str, dict[str, GraphCounts]]:
        """Copies of the counts by graph and bucket."""
        with self._lock:
            return copy.deepcopy(self._graphs)


@dataclass
class Report:
    """A snapshot of what a patched model did; ``print`` it, let a notebook show it, take `to_dict`, or `plot`.

    Attributes:
        backend: where graphs run; None if the model is not patched.
        engines: the host, or each of the NeuronCores, such as ``core 0``.
        precision: of the graphs.
        buckets: the bucket plan; None in it means exact shapes.
        routes: the counts of each route.
        graphs: the counts of each graph by bucket, such as ``graphs["decode"]["1x512"]``.
        batch: of the rows that decode together.
        guard: what the guard against tails did; None if there is none.
        missing: graphs that cannot be had for this model, and buckets of others, such as ``decode 1x512``, each with
            the reason.
        over_host: why caches go by way of the host on Neuron, and do not move on the device; None if they do.
        copied: bytes of weights that graphs keep in the host's memory beside the model's own.
        gone: routes that are no longer installed, because the model replaced the modules they were on.
        timeline: what utterances were at, and when.
    """

    backend: str | None = None
    engines: list[str] = field(default_factory=list)
    precision: str | None = None
    buckets: dict[str, Any] = field(default_factory=dict)
    routes: dict[str, RouteCounts] = field(default_factory=dict)
    graphs: dict[str, dict[str, GraphCounts]] = field(default_factory=dict)
    batch: BatchCounts = field(default_factory=BatchCounts)
    guard: GuardCounts | None = None
    missing: dict[str, str] = field(default_factory=dict)
    over_host: str | None = None
    copied: int = 0
    gone: list[str] = field(default_factory=list)
    timeline: Timeline = field(default=Timeline(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, fit for JSON; of the timeline it has the seconds in each phase."""
        data = asdict(replace(self, timeline=Timeline()))
        data["timeline"] = self.timeline.to_dict()
        for name, route in self.routes.items():
            data["routes"][name] |= {"calls": route.calls, "fallbacks": dict(route.fallbacks)}
        data["batch"]["steps"] = dict(self.batch.steps)
        for name, buckets in self.graphs.items():
            for bucket, counts in buckets.items():
                data["graphs"][name][bucket]["waste"] = counts.waste
        return data

    def plot(self, path: str | os.PathLike[str] | None = None, *, latest: int = LATEST) -> Figure:
        """Draw what utterances were at, how many rows decoded together, and how full buckets were.

        Args:
            path: of a file to draw it into, too, such as ``report.png``.
            latest: how many utterances to draw one by one; if there were more, an overview says how many of all that
                are remembered were at what.

        Returns:
            matplotlib's figure, which a notebook shows.

        Raises:
            ValueError: ``latest`` is below 1.
        """
        from neuron_xtts.picture import Use, draw

        if latest < 1:
            raise ValueError(f"latest={latest!r}; expected how many utterances to draw")
        uses = [
            Use(graph, bucket, counts.runs, counts.seconds, counts.waste)
            for graph, buckets in self.graphs.items()
            for bucket, counts in buckets.items()
        ]
        figure = draw(self._headline().partition("\n")[0], self.timeline, uses, latest)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def __str__(self) -> str:
        return "\n\n".join([self._headline(), *(table(*content) for content in self._tables())])

    def _repr_html_(self) -> str:
        headline = escape(self._headline()).replace("\n", "<br>")
        return f"<p>{headline}</p>" + "".join(html(*content) for content in self._tables())

    def _headline(self) -> str:
        if self.backend is None:
            return "neuron_xtts: not patched"
        lines = [f"neuron_xtts: backend {self.backend}, precision {self.precision}"]
        if len(self.engines) > 1:
            lines[0] += f", {', '.join(self.engines)}"
        if self.copied:
            lines[0] += f", {self.copied / 2**20:.0f} MiB of converted weights"
        lines += [f"no {graph} graph: {reason}" for graph, reason in self.missing.items()]
        if self.over_host:
            lines.append(f"caches go by way of the host: {self.over_host}")
        if self.gone:
            lines.append(f"gone: {', '.join(self.gone)} (the model replaced these modules; patch(model) restores them)")
        return "\n".join(lines)

    def _tables(self) -> Iterable[Table]:
        if self.routes:
            yield (
                ("route", "calls", "computed", "handed over", "fallbacks", "seconds"),
                [
                    (name, str(r.calls), str(r.served - r.handed_over), str(r.handed_over), str(r.fallbacks.total()),
                     f"{r.seconds:.3f}")
                    for name, r in self.routes.items()
                ],
            )  # fmt: skip
        reasons = [
            (name, str(count), reason) for name, r in self.routes.items() for reason, count in r.fallbacks.most_common()
        ]
        if reasons:
            yield ("fallback of", "calls", "reason"), reasons
        runs = [
            (name, bucket, str(g.runs), f"{g.seconds:.3f}", f"{1e3 * g.seconds / g.runs:.2f}", f"{g.waste:.0%}")
            for name, buckets in self.graphs.items()
            for bucket, g in buckets.items()
        ]
        if runs:
            yield ("graph", "bucket", "runs", "seconds", "ms per run", "padding"), runs
        if self.guard is not None:
            g = self.guard
            yield (
                ("guard: capped", "retried", "then ended", "trimmed", "seconds cut off"),
                [(str(g.capped), str(g.retried), str(g.ended), str(g.trimmed), f"{g.seconds:.3f}")],
            )
        if self.batch.steps.keys() - {1} or self.batch.waiting or self.batch.refused or self.batch.cancelled:
            steps = ", ".join(f"{count} of {rows}" for rows, count in sorted(self.batch.steps.items()))
            yield (
                ("slots", "decoding", "waiting", "steps of rows", "calls", "waited, mean", "longest", "refused",
                 "cancelled"),
                [
                    (str(self.batch.slots), str(self.batch.decoding), str(self.batch.waiting), steps,
                     str(self.batch.calls), f"{self.batch.seconds / max(self.batch.calls, 1):.3f} s",
                     f"{self.batch.longest:.3f} s", str(self.batch.refused), str(self.batch.cancelled))
                ],
            )  # fmt: skip
