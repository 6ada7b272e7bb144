"""The dispatcher: decides whether graphs serve a call or coqui-tts does, and counts what became of it.

Locks, in the order in which one thread may take them:

1. the lock of a `VoiceMemo`, while a voice is looked for and, through other routes, made: first that of conditioning
   latents, then that of speaker embeddings, which coqui-tts asks for inside;
2. the dispatcher's, while a call is served, or one step of a stream: coqui-tts keeps the prefix of a generation on the
   model, and torch's random generator is global;
3. a loaded graph's, in the Neuron backend, while it runs or its state is moved;
4. those of counters, which take no other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from neuron_xtts.backends.host.threads import at_most, usable_cpus
from neuron_xtts.errors import Fallback, FallbackError, describe
from neuron_xtts.report import CallCounters
from neuron_xtts.routes.base import Context, HandedOver, Kind, Method, Route

logger = logging.getLogger(__name__)

DISABLE_VARIABLE = "NEURON_XTTS_DISABLE"
_DISABLED = f"{DISABLE_VARIABLE} is set"

Call = Callable[[], Any]


class Dispatcher:
    """Serves the calls of one patched model.

    Args:
        context: what its routes share.
        strict: raise instead of falling back.

    Attributes:
        counters: of calls.
    """

    def __init__(self, context: Context, *, strict: bool) -> None:
        self.context = context
        self.strict = strict
        self.counters = CallCounters()
        self._cpus = usable_cpus()
        self._lock = threading.RLock()
        self._serving = False
        self._by_kind = {
            Kind.WHOLE: self._whole,
            Kind.STEPS: self._steps,
            Kind.REMEMBERED: self._remembered,
            Kind.NOTED: self._noted,
        }

    def answer(self, route: Route, method: Method, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Answer a call of a routed method: with graphs, or, for a recorded reason, with the method itself.

        Args:
            route: of the method.
            method: coqui-tts's own.
            args: of the call.
            kwargs: of the call.
        """
        route.check(kwargs)
        first = (self.context, method) if route.kind in (Kind.REMEMBERED, Kind.NOTED) else (self.context,)
        graphs = partial(route.call, *first, *args, **kwargs)
        own = partial(route.own(self.context, method), *args, **kwargs)
        return self._by_kind[route.kind](route.name, graphs, own)

    def _whole(self, name: str, graphs: Call, own: Call) -> object:
        """A result at once."""
        if self._disabled(name):
            return own()
        with self._lock:
            if self._serving:  # a method of coqui-tts that calls another routed one, inside a fallback
                return own()
            self._serving = True
            try:
                with self._timed(name):
                    with contextlib.suppress(_FellBack), self._attempt(name):
                        return self._served(name, graphs())
                    return own()
            finally:
                self._serving = False

    def _steps(self, name: str, graphs: Call, own: Call) -> Iterator[object]:
        """An iterator. The lock is not held while the caller has a step."""
        theirs: Iterator[object] = own()
        if self._disabled(name):
            return theirs
        with self._lock, contextlib.suppress(_FellBack), self._attempt(name):
            return self._stream(name, graphs(), theirs)
        return theirs

    def _stream(self, name: str, ours: Iterator[object], theirs: Iterator[object]) -> Iterator[object]:
        """The steps of graphs; after one that fails, coqui-tts's own, as if they had been asked from the start."""
        first = torch.get_rng_state()
        given = 0
        try:
            for step in self._guarded(name, ours):
                given += 1
                yield step
            self.counters.served(name)
            return
        except GeneratorExit:  # the caller has heard enough
            self.counters.served(name)
            raise
        except _FellBack:
            pass
        now = torch.get_rng_state()
        torch.set_rng_state(first)
        with self._lock:
            for _ in range(given):
                next(theirs)
        if given:  # as many codes have been drawn again as the caller has
            torch.set_rng_state(now)
        yield from self._locked(theirs)

    def _guarded(self, name: str, steps: Iterator[object]) -> Iterator[object]:
        """Steps of graphs, each timed; raises `_FellBack` where one fails."""
        end = object()
        while True:
            with self._lock, self._timed(name), self._attempt(name):
                step = next(steps, end)
            if step is end:
                return
            yield step

    def _locked(self, steps: Iterator[object]) -> Iterator[object]:
        """Steps of coqui-tts."""
        end = object()
        while True:
            with self._lock:
                step = next(steps, end)
            if step is end:
                return
            yield step

    def _remembered(self, name: str, key: Call, own: Call) -> object:
        """What coqui-tts made of the same before, or makes now; no error with ``strict``: no graph was passed over."""
        memo = self.context.voices[name]
        if not memo.size:
            return own()
        with memo.lock, self._timed(name):
            found, reason = self._identify(key)
            if reason is not None:
                if self.counters.fell_back(name, reason):
                    logger.warning("%s: a voice is not remembered: %s", name, reason)
                return own()
            known = memo.find(found)
            if known is not None:
                return self._served(name, HandedOver(known))
            voice = own()
            if self._identify(key) == (found, None):  # or was the file written to meanwhile?
                memo.store(found, voice)
            return self._served(name, voice)

    def _noted(self, name: str, method: Call, own: Call) -> object:
        """What the method itself gives; nothing is counted. Not while a call is served that relies on its effects."""
        with self._lock:
            return method()

    @staticmethod
    def _identify(key: Call) -> tuple[Hashable, str | None]:
        """What identifies a voice; or nothing, and why it cannot be said."""
        try:
            return (None, _DISABLED) if disabled() else (key(), None)
        except Fallback as fallback:
            return None, str(fallback)

    def _served(self, name: str, result: object) -> object:
        """Count a call as served; returns the result itself."""
        self.counters.served(name, handed_over=isinstance(result, HandedOver))
        return result.result if isinstance(result, HandedOver) else result

    def _disabled(self, name: str) -> bool:
        if not disabled():
            return False
        self.counters.fell_back(name, _DISABLED)
        return True

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.counters.took(name, time.perf_counter() - start)

    @contextlib.contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Try what graphs serve. If it fails, the random state is what it was, and `_FellBack` is raised."""
        random_state = torch.get_rng_state()
        try:
            with at_most(self._cpus):
                yield
        except Exception as error:
            torch.set_rng_state(random_state)
            expected = isinstance(error, Fallback)
            reason = str(error) if expected else describe(error)[:200]
            if self.counters.fell_back(name, reason):
                logger.warning("%s falls back to coqui-tts: %s", name, reason, exc_info=not expected)
            if self.strict:
                raise FallbackError(name, reason) from error
            raise _FellBack from error


class _FellBack(Exception):  # noqa: N818 - a signal inside the dispatcher
    """An attempt failed, was counted, and coqui-tts must serve the call."""


def disabled() -> bool:
    """Whether the user turned every route off."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")
