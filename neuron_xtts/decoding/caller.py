"""On whose behalf a thread calls: of somebody that may go away meanwhile, or that waits however many do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Cancel = Callable[[], None]


class CallerGone(BaseException):
    """Ends a call whose caller has gone. No error: nobody sees it, and nothing that handles errors does."""


class Caller:
    """Somebody on whose behalf threads call.

    Args:
        patient: waits, however many others do.
        thread: that wants what is called; with it goes its caller. None: it is the one that calls.

    Attributes:
        patient: likewise.
        thread: likewise.
        due: when, by `time.monotonic`, what it has to play already runs out; None: it has nothing.
        codes: that its streams have given.
    """

    def __init__(self, *, patient: bool = False, thread: threading.Thread | None = None) -> None:
        self.patient = patient
        self.thread = thread
        self.due: float | None = None
        self.codes = 0
        self._gone = False
        self._cancels: set[Cancel] = set()

    @contextlib.contextmanager
    def calls(self) -> Iterator[None]:
        """Have what this thread calls be on its behalf, for the length of a ``with`` block."""
        token = _caller.set(self)
        try:
            yield
        finally:
            _caller.reset(token)

    @contextlib.contextmanager
    def may_go(self, cancel: Cancel) -> Iterator[None]:
        """What ``cancel`` ends is of no use to anybody if it goes during the ``with`` block."""
        self._cancels.add(cancel)
        try:
            self.check()
            yield
        finally:
            self._cancels.discard(cancel)

    def go(self) -> None:
        """End whatever runs on its behalf, from any thread; nothing more will begin."""
        self._gone = True  # first: whoever adds something meanwhile looks at it afterwards
        for cancel in list(self._cancels):
            cancel()

    def check(self) -> None:
        """Raise `CallerGone` if it has gone."""
        if self._gone or (self.thread is not None and not self.thread.is_alive()):
            raise CallerGone


_caller: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039


def caller() -> Caller:
    """On whose behalf this thread calls."""
    return _caller.get()
