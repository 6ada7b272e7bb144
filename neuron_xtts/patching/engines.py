"""Engines: every NeuronCore that a model is given has graphs, rows and turns of its own; the host is one engine."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Sequence

from neuron_xtts.locks import Lock, forgets
from neuron_xtts.report import BatchCounts
from neuron_xtts.routes.base import Context
from neuron_xtts.turns import AllTurns

# An engine on which so many calls in a row failed by no fault of theirs gets none for so many seconds, while another
# can serve them. Choices of ours.
_FAILURES = 3
_REST = 60.0


class Place:
    """That an engine serves a call: until a ``with`` block ends, or nobody holds it any more.

    Args:
        context: of the engine.
        calls: that the engine serves.
    """

    def __init__(self, context: Context, calls: weakref.WeakSet[Place]) -> None:
        self.context = context
        self._calls = calls
        calls.add(self)

    def __enter__(self) -> Context:
        return self.context

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """The engine serves the call no longer."""
        self._calls.discard(self)


class Engines:
    """The engines of one patched model. A call goes to the one that has least to do, and stays there.

    Args:
        contexts: one for each engine; they share what is remembered.
        turns: of all of them.
    """

    def __init__(self, contexts: Sequence[Context], turns: AllTurns) -> None:
        self.contexts = contexts
        self.turns = turns
        self._lock = Lock()
        self.forget()
        forgets(self)

    def forget(self) -> None:
        """Nobody calls: in a forked child."""
        # Of each engine, the calls that generate codes, and the others.
        self._calls = [(weakref.WeakSet[Place](), weakref.WeakSet[Place]()) for _ in self.contexts]
        self._failures = [0] * len(self.contexts)  # in a row
        self._rests = [-math.inf] * len(self.contexts)  # until when

    @property
    def first(self) -> Context:
        """The first, for what is the same on all."""
        return self.contexts[0]

    def place(self, *, generates: bool) -> Place:
        """A place for a call: where fewest graphs are missing, fewest calls of its kind are served, and of the other.

        Args:
            generates: whether it waits for slots.
        """

        def load(number: int) -> tuple[int, ...]:
            generating, others = map(len, self._calls[number])
            calls = (generating, others) if generates else (others, generating)
            # Else a core on which everything fails at once, and so never has much to do, would be given every call.
            rests = self._rests[number] > time.monotonic()
            return rests, len(self.contexts[number].runner.backend.unavailable), *calls

        with self._lock:
            # What has the first turn already, such as the making of a voice, keeps no other engine waiting.
            number = 0 if self.turns.first.mine else min(range(len(self.contexts)), key=load)
            return Place(self.contexts[number], self._calls[number][not generates])

    def failed(self, context: Context) -> None:
        """A call failed on an engine, by no fault that is known of the call's."""
        with self._lock:
            number = self.contexts.index(context)
            self._failures[number] += 1
            if self._failures[number] >= _FAILURES:
                self._rests[number] = time.monotonic() + _REST

    def worked(self, context: Context) -> None:
        """An engine computed what was wanted."""
        number = self.contexts.index(context)
        if self._failures[number]:
            self._failures[number], self._rests[number] = 0, -math.inf

    def counts(self) -> BatchCounts:
        """What became of rows so far, on all engines together."""
        return sum((context.scheduler.counts() for context in self.contexts), BatchCounts())

    def missing(self) -> dict[str, str]:
        """Graphs and buckets that are not to be had, with the reason; where engines differ, with theirs."""
        found: dict[str, dict[int, str]] = {}
        for number, context in enumerate(self.contexts):
            for graph, reason in context.runner.missing().items():
                found.setdefault(graph, {})[number] = reason
        return {graph: self._said(reasons) for graph, reasons in found.items()}

    def over_host(self) -> str | None:
        """Why caches go by way of the host; where engines differ, with which; None if they do on none."""
        reasons = {number: context.runner.backend.over_host for number, context in enumerate(self.contexts)}
        return self._said({number: reason for number, reason in reasons.items() if reason}) or None

    def _said(self, reasons: dict[int, str]) -> str:
        if len(reasons) == len(self.contexts) and len(set(reasons.values())) == 1:
            return reasons[0]
        return "; ".join(
            f"{self.contexts[number].runner.backend.where}: {reason}" for number, reason in reasons.items()
        )
