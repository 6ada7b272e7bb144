"""The dispatcher: decides whether graphs serve a call or coqui-tts does, and counts what became of it.

Threads call at the same time. What computes takes turns (`turns.py`): on each engine a graph's run or a decode step of
everybody's rows; or, since coqui-tts keeps the prefix of a generation on the model and knows torch's global generator
alone, a whole call of its own, for which it takes the turns of all engines. Locks are taken inside of a turn, never the
other way round: a loaded graph's, in the Neuron backend; those of memos, counters and the scheduler's lists, under
which nothing is waited for.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from functools import partial
from typing import Any

from neuron_xtts.backends.host.threads import at_most, usable_cpus
from neuron_xtts.decoding.caller import caller
from neuron_xtts.decoding.draws import DRAWS, Claim, any_seed
from neuron_xtts.errors import Fallback, FallbackError, NotFinite, QueueFullError, describe
from neuron_xtts.patching.engines import Engines, Place
from neuron_xtts.recorder import Asked
from neuron_xtts.report import CallCounters
from neuron_xtts.routes.base import DISABLE_VARIABLE, Context, HandedOver, Kind, Method, Route, disabled
from neuron_xtts.turns import AllTurns, Turns, now

logger = logging.getLogger(__name__)

_DISABLED = f"{DISABLE_VARIABLE} is set"

Call = Callable[[], Any]
Graphs = Callable[[Context], Any]


class Dispatcher:
    """Serves the calls of one patched model.

    Args:
        engines: that serve them.
        strict: raise instead of falling back.

    Attributes:
        engines: likewise.
        counters: of calls.
    """

    def __init__(self, engines: Engines, *, strict: bool) -> None:
        self.engines = engines
        self.strict = strict
        self.counters = CallCounters()
        self._turns = engines.turns
        self._recorder = engines.first.runner.recorder
        self._cpus = usable_cpus()
        self._here = threading.local()
        self._gives_way = False
        self._gave_way = threading.Event()
        self._by_kind: dict[Kind, Callable[..., Any]] = {
            Kind.WHOLE: self._whole,
            Kind.STEPS: self._steps,
            Kind.REMEMBERED: self._remembered,
            Kind.NOTED: self._noted,
            Kind.FINISHED: self._finished,
        }

    def answer(self, route: Route, method: Method, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Answer a call of a routed method: with graphs, or, for a recorded reason, with the method itself.

        Args:
            route: of the method.
            method: coqui-tts's own.
            args: of the call.
            kwargs: of the call.
        """
        if self._gives_way and not self._inside:
            self._gave_way.wait()
            return self._again(route, method)(*args, **kwargs)
        route.check(kwargs)
        caller().check()
        claim = None
        if route.draws and kwargs.get("seed") is None and not disabled():
            claim = DRAWS.claim()
            if claim is None:
                kwargs = {**kwargs, "seed": any_seed()}
        own = partial(route.own(self.engines.first, method), *args, **kwargs)
        if route.kind in (Kind.REMEMBERED, Kind.NOTED, Kind.FINISHED):
            ours = partial(route.call, self.engines.first, method, *args, **kwargs)
        else:
            ours = partial(_call, route, args, kwargs)
        return self._by_kind[route.kind](route, ours, own, claim)

    @contextlib.contextmanager
    def giving_way(self) -> Iterator[None]:
        """Have calls of other threads that begin from now on wait for the end of a ``with`` block, and call again then.

        What runs goes on. So does what is called inside of a turn, for whose end others may wait.
        """
        self._here.holds = self._gives_way = True
        try:
            yield
        finally:
            self._here.holds = False
            self._gave_way.set()

    @property
    def _inside(self) -> bool:
        """Whether this thread has others wait, or a turn."""
        return getattr(self._here, "holds", False) or any(turns.mine for turns in self._turns.each)

    def _again(self, route: Route, method: Method) -> Method:
        """What is in the place of a method now."""
        xtts = self.engines.first.xtts()
        found: Method = method if xtts is None else getattr(route.module(xtts), route.method)
        return found

    def _whole(self, route: Route, graphs: Graphs, own: Call, claim: Claim | None) -> object:
        """A result at once."""
        name = route.name
        if getattr(self._here, "falls_back", False):  # inside a method of coqui-tts's own
            return own()
        with self._recorder.call(name, route.phase):
            if self._disabled(name):
                with self._falling_back():
                    return own()
            return self._attempted(route, graphs, own, claim)

    def _attempted(self, route: Route, graphs: Graphs, own: Call, claim: Claim | None) -> object:
        """What graphs give; if they fail, what coqui-tts does."""
        name = route.name
        with claim or contextlib.nullcontext(), self._timed(name):
            with (
                contextlib.suppress(_FellBack),
                self.engines.place(generates=route.draws) as context,
                self._attempt(name, claim, context),
            ):
                result = graphs(context)
                if not isinstance(result, HandedOver):
                    self.engines.worked(context)
                return self._served(name, result)
            with self._falling_back():
                return own()

    def _steps(self, route: Route, graphs: Graphs, own: Call, claim: Claim | None) -> Iterator[object]:
        """An iterator. Nothing is held while the caller has a step, but for its place and its claim."""
        name, asked = route.name, self._recorder.stream(route.name, route.phase)
        try:
            theirs: Iterator[object] = own()
            with asked:
                if self._disabled(name):
                    return self._theirs(theirs, claim, asked)
                place = self.engines.place(generates=route.draws)
                with contextlib.suppress(_FellBack), self._attempt(name, claim, place.context):
                    try:
                        return self._stream(name, place, graphs(place.context), theirs, claim, asked)
                    except BaseException:  # a traceback would keep it
                        place.end()
                        raise
                return self._theirs(theirs, claim, asked)
        except BaseException:
            if claim is not None:  # a traceback would keep it
                claim.end()
            raise

    def _stream(
        self,
        name: str,
        place: Place,
        ours: Generator[object, None, None],
        theirs: Iterator[object],
        claim: Claim | None,
        asked: Asked,
    ) -> Iterator[object]:
        """The steps of graphs; after one that fails, coqui-tts's own, as if they had been asked from the start."""
        given = 0
        with claim or contextlib.nullcontext():
            try:
                with place as context:
                    for step in self._guarded(name, ours, claim, context, asked):
                        given += 1
                        yield step
                self.counters.served(name)
                return
            except GeneratorExit:  # the caller has heard enough
                self.counters.served(name)
                raise
            except _FellBack:
                pass
            finally:
                ours.close()  # before the claim ends
            for _ in range(given):
                with asked, self._falling_back():
                    if next(theirs, None) is None:  # in fp32 it may be over sooner than in reduced precision
                        return
            yield from self._theirs(theirs, claim, asked)

    def _guarded(
        self, name: str, steps: Iterator[object], claim: Claim | None, context: Context, asked: Asked
    ) -> Iterator[object]:
        """Steps of graphs, each timed; raises `_FellBack` where one fails."""
        end = object()
        while True:
            with asked, self._timed(name), self._attempt(name, claim, context, brief=True):
                step = next(steps, end)
            if step is end:
                return
            self.engines.worked(context)
            caller().codes += 1
            yield step

    def _theirs(self, steps: Iterator[object], claim: Claim | None, asked: Asked) -> Iterator[object]:
        """Steps of coqui-tts."""
        end = object()
        with claim or contextlib.nullcontext():
            while True:
                with asked, self._falling_back():
                    step = next(steps, end)
                if step is end:
                    return
                caller().codes += 1
                yield step

    @contextlib.contextmanager
    def _falling_back(self) -> Iterator[None]:
        """The turn of a method of coqui-tts's own, in which other routed methods are coqui-tts's, too."""
        with self._turn(self._turns):
            before = getattr(self._here, "falls_back", False)
            self._here.falls_back = True
            try:
                yield
            finally:
                self._here.falls_back = before

    def _remembered(self, route: Route, key: Call, own: Call, claim: None) -> object:
        """What coqui-tts made of the same before, or makes now; no error with ``strict``: no graph was passed over."""
        name = route.name
        memo = self.engines.first.voices[name]
        if not memo.size:
            with self._recorder.call(name, route.phase), self._turn(self._turns.first):
                return own()
        with self._recorder.call(name, route.phase), self._timed(name):
            found, reason = self._identify(key)
            if reason is not None:
                if self._fell_back(name, reason):
                    logger.warning("%s: a voice is not remembered: %s", name, reason)
                with self._turn(self._turns.first):
                    return own()
            known = memo.find(found)
            if known is not None:
                return self._served(name, HandedOver(known))
            with self._turn(self._turns.first):  # so that threads that ask for the same compute it once
                known = memo.find(found)
                if known is not None:
                    return self._served(name, HandedOver(known))
                voice = own()
                if self._identify(key) == (found, None):  # or was the file written to meanwhile?
                    memo.store(found, voice)
            return self._served(name, voice)

    def _noted(self, route: Route, method: Call, own: Call, claim: None) -> object:
        """What the method itself gives; nothing is counted. Not while a call is served that relies on its effects."""
        with self._turns.first.take(now):
            return method()

    def _finished(self, route: Route, method: Call, own: Call, claim: None) -> object:
        """What the method itself gives, finished; nothing is counted. What it calls takes turns of its own."""
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
        self._fell_back(name, _DISABLED)
        return True

    def _fell_back(self, name: str, reason: str) -> bool:
        """Count a call that coqui-tts serves; true for the first of its reason."""
        self._recorder.fell_back(name, reason)
        return self.counters.fell_back(name, reason)

    @contextlib.contextmanager
    def _turn(self, turns: Turns | AllTurns) -> Iterator[None]:
        """A turn, and the wait for it noted."""
        start = time.perf_counter()
        with turns.take():
            self._recorder.waited(start)
            yield

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.counters.took(name, time.perf_counter() - start)

    @contextlib.contextmanager
    def _attempt(self, name: str, claim: Claim | None, context: Context, *, brief: bool = False) -> Iterator[None]:
        """Try what graphs of an engine serve. If that fails, what its ``claim`` drew is undone, and `_FellBack` raised.

        With ``brief``, this thread will soon try more.
        """
        try:
            with at_most(self._cpus):
                yield
        except QueueFullError:
            raise
        except Exception as error:
            if claim is not None and claim.drew:
                with self._turn(self._turns):
                    claim.rewind()
            expected = isinstance(error, Fallback)
            if not expected or isinstance(error, NotFinite):
                self.engines.failed(context)
            reason = str(error) if expected else describe(error)[:200]
            if self._fell_back(name, reason):
                logger.warning("%s falls back to coqui-tts: %s", name, reason, exc_info=not expected)
            if self.strict:
                raise FallbackError(name, reason) from error
            raise _FellBack from error
        finally:
            context.runner.turns.rest(brief=brief)


def _call(route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any], context: Context) -> Any:
    return route.call(context, *args, **kwargs)


class _FellBack(Exception):  # noqa: N818 - a signal inside the dispatcher
    """An attempt failed, was counted, and coqui-tts must serve the call."""
