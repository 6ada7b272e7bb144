"""Listening: how soon a stream runs dry, by what it was sent, and so how pressing its next piece is.

A thread that pulls codes of a stream has the vocoder make audio of them next. So that this is as urgent as the stream,
each thread remembers which it pulled from last.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import Tensor

from neuron_xtts.decoding.caller import Caller
from neuron_xtts.turns import Turns, later

Step = TypeVar("Step")

# A stream is pressing if its audio runs out within so many seconds: the policy of vox-serve, arXiv 2602.00269.
_SOON = 1.0


class Listener:
    """Whoever hears a stream, from the moment on at which it was asked for.

    Args:
        turns: of the engine that decodes it.
        caller: that may have something else to play first.
    """

    def __init__(self, turns: Turns, caller: Caller) -> None:
        self.turns = turns
        self._caller = caller
        self._began: float | None = None  # to play
        self._seconds = 0.0  # of audio that it was sent

    def urgency(self) -> float:
        """0 where there is nothing to play yet, else how many seconds are left, if those are few."""
        runs_out = self._caller.due if self._began is None else self._began + self._seconds
        if runs_out is None:
            return 0.0
        left = runs_out - time.monotonic()
        return left if left < _SOON else later()

    def sent(self, seconds: float) -> None:
        """Audio of so many seconds, from the first code on, was made for it."""
        if self._began is None:
            self._began = max(time.monotonic(), self._caller.due or 0.0)
        self._seconds = max(self._seconds, seconds)


class Listening:
    """Which stream each thread is at, so that the audio of a stream is as pressing as the stream."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._open: set[Listener] = set()  # whose streams have begun, and not ended

    def to(self, listener: Listener, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps of a stream, at which is whoever pulls them."""
        self._open.add(listener)
        try:
            for step in steps:
                self._here.listener = listener
                yield step
            self._here.listener = listener  # of the rest of its audio
        except GeneratorExit:
            if getattr(self._here, "listener", None) is listener:
                self._here.listener = None
            raise
        finally:
            self._open.discard(listener)

    def vocode(self, make: Callable[[bool], Tensor], rate: int, turns: Turns) -> Tensor:
        """Audio (B, 1, samples) of what this thread is at, from its first code on, made as soon as it is pressing.

        Args:
            make: makes it; in short pieces if it is told that other streams are open, which may be pressing before a
                long one is done.
            rate: of its samples.
            turns: that it takes.
        """
        listener: Listener | None = getattr(self._here, "listener", None)
        others = any(other is not listener and other.turns is turns for other in list(self._open))
        if listener is None:
            return make(others)
        self._here.listener = None  # until it is pulled from again
        with turns.pressing(listener.urgency):
            audio = make(others)
        listener.sent(audio.shape[2] / rate)
        return audio
