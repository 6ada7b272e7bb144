"""The recorder: what every utterance is at, noted as it happens, as a bounded number of events.

An event costs a microsecond. There is one for a call, a run of a graph, or a wait; decode steps of the same rows that
follow each other are one together, and so is what a stream is asked for in one go.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator

from neuron_xtts.timeline import SHORT, Event, Phase, Timeline

#: Events that are remembered; they take 3 MB, with 16 callers at once 8. A whole sentence has about ten.
KEPT = 8192

# Seconds within which steps, or what a stream is asked for, follow each other in one event.
_TOGETHER = 0.005
# Seconds after which a voice belongs to no sentence that is spoken next.
_APART = 1.0


# Runs of graphs; one of another, such as that of a voice, is part of its call.
_RUNS = {"prefill": Phase.PREFILL, "latents": Phase.LATENTS, "vocoder": Phase.VOCODER}


class Growing:
    """An event that goes on."""

    __slots__ = ("decoding", "end", "phase", "reason", "route", "rows", "sampling", "start", "steps", "utterances")

    def __init__(self, phase: Phase, start: float, utterances: tuple[int, ...], route: str = "", rows: int = 0) -> None:
        self.phase = phase
        self.start = self.end = start
        self.utterances = utterances
        self.route = route
        self.reason: str | None = None
        self.rows = rows
        self.steps = 0
        self.decoding = self.sampling = 0.0

    def event(self) -> Event:
        """What it is so far."""
        return Event(
            self.phase, self.start, self.end, self.utterances, self.route, self.reason,
            self.rows, self.steps, self.decoding, self.sampling,
        )  # fmt: skip


class _Here(threading.local):
    """What a thread is at."""

    number = 0  # of the utterance
    speaks = False  # it has codes, or is about to
    ended = 0.0  # its latest call
    open: weakref.ref[Asked] | None = None  # weak: one that an interrupt left open is open no more


class Asked:
    """A call of a route, or whatever a stream is asked for: a context manager each time.

    What is called inside of it is part of it.

    Args:
        recorder: that records it.
        route: its name.
        phase: what it is if coqui-tts serves it, or if it is a voice.
        streamed: it is asked again and again, and is one event where that is in one go.
    """

    def __init__(self, recorder: Recorder, route: str, phase: Phase, *, streamed: bool = False) -> None:
        self._recorder = recorder
        self._route = route
        self._phase = phase
        self._streamed = streamed
        self._number = 0
        self._reason: str | None = None
        self._start = 0.0
        self._growing: Growing | None = None
        self._inside = False

    def __enter__(self) -> None:
        here = self._recorder.here
        outer = here.open and here.open()
        self._inside = outer is not None
        if self._inside:
            return
        self._start = time.perf_counter()
        here.open = weakref.ref(self)
        if self._number:  # a stream, which is pulled from any thread
            here.number, here.speaks = self._number, True
        else:
            self._number = self._recorder.begin(self._phase, self._start)

    def __exit__(self, *error: object) -> None:
        if self._inside:
            return
        here = self._recorder.here
        here.open, here.ended = None, time.perf_counter()
        served = self._reason is None
        phase = self._phase if not served or self._phase is Phase.VOICE else Phase.AROUND
        if not self._streamed:
            event = Event(phase, self._start, here.ended, (self._number,), self._route, self._reason)
            self._recorder.events.append(event)
            return
        growing = self._growing = self._recorder.grow(self._growing, phase, self._start, (self._number,), self._route)
        growing.end, growing.reason = here.ended, self._reason

    def fell_back(self, route: str, reason: str) -> None:
        """Coqui-tts serves it, or something inside of it."""
        self._reason = reason if route == self._route else f"{route}: {reason}"


class Recorder:
    """Records what the utterances of one patched model are at. Threads may record and read at the same time.

    Attributes:
        events: the latest, `KEPT` at most.
        here: what each thread is at.
    """

    def __init__(self) -> None:
        self.events: deque[Event | Growing] = deque(maxlen=KEPT)  # whose methods are atomic
        self.here = _Here()
        self._numbers = itertools.count(1)

    def call(self, route: str, phase: Phase) -> Asked:
        """A call of a route, from here to the end of a ``with`` block."""
        return Asked(self, route, phase)

    def stream(self, route: str, phase: Phase) -> Asked:
        """A stream; a ``with`` block for every time that it is asked for something."""
        return Asked(self, route, phase, streamed=True)

    def fell_back(self, route: str, reason: str) -> None:
        """Coqui-tts serves what this thread calls."""
        opened = self.here.open and self.here.open()
        if opened:
            opened.fell_back(route, reason)

    def begin(self, phase: Phase, now: float) -> int:
        """The utterance that a call is part of: another one with every generation, and with a voice after one."""
        here = self.here
        begins = phase in (Phase.VOICE, Phase.DECODE)
        if not here.number or (begins and (here.speaks or now - here.ended > _APART)):
            here.number, here.speaks = next(self._numbers), False
        here.speaks = here.speaks or phase is not Phase.VOICE
        return here.number

    @contextlib.contextmanager
    def on_behalf(self, number: int) -> Iterator[None]:
        """What this thread runs in a ``with`` block is another utterance's."""
        before, self.here.number = self.here.number, number
        try:
            yield
        finally:
            self.here.number = before

    def ran(self, graph: str, asked: float, start: float) -> None:
        """A graph has run that was ``asked`` for, and began at ``start``."""
        if graph in _RUNS and self.here.number:
            self.waited(asked, start)
            self.was_at(_RUNS[graph], start, self.here.number)

    def was_at(self, phase: Phase, start: float, number: int) -> None:
        """An utterance was at something until now."""
        self.events.append(Event(phase, start, time.perf_counter(), (number,)))

    def waited(self, start: float, end: float | None = None) -> None:
        """This thread has waited, until now or ``end``."""
        end = end or time.perf_counter()
        if end - start >= SHORT and self.here.number:
            self.events.append(Event(Phase.WAITING, start, end, (self.here.number,)))

    def grow(
        self,
        last: Growing | None,
        phase: Phase,
        start: float,
        utterances: tuple[int, ...],
        route: str = "",
        rows: int = 0,
    ) -> Growing:
        """The ``last`` event, if what begins now goes on with it; else another."""
        same = last is not None and (last.phase, last.utterances, last.rows) == (phase, utterances, rows)
        if last is None or not same or start - last.end > _TOGETHER:
            last = Growing(phase, start, utterances, route, rows)
            self.events.append(last)
        return last

    def timeline(self) -> Timeline:
        """What is remembered now."""
        while True:
            try:
                events = list(self.events)
            except RuntimeError:  # something was appended meanwhile, by what Python collected
                continue
            return Timeline(
                tuple(event if isinstance(event, Event) else event.event() for event in events), len(events) == KEPT
            )
