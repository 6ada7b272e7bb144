"""Figures for Prometheus: what was asked for, how soon it was heard, and what ran where."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import neuron_xtts
from neuron_xtts.narration.narrator import Narration
from neuron_xtts.serving.studio import Studio

_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30)
_RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 4)


class Metrics:
    """The figures of one server.

    Args:
        studio: that it speaks with.

    Attributes:
        first_audio: seconds from a request to its first audio.
    """

    def __init__(self, studio: Studio) -> None:
        self._registry = CollectorRegistry()
        self.first_audio = self._histogram("ttfa_seconds", "From a request to its first audio", _SECONDS)
        self._rtf = self._histogram("rtf", "Seconds that speech took for each second of audio", _RATIOS)
        self._audio = Counter("neuron_xtts_audio_seconds", "Audio that was made", registry=self._registry)
        self._requests = Counter(
            "neuron_xtts_requests", "Requests by path and status", ["path", "status"], registry=self._registry
        )
        self._registry.register(_Engine(studio))

    def spoken(self, narration: Narration, seconds: float) -> None:
        """Count what was said of a request, in so many seconds."""
        if narration.seconds:
            self._audio.inc(narration.seconds)
            self._rtf.observe(seconds / narration.seconds)

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)

    def counting(self, app: ASGIApp) -> ASGIApp:
        """An application whose requests are counted."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # The path of a route: those that clients make up would be figures without end.
                    path = getattr(scope.get("route"), "path", "other")
                    self._requests.labels(path, str(message["status"])).inc()
                await send(message)

            await app(scope, receive, noted)

        return counted

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"neuron_xtts_{name}", what, buckets=buckets, registry=self._registry)


class _Engine(Collector):
    """What the engine itself counts, read when somebody asks."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    def collect(self) -> Iterable[Metric]:
        """The figures."""
        report = neuron_xtts.report(self._studio.model)
        batch = report.batch
        gauges = {
            "slots": ("Rows that may decode together", batch.slots),
            "decoding": ("Rows that decode", batch.decoding),
            "waiting": ("Calls that wait for a slot", batch.waiting),
            "active_requests": ("Requests that are answered", self._studio.active),
            "ready": ("Whether the server has spoken", int(self._studio.ready)),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(f"neuron_xtts_{name}", what, value)
        counters = {
            "calls": ("Calls that got a slot", batch.calls),
            "calls_refused": ("Calls that met a full queue", batch.refused),
            "calls_cancelled": ("Calls that were given up", batch.cancelled),
        }
        for name, (what, value) in counters.items():
            yield CounterMetricFamily(f"neuron_xtts_{name}", what, value)
        fallbacks = CounterMetricFamily(
            "neuron_xtts_fallbacks", "Calls that coqui-tts served in place of graphs", labels=["route", "reason"]
        )
        for route, counts in report.routes.items():
            for reason, calls in counts.fallbacks.items():
                fallbacks.add_metric([route, reason], calls)
        yield fallbacks
        runs = CounterMetricFamily("neuron_xtts_graph_runs", "Runs of graphs", labels=["graph", "bucket"])
        seconds = CounterMetricFamily("neuron_xtts_graph_seconds", "Time in graphs", labels=["graph", "bucket"])
        for graph, buckets in report.graphs.items():
            for bucket, counted in buckets.items():
                runs.add_metric([graph, bucket], counted.runs)
                seconds.add_metric([graph, bucket], counted.seconds)
        yield runs
        yield seconds
