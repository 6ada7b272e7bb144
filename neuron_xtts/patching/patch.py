"""The patch of one model: its engines, its dispatcher, and the proxies that lead to them."""

from __future__ import annotations

import contextlib
import weakref
from functools import partial
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

from neuron_xtts.backends.host.threads import end_team
from neuron_xtts.coqui.recognise import make_graphs
from neuron_xtts.coqui.surface import Networks, Xtts
from neuron_xtts.decoding.scheduler import Scheduler
from neuron_xtts.guard import Guard
from neuron_xtts.options import Options
from neuron_xtts.patching.dispatch import Dispatcher
from neuron_xtts.patching.engines import Engines
from neuron_xtts.patching.proxy import Installation
from neuron_xtts.recorder import Recorder
from neuron_xtts.report import Report, RunCounters
from neuron_xtts.routes import ROUTES
from neuron_xtts.routes.base import Context, Kind
from neuron_xtts.routes.listening import Listening
from neuron_xtts.routes.memo import AudioMemo, LatentsMemo, VoiceMemo
from neuron_xtts.routes.tails import Tails
from neuron_xtts.runner import Runner
from neuron_xtts.turns import AllTurns

# Kinds of routes whose calls are counted: others only look on.
_COUNTED = {Kind.WHOLE, Kind.STEPS, Kind.REMEMBERED}


class Patch:
    """What one patched model has.

    It holds no reference to the ``Xtts``, and nothing but its proxies holds it: model and patch are freed together.

    Args:
        xtts: the model.
        options: that were checked.
        strict: raise instead of falling back.
        voice_cache: how many voices to remember.
        queue: how many calls may wait for others.
        guard: against tails, if there is to be one.
        former: the patch that gives way.
    """

    dispatcher: Dispatcher

    def __init__(
        self,
        xtts: Xtts,
        options: Options,
        *,
        strict: bool,
        voice_cache: int,
        queue: int,
        guard: Guard | None,
        former: Patch | None = None,
    ) -> None:
        # Before anything is put in place, everything that may fail is done.
        routes = [route for route in ROUTES if guard is not None or route.kind is not Kind.FINISHED]
        self._installations = {route.name: Installation(route.module(xtts), route.method) for route in routes}
        self._networks = Networks.of(xtts)
        self._counters = RunCounters()
        self._recorder = Recorder()
        turns = _turns.setdefault(xtts, AllTurns())
        runners = self._make_runners(options, turns)
        prefixes: Any = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]
        if former is not None:  # of streams that are between their two calls
            prefixes = former.dispatcher.engines.first.prefixes
        shared: dict[str, Any] = {
            "xtts": weakref.ref(xtts),
            "latents": LatentsMemo(),
            "audio": AudioMemo(runners[0].halo),
            "voices": {route.name: VoiceMemo(voice_cache) for route in ROUTES if route.kind is Kind.REMEMBERED},
            "listening": Listening(),
            "prefixes": prefixes,
            "tails": Tails(guard) if guard else None,
        }
        schedulers: list[Scheduler] = []
        contexts = [Context(runner, Scheduler(runner, queue, schedulers), **shared) for runner in runners]
        self.dispatcher = Dispatcher(Engines(contexts, turns), strict=strict)
        replaced = dict(former._installations) if former else {}
        for route in routes:
            over = replaced.pop(route.name, None)
            self._installations[route.name].install(partial(self.dispatcher.answer, route), owner=self, over=over)
        for installation in replaced.values():  # of a guard that there is no more
            installation.remove()

    def _make_runners(self, options: Options, turns: AllTurns) -> list[Runner]:
        """One for each core."""
        graphs, unfit = make_graphs(self._networks)
        backends = options.make_backends(self._networks, graphs)
        try:
            each = zip(backends, turns.of(len(backends)), strict=True)
            shared = self._counters, self._recorder
            return [Runner(self._networks, graphs, unfit, backend, own, *shared) for backend, own in each]
        except BaseException:
            for backend in backends:
                backend.close()
            raise

    @property
    def runner(self) -> Runner:
        """That of the first engine."""
        return self.dispatcher.engines.first.runner

    @property
    def installed(self) -> int:
        """How many routes were installed."""
        return len(self._installations)

    def gone(self, xtts: Xtts) -> list[str]:
        """Routes that calls no longer reach, because ``load_checkpoint`` or the user replaced what they were on."""
        modules = {id(xtts.gpt), id(xtts.hifigan_decoder)}
        if Networks.of(xtts) == self._networks:
            modules.add(id(xtts))  # else its routes lead to the voices of other encoders
        return [name for name, installation in self._installations.items() if not installation.is_on(modules)]

    def report(self, xtts: Xtts) -> Report:
        """A snapshot of what became of the calls, and of the runs of graphs."""
        engines, backend = self.dispatcher.engines, self.runner.backend
        tails = engines.first.tails
        return Report(
            backend=backend.name,
            engines=[context.runner.backend.where for context in engines.contexts],
            precision=backend.precision,
            buckets=backend.plan.to_dict(),
            routes=self.dispatcher.counters.snapshot(route.name for route in ROUTES if route.kind in _COUNTED),
            graphs=self._counters.snapshot(),
            batch=engines.counts(),
            guard=tails.counters.snapshot() if tails else None,
            missing=engines.missing(),
            over_host=engines.over_host(),
            copied=backend.copied,
            gone=self.gone(xtts),
            timeline=self._recorder.timeline(),
        )

    def remove(self) -> None:
        """Take every proxy off again, and leave the weights as they were found."""
        for installation in reversed(self._installations.values()):
            installation.remove()
        self.close()

    def close(self) -> None:
        """Leave the weights as they were found."""
        for context in self.dispatcher.engines.contexts:
            context.runner.backend.close()

    def make_way(self) -> None:
        """The same for another patch, which needs what graphs take of a device, too."""
        self.close()
        for context in self.dispatcher.engines.contexts:
            context.runner.backend.unload()


# Of models that were ever patched: what runs on by an earlier patch takes turns with what a later one runs.
_turns: weakref.WeakKeyDictionary[Xtts, AllTurns] = weakref.WeakKeyDictionary()

# Not an attribute of the model: unpatch must leave every __dict__ as it was, and a deepcopy must not inherit a patch.
_patches: weakref.WeakKeyDictionary[Xtts, weakref.ref[Patch]] = weakref.WeakKeyDictionary()


def find_patch(xtts: Xtts) -> Patch | None:
    """The patch of a model, if it has one."""
    reference = _patches.get(xtts)
    return None if reference is None else reference()


def install(xtts: Xtts, options: Options, *, strict: bool, voice_cache: int, queue: int, guard: Guard | None) -> None:
    """Patch a model, in place of a patch that it has; the arguments are those of `Patch`.

    Calls that begin meanwhile wait for the new patch: coqui-tts itself serves one thread. If it fails, there is none.
    """
    former = find_patch(xtts)
    with former.dispatcher.giving_way() if former else contextlib.nullcontext():
        try:
            if former:
                former.make_way()  # before anything of the weights is converted anew
            settings: dict[str, Any] = {"strict": strict, "voice_cache": voice_cache, "queue": queue, "guard": guard}
            made = Patch(xtts, options, **settings, former=former)
        except BaseException:
            remove(xtts)
            raise
        _patches[xtts] = weakref.ref(made)
    end_team()  # whatever was converted, another thread may be the one that speaks


def remove(xtts: Xtts) -> None:
    """Undo `install`. Does nothing to a model that is not patched."""
    found = find_patch(xtts)
    if found is not None:
        found.remove()
        del _patches[xtts]
