"""The timeline: what every utterance was at, from its voice to its audio."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

#: Seconds of a wait that are not worth an event: nobody waited, a lock was taken.
SHORT = 0.001


class Phase(Enum):
    """What an utterance is at."""

    VOICE = "voice"
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    SAMPLING = "sampling"
    LATENTS = "latents"
    VOCODER = "vocoder"
    AROUND = "around graphs"


class Event(NamedTuple):
    """Something that took time.

    Attributes:
        phase: what it was; `Phase.AROUND` of a call that graphs served, and of whatever is for one utterance alone.
        start: seconds of ``time.perf_counter``.
        end: likewise.
        utterances: whose it was, several of steps.
        route: of a call.
        reason: why coqui-tts served a call.
        rows: that decoded together.
        steps: how many there were.
        decoding: seconds in them.
        sampling: seconds in which their codes were drawn.
    """

    phase: Phase
    start: float
    end: float
    utterances: tuple[int, ...]
    route: str = ""
    reason: str | None = None
    rows: int = 0
    steps: int = 0
    decoding: float = 0.0
    sampling: float = 0.0

    @property
    def rank(self) -> int:
        """Of events at the same moment that of the highest rank says what an utterance was at."""
        if self.route:
            return 0
        return {Phase.WAITING: 1, Phase.AROUND: 2, Phase.DECODE: 2}.get(self.phase, 3)


class Span(NamedTuple):
    """A part of an utterance, in which it was at one thing.

    Attributes:
        phase: what it was at; of steps, `Phase.DECODE`.
        start: seconds of ``time.perf_counter``.
        end: likewise.
        reason: why coqui-tts did it; None if graphs did.
        decoding: the share of a span of steps in which the graph ran.
        sampling: that in which codes were drawn; what is left was between steps.
    """

    phase: Phase
    start: float
    end: float
    reason: str | None = None
    decoding: float = 1.0
    sampling: float = 0.0

    @property
    def seconds(self) -> float:
        """From start to end."""
        return self.end - self.start


class Utterance(NamedTuple):
    """A sentence that was spoken, or a voice that was made by itself.

    Attributes:
        number: counted from 1.
        spans: in order; none overlaps another.
        streamed: whether its codes were pulled one by one.
    """

    number: int
    spans: tuple[Span, ...]
    streamed: bool

    @property
    def start(self) -> float:
        """Of its first span."""
        return self.spans[0].start

    @property
    def end(self) -> float:
        """Of its last span."""
        return self.spans[-1].end

    def seconds(self) -> dict[Phase, float]:
        """In each phase; those of steps are told apart into decode, sampling and what is around them."""
        found = dict.fromkeys(Phase, 0.0)
        for span in self.spans:
            found[span.phase] += span.seconds * span.decoding
            found[Phase.SAMPLING] += span.seconds * span.sampling
            found[Phase.AROUND] += span.seconds * (1 - span.decoding - span.sampling)
        return found


class Timeline(NamedTuple):
    """What was recorded.

    Attributes:
        events: the latest; those that go on, as they are so far.
        full: there were more.
    """

    events: tuple[Event, ...] = ()
    full: bool = False

    @property
    def number(self) -> int:
        """How many utterances there were, those that are forgotten, too."""
        return max((number for event in self.events for number in event.utterances), default=0)

    @property
    def seconds(self) -> float:
        """From the start of what is remembered to its end."""
        if not self.events:
            return 0.0
        return max(event.end for event in self.events) - min(event.start for event in self.events)

    def steps(self) -> list[Event]:
        """Those of decode steps, in their order."""
        return sorted((event for event in self.events if event.steps), key=lambda event: event.start)

    def utterances(self) -> list[Utterance]:
        """Those of which everything is remembered, in their order."""
        found: dict[int, list[Event]] = {}
        for event in self.events:
            for number in event.utterances:
                found.setdefault(number, []).append(event)
        found.pop(0, None)
        if self.full:  # what ended before the first that is kept may be missing
            first = self.events[0].end
            found = {number: events for number, events in found.items() if min(e.start for e in events) > first}
        return [
            Utterance(number, spans, any(event.route == "GPT.get_generator" for event in found[number]))
            for number in sorted(found)
            if (spans := _spans(found[number]))
        ]

    def reasons(self) -> dict[str, int]:
        """How many events of coqui-tts's there are, by route and reason."""
        found: dict[str, int] = {}
        for event in self.events:
            if event.reason is not None:
                name = f"{event.route}: {event.reason}"
                found[name] = found.get(name, 0) + 1
        return found

    def to_dict(self) -> dict[str, object]:
        """How many utterances there were, how many are remembered, and the seconds that those spent in each phase."""
        known = self.utterances()
        seconds = [utterance.seconds() for utterance in known]
        return {
            "utterances": self.number,
            "remembered": len(known),
            "seconds": {phase.value: sum(each[phase] for each in seconds) for phase in Phase},
        }


def _spans(events: Sequence[Event]) -> tuple[Span, ...]:
    """What an utterance was at: at each moment the event of the highest rank, the latest of those alike."""
    events = sorted(events, key=lambda event: event.start)
    spans: list[tuple[Event, float, float]] = []
    here: list[Event] = []
    coming = deque(events)
    moments = sorted({moment for event in events for moment in (event.start, event.end)})
    for start, end in itertools.pairwise(moments):
        while coming and coming[0].start <= start:
            here.append(coming.popleft())
        here = [event for event in here if event.end > start]
        if not here:
            continue
        event = max(here, key=lambda event: (event.rank, event.start))
        if spans and spans[-1][0] is event and spans[-1][2] == start:
            spans[-1] = (event, spans[-1][1], end)
        else:
            spans.append((event, start, end))
    return tuple(_span(event, start, end) for event, start, end in spans)


def _span(event: Event, start: float, end: float) -> Span:
    if event.phase is Phase.WAITING and end - start < SHORT:
        return Span(Phase.AROUND, start, end)
    if not event.steps:
        return Span(event.phase, start, end, event.reason and f"{event.route}: {event.reason}")
    seconds = event.end - event.start
    return Span(event.phase, start, end, None, event.decoding / seconds, event.sampling / seconds)
