"""The scheduler: rows of many calls decode together, and whoever waits for its own computes for all.

There is no thread that computes. Of the callers that wait for codes one leads: it runs steps of all rows until it has
what it waits for, and hands over to another that waits. So nothing is left behind by a model that goes, an interpreter
that ends, or a process that forks, and a caller by itself computes in its own thread, as if there were no others.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuron_xtts.coqui.embeddings import embed_codes
from neuron_xtts.decoding.batch import Batch
from neuron_xtts.decoding.call import Call, Step
from neuron_xtts.decoding.caller import CallerGone, caller
from neuron_xtts.decoding.draws import DRAWS, Waits
from neuron_xtts.decoding.row import Row, draw, ended, note, rules_of
from neuron_xtts.errors import Fallback, NotFinite, QueueFullError
from neuron_xtts.locks import forgets
from neuron_xtts.recorder import Growing
from neuron_xtts.report import BatchCounts
from neuron_xtts.runner import Runner
from neuron_xtts.timeline import Phase
from neuron_xtts.turns import POLL, later


def _on_cpu() -> contextlib.AbstractContextManager[object]:
    """Keeps a leader's default device from the rows of others; if that is the CPU it is nothing, and costs nothing."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


class _Drawing(NamedTuple):
    """A call that draws its next codes, by ``logits`` (rows, V), where its latents (rows, D) have been."""

    call: Call
    latents: Tensor
    logits: Tensor


