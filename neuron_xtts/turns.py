"""Turns: one thread computes at a time, and the most pressing of those that wait comes next.

Threads that each run torch bring a team of threads each, which fight for the processors; and coqui-tts keeps the prefix
of a generation on the model, and draws from torch's global generator. So whatever computes takes turns, in pieces as
short as a graph's run, or in a whole call of coqui-tts's own where that cannot be cut.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from neuron_xtts.backends.host.threads import end_team
from neuron_xtts.locks import forgets

Urgency = Callable[[], float]  # the smaller the more pressing; asked whenever a turn ends

# Seconds after which whoever waits looks by itself whether it is its turn: an interrupt may have come between a turn's
# being passed on and the word of it.
POLL = 0.5
# Seconds for which a thread that has its turn again and again, and no other has, keeps its team in between.
_ALONE = 10.0


def now() -> float:
    """The urgency of what nobody has heard anything of yet."""
    return 0.0


def at_once() -> float:
    """The urgency of what keeps others waiting while it waits."""
    return -math.inf


def later() -> float:
    """The urgency of what can wait."""
    return 2.0


@dataclass(eq=False)
class _Waiting:
    """A thread that waits for its turn."""

    urgency: Urgency
    thread: int = field(default_factory=threading.get_ident)
    go: threading.Event = field(default_factory=threading.Event)


class Turns:
    """Turns of the threads that compute with one model. A thread that has its turn may take it again inside."""

    def __init__(self) -> None:
        self.forget()
        forgets(self)

    def forget(self) -> None:
        """Nobody has a turn, and nobody waits: in a forked child, where the threads that did are not."""
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []  # in the order in which they came
        self._owner: int | None = None
        self._latest: int | None = None  # whose turn it was last
        self._changed = -_ALONE  # when another thread than before had a turn
        self._here = threading.local()

    @property
    def mine(self) -> bool:
        """Whether it is this thread's turn."""
        return self._owner == threading.get_ident()

    @property
    def wanted(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    @contextlib.contextmanager
    def take(self, urgency: Urgency | None = None, *, brief: bool = False) -> Iterator[None]:
        """Wait for a turn, and have it for the length of a ``with`` block.

        Args:
            urgency: of this turn; by default what `pressing` says of this thread.
            brief: this thread will soon have another one.
        """
        if self.mine:
            yield
            return
        interrupt: BaseException | None = None
        try:
            self._wait(urgency or self._urgency)
            yield
        finally:
            while True:  # though the user interrupts it: else nobody would ever have a turn again
                try:
                    self._end(brief)
                    break
                except KeyboardInterrupt as error:
                    interrupt = error
            if interrupt is not None:
                raise interrupt

    @contextlib.contextmanager
    def pressing(self, urgency: Urgency) -> Iterator[None]:
        """Have this thread's turns be so urgent for the length of a ``with`` block."""
        before = self._urgency
        self._here.urgency = urgency
        try:
            yield
        finally:
            self._here.urgency = before

    def offer(self, urgency: Urgency) -> None:
        """Inside of a turn: let somebody else have one first who is at least as pressing."""
        if min((waiting.urgency() for waiting in list(self._waiting)), default=math.inf) > urgency():
            return
        self._end(brief=False, again=urgency)

    def rest(self, *, brief: bool = False) -> None:
        """Outside of a turn: this thread has run operators, and others may compute now.

        Args:
            brief: it will soon run more.
        """
        if not self.mine and not (brief and self._alone):
            end_team()

    @property
    def _alone(self) -> bool:
        """Whether only one thread has computed lately, and none waits."""
        return not self._waiting and time.monotonic() - self._changed > _ALONE

    @property
    def _urgency(self) -> Urgency:
        urgency: Urgency = getattr(self._here, "urgency", later)
        return urgency

    def _wait(self, urgency: Urgency) -> None:
        waiting = _Waiting(urgency)
        with self._lock:
            self._waiting.append(waiting)
        try:
            while True:
                with self._lock:
                    if self._owner is None:
                        self._pass_on()
                if self.mine:
                    return
                end_team()  # of what it computed without a turn, such as embeddings
                waiting.go.wait(POLL)
        finally:  # after KeyboardInterrupt, too; a turn that has come meanwhile `take` ends
            with self._lock:
                if waiting in self._waiting:
                    self._waiting.remove(waiting)

    def _end(self, brief: bool, again: Urgency | None = None) -> None:
        """End this thread's turn; with ``again``, wait for another one of that urgency."""
        if not self.mine:  # it was interrupted while it waited for it
            return
        try:
            if not (brief and self._alone):
                end_team()
        finally:
            with self._lock:
                self._pass_on()
        if again:
            self._wait(again)

    def _pass_on(self) -> None:
        """Give the turn to the most pressing one that waits, the earliest of those alike."""
        if not self._waiting:
            self._owner = None
            return
        chosen = min(self._waiting, key=lambda waiting: waiting.urgency())
        if self._latest not in (chosen.thread, None):
            self._changed = time.monotonic()
        self._owner = self._latest = chosen.thread
        chosen.go.set()


class AllTurns:
    """The turns of all engines of one model.

    Whoever takes several, or one inside of another, takes them from the first on, so that nobody waits for whom it
    keeps waiting.

    Attributes:
        each: of every engine that the model ever had.
    """

    def __init__(self) -> None:
        self.each = [Turns()]

    @property
    def first(self) -> Turns:
        """Of the first engine: enough for what must run neither beside itself nor beside whoever has all turns."""
        return self.each[0]

    def of(self, engines: int) -> list[Turns]:
        """The turns of so many engines."""
        if engines > len(self.each):
            with self.take():  # whoever has them all does not have those that come now
                self.each += [Turns() for _ in range(engines - len(self.each))]
        return self.each[:engines]

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Have the turn of every engine at the same time, for the length of a ``with`` block."""
        with self._take(self.each, None):
            yield

    @contextlib.contextmanager
    def _take(self, turns: Sequence[Turns], urgency: Urgency | None) -> Iterator[None]:
        with turns[0].take(urgency):
            if len(turns) == 1:
                yield
            else:
                with self._take(turns[1:], at_once):  # the first engine does nothing meanwhile
                    yield