class Scheduler:
    """The batch of one model, and the calls whose rows are in it or wait to be.

    Args:
        runner: of the graphs.
        queue: how many calls may wait.
        all: the schedulers that share the queue, of which this one becomes another.
    """

    def __init__(self, runner: Runner, queue: int, all: list[Scheduler]) -> None:
        self._runner = runner
        self._most = queue
        self._all = all
        all.append(self)
        # Reentrant: a stream that nobody holds any more is closed wherever Python collects it.
        self._lock = threading.RLock()
        self._queue: list[Call] = []  # in the order in which they came
        self._running: list[Call] = []  # have slots
        self._leader: Call | None = None  # whose thread computes for all: it alone touches the batch
        self._thread: int | None = None  # that computes now
        self._batch = Batch(runner)
        self._identity: Hashable = None  # of what the rows in the batch are computed with
        self._counts = BatchCounts()
        self._stepped: Growing | None = None  # the latest steps
        forgets(self)

    def run(self, call: Call) -> list[Step]:
        """All steps of a call, in whatever mode of torch the caller is.

        Raises:
            QueueFullError: too many calls wait.
            Fallback: no bucket holds its rows.
        """
        with self._begun(call):
            self._wait(call)
        return list(call.steps)

    def stream(self, call: Call) -> Iterator[Step]:
        """The steps of a call, which begins when the first is asked for. Closed early, it makes room for others.

        Raises:
            QueueFullError: too many calls wait.
            Fallback: no bucket holds its row.
        """
        with self._begun(call):
            while True:
                self._wait(call)
                if not call.steps:
                    return
                codes, latents = call.steps.popleft()
                yield codes.clone(), latents.clone()  # in the caller's mode, and its own

    def counts(self) -> BatchCounts:
        """What became of rows so far, and where they are now."""
        with self._lock:
            now: dict[str, Any] = {
                "slots": self._batch.most,
                "decoding": self._batch.rows,
                "waiting": sum(call.wants for call in self._queue),
            }
            return replace(self._counts, **now, steps=Counter(self._counts.steps))

    @contextlib.contextmanager
    def _begun(self, call: Call) -> Iterator[None]:
        """A call waits or decodes for the length of a ``with`` block, or as long as its caller is there."""
        with caller().may_go(partial(self._cancel, call)):
            try:
                self._begin(call)
                yield
            finally:
                self._give_up(call)

    def _begin(self, call: Call) -> None:
        # Such as more rows than there may be slots: told before anybody waits.
        self._runner.buckets.choose(self._runner.decoder, len(call.rows), call.prefix.shape[1] + 1)
        with self._lock:
            call.utterance = self._runner.recorder.here.number
            call.patient = call.patient or caller().patient  # such waits for others, and takes no place of theirs
            patient = sum(other.patient for scheduler in self._all for other in scheduler._queue)
            waiting = sum(max(scheduler._more, 0) for scheduler in self._all) - patient
            if self._more >= 0 and waiting >= self._most and not call.patient:
                self._counts.refused += 1
                raise QueueFullError(sum(scheduler._batch.most for scheduler in self._all), self._most)
            self._queue.append(call)
            call.begun = True

    @property
    def _more(self) -> int:
        """How many more calls wait than there are slots for; below zero, how many slots are left."""
        waiting = sum(not other.parked and not other.given_up for other in self._queue)
        idle = sum(len(other.rows) for other in self._running if not other.wants)
        return waiting - self._batch.free - idle

    def _give_up(self, call: Call) -> None:
        """Nobody wants more of a call: its rows leave before the next step, or now if there is none."""
        if not call.over:
            self._leave(call)
        self._stop_leading(call)

    def _cancel(self, call: Call) -> None:
        """The same from another thread than that which waits for the call, and then waits no longer."""
        call.error = CallerGone()
        self._leave(call)
        self._stop_leading(None)  # whose thread leads, if it does, goes on until it notices

    def _leave(self, call: Call) -> None:
        with self._lock:  # not while it draws from the global generator, which the next call may then have
            self._counts.cancelled += call.begun and not (call.over or call.given_up)
            call.given_up = True

    def _wait(self, call: Call) -> None:
        """Until the call is ready: another thread computes for it, or this one does for all."""
        if self._thread == threading.get_ident() and not call.ready:  # in a hook, say: it would wait for itself
            raise Fallback("a call from inside of a decode step")
        start = time.perf_counter()
        try:
            while not call.ready:
                caller().check()
                with self._lock:
                    if self._leader is None or self._leader.over:  # nobody leads, or was interrupted as it ended
                        self._leader = call
                    leads = self._leader is call
                    call.waited_for = not leads
                    call.woken.clear()
                if leads:
                    self._lead(call)
                elif not call.ready:
                    self._runner.turns.rest()
                    call.woken.wait(POLL)
        finally:
            call.waited_for = False
            self._stop_leading(call)
            self._note_wait(call, start)
        if call.error is not None:
            raise call.error

    def _note_wait(self, call: Call, start: float) -> None:
        """Its caller waited; while it was prefilled, or had a step, that is what it was at."""
        whose = (call.utterance,)
        call.asked = self._runner.recorder.grow(call.asked, Phase.WAITING, start, whose)
        call.asked.end = time.perf_counter()

    def _lead(self, call: Call) -> None:
        """Compute for all until a call is ready."""
        with (
            self._runner.turns.take(self._urgency, brief=call.streamed),
            torch.inference_mode(),
            torch.autocast("cpu", enabled=False),
            _on_cpu(),
        ):
            while not call.ready:
                self._thread = threading.get_ident()
                try:
                    worked = self._tick()
                except BaseException:
                    # What was being computed is neither done nor undone.
                    self._end_all()
                    raise
                finally:
                    self._thread = None
                if not worked and not call.ready:
                    raise RuntimeError("no slot could be had")
                caller().check()
                if not call.ready:
                    self._runner.turns.offer(self._urgency)

    def _stop_leading(self, call: Call | None) -> None:
        """Let another thread lead, if a call's did; if none does, have one that waits, and see to what was given up."""
        waiting = None
        with self._lock:
            if self._leader is call:
                self._leader = None
            if self._leader is None:
                self._drop()
                calls = (*self._running, *self._queue)
                waiting = next((other for other in calls if other.waited_for and not other.ready), None)
        if waiting is not None:
            waiting.woken.set()

    def _urgency(self) -> float:
        """Of the next step."""
        return min((call.urgency() for call in (*self._running, *self._queue) if call.wants), default=later())

    def _tick(self) -> bool:
        """One prefill at most, and one step of whoever wants one; false if there was nothing to do."""
        self._drop()
        self._widen()
        running = [call for call in self._running if call.wants]
        joined = self._join()
        if running:
            self._step(running)
        return joined or bool(running)

    def _drop(self) -> None:
        """Have calls leave that were given up, or that ended when somebody was interrupted."""
        for call in [call for call in (*self._running, *self._queue) if call.given_up or call.over]:
            self._end(call, call.error)

    def _widen(self) -> None:
        """Have the state hold the next position of every row; one for which there is no bucket leaves."""
        while self._running:
            try:
                self._batch.widen()
                return
            except Exception as error:
                longest = self._batch.longest()
                self._end(next(call for call in self._running if longest in call.rows), error)

    def _end(self, call: Call, error: BaseException | None = None) -> None:
        """Let a call's rows go; nothing more will be computed for it."""
        self._batch.release(call.rows)
        call.parked = []
        with self._lock:
            for calls in (self._running, self._queue):
                if call in calls:
                    calls.remove(call)
        call.end(error)

    def _end_all(self) -> None:
        """Let all fall back that have begun: whoever computed for them was interrupted."""
        for call in (*self._running, *self._queue):
            if call in self._running or call.parked or any(row.slot is not None for row in call.rows):
                self._end(call, Fallback("the thread that computed for it was interrupted"))

    def _join(self) -> bool:
        """Let the most pressing call that waits have slots, the earliest of those alike."""
        waiting = [call for call in self._queue if call.wants]
        if not waiting:
            return False
        call = min(waiting, key=lambda call: call.urgency())
        if not self._has_room(call):
            return False
        self._identity = call.identity
        began, start = time.monotonic(), time.perf_counter()
        try:
            if call.parked:
                if call.identity != self._runner.identity():
                    raise Fallback("weights changed")  # and what was kept may be in the units of others
                self._batch.bring_back(call.parked)
                outputs = None
            else:
                with self._runner.recorder.on_behalf(call.utterance):
                    outputs = self._batch.admit(call.rows, call.prefix)
        except Exception as error:
            self._end(call, error)
            return True
        with self._lock:
            self._running.append(call)
            self._queue.remove(call)
            if outputs is not None:
                self._counts.waited(began - call.made)
        call.parked = []
        if outputs is not None:
            self._deliver([call], *outputs)
        self._runner.recorder.was_at(Phase.AROUND, start, call.utterance)
        return True

    def _has_room(self, call: Call) -> bool:
        """Whether a call's rows find slots, if need be of streams that are far enough ahead.

        Rows that are computed with other weights must have left: their state may hold copies of those.
        """

        def has_room() -> bool:
            same = call.identity == self._identity or not self._batch.rows
            return same and self._batch.has_room(len(call.rows))

        urgency, others_go_on = call.urgency(), any(other.wants for other in self._running)
        for other in [other for other in self._running if not other.wants]:
            if has_room():
                break
            if others_go_on and not call.streamed and other.urgency() <= urgency:
                continue  # it would get its slot back when a whole call ends: let this one wait for that
            try:
                other.parked = self._batch.park(other.rows)
            except Exception as error:
                self._end(other, error)
                continue
            with self._lock:
                self._queue.append(other)
                self._running.remove(other)
        return has_room()

    def _step(self, calls: Sequence[Call]) -> None:
        """One step of the rows of some calls."""
        rows = [row for call in calls for row in call.rows]
        codes = torch.cat([call.codes for call in calls if call.codes is not None])
        places = [row.drawn for row in rows]
        ahead: list[Waits] = []
        began = start = time.perf_counter()
        try:
            if self._runner.steps == 1:
                outputs = self._batch.step(rows, (embed_codes(self._runner.networks.gpt, codes, places),))
            else:
                self._check_places(rows)
                ahead = self._draw_ahead(calls)
                waits = torch.cat([each.waits for each in ahead])
                given = codes.int(), torch.tensor(places).int(), *rules_of(rows, waits.shape[2]), waits
                start = time.perf_counter()
                outputs = self._batch.step(rows, given)
            end = time.perf_counter()
            with self._lock:
                self._counts.steps[len(rows)] += self._runner.steps
        except Exception as error:
            for each in ahead:
                each.keep(0)
            if len(calls) == 1:
                with contextlib.suppress(Exception):  # what it wrote may be anything, and a device may be gone
                    self._batch.clear(rows)
                self._end(calls[0], error)
            else:  # each by itself, to see which is at fault; the longest first, for which no bucket may be left
                for call in sorted(calls, key=lambda call: -call.rows[0].position):
                    self._step([call])
            return
        if ahead:
            sizes = [len(call.rows) for call in calls]
            parts = (torch.split(each, sizes) for each in outputs[:3])  # the rest is for verification
            for call, its, *found in zip(calls, ahead, *parts, strict=True):
                self._take(call, its, *found)
        else:
            for row in rows:
                row.position += 1
            self._deliver(calls, *outputs)
        self._note_steps(calls, len(rows), began, start, end)

    def _note_steps(self, calls: Sequence[Call], rows: int, began: float, start: float, end: float) -> None:
        """A step ran from ``start`` to ``end``; around that, from when it began until now, codes were drawn."""
        whose = tuple(call.utterance for call in calls)
        self._stepped = steps = self._runner.recorder.grow(self._stepped, Phase.DECODE, began, whose, rows=rows)
        steps.end = time.perf_counter()
        steps.steps += self._runner.steps
        steps.decoding += end - start
        steps.sampling += start - began + steps.end - end

    def _check_places(self, rows: Sequence[Row]) -> None:
        """Raise `Fallback` where coqui-tts has no position for a code that is wanted: a device would not notice."""
        places = self._runner.networks.gpt.mel_pos_embedding.emb.num_embeddings
        if any(row.drawn + min(self._runner.steps, row.wanted) > places for row in rows):
            raise Fallback("more audio codes than the model has positions")

    def _draw_ahead(self, calls: Sequence[Call]) -> list[Waits]:
        """What the next codes of calls are drawn with on a device."""
        shape = self._runner.steps, self._runner.networks.gpt.mel_head.out_features
        with self._lock:  # a call that is given up has ended its claim on the global generator
            drawing = [None if call.given_up else call.rows[0].sampler.source for call in calls]
            if torch.default_generator in drawing:
                DRAWS.note()
            return [Waits(source, len(call.rows), *shape) for source, call in zip(drawing, calls, strict=True)]

    def _take(self, call: Call, ahead: Waits, codes: Tensor, latents: Tensor, logits: Tensor) -> None:
        """Let a call have what a device drew for it up to its end, by ``logits`` (rows, N, V) on the way.

        Args:
            call: it.
            ahead: with what it was drawn.
            codes: (rows, N).
            latents: (rows, N, D).
            logits: (rows, N, V).
        """
        used, finite = 0, True
        with self._lock:
            if call.given_up:
                return
            while used < codes.shape[1] and not (used and ended(call.rows)):
                finite = math.isfinite(logits[:, used].sum())
                if not finite:
                    break
                call.codes = codes[:, used].long()
                note(call.rows, call.codes)
                call.steps.append((call.codes, latents[:, used]))
                used += 1
            ahead.keep(used)
        for row in call.rows:
            row.position += used
        if not math.isfinite(logits.sum()):
            self._batch.clear(call.rows)  # for whoever has their slots next, whoever took the codes
        if not finite:
            self._end(call, NotFinite("logits that are not finite"))
        elif ended(call.rows):
            self._finish(call)
        elif call.streamed:
            call.wake()

    def _deliver(self, calls: Sequence[Call], latents: Tensor, logits: Tensor) -> None:
        """Draw the next code of every row, for calls whose ``latents`` (rows, D) and ``logits`` (rows, V) these are."""
        sizes = [len(call.rows) for call in calls]
        drawing = []
        parts = zip(calls, torch.split(latents, sizes), torch.split(logits, sizes), strict=True)
        for call, its_latents, scores in parts:
            if call.given_up:
                continue
            if math.isfinite(scores.sum()):
                drawing.append(_Drawing(call, its_latents, scores))
            else:
                self._batch.clear(call.rows)  # for whoever has their slots next
                self._end(call, NotFinite("logits that are not finite"))
        if drawing:
            self._draw(drawing)

    def _draw(self, drawing: Sequence[_Drawing]) -> None:
        with self._lock:  # a call that is given up has ended its claim on the global generator
            drawing = [each for each in drawing if not each.call.given_up]
            if drawing:
                self._draw_now(drawing)

    def _draw_now(self, drawing: Sequence[_Drawing]) -> None:
        generators = {source for call, _, _ in drawing if (source := call.rows[0].sampler.source)}
        if torch.default_generator in generators:
            DRAWS.note()
        states = [(generator, generator.get_state()) for generator in generators]
        try:
            codes = draw([row for call, _, _ in drawing for row in call.rows], torch.cat([s for _, _, s in drawing]))
        except Exception as error:
            for generator, state in states:
                generator.set_state(state)
            if len(drawing) == 1:
                self._end(drawing[0].call, error)
            else:
                for each in drawing:
                    self._draw([each])
            return
        parts = torch.split(codes, [len(call.rows) for call, _, _ in drawing])
        for (call, latents, _), its_codes in zip(drawing, parts, strict=True):
            call.codes = its_codes
            call.steps.append((its_codes, latents))
            if ended(call.rows):
                self._finish(call)
            elif call.streamed:
                call.wake()

    def _finish(self, call: Call) -> None:
        error = None
        try:
            if call.with_cache:
                call.cache = self._batch.cache(call.rows)
        except Exception as failure:
            error = failure
        self._end(call, error)

    def forget(self) -> None:
        """In a forked child: whoever leads, or called, is not there."""
        began = (*self._running, *self._queue)
        self._lock = threading.RLock()
        self._queue, self._running, self._leader, self._thread = [], [], None, None
        self._batch = Batch(self._runner)
        for call in began:
            call.woken = threading.Event()
            call.end(Fallback("it began in another process, of which this one is a fork"))
