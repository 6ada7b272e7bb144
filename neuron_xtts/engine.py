"""The engine: what one patched model has, decides and counts."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neuron_xtts.backends import Backend, DecodeState
from neuron_xtts.buckets import Bucket, BucketPlan, Buckets, bucket_name
from neuron_xtts.errors import Fallback, FallbackError, describe
from neuron_xtts.graphs.conditioning import Conditioning
from neuron_xtts.graphs.transformer import Decode, Latents, Prefill, Trunk
from neuron_xtts.graphs.vocoder import Vocoder, receptive_field
from neuron_xtts.report import Counters, Report
from neuron_xtts.target import check_conditioning, check_gpt, check_vocoder
from neuron_xtts.threads import at_most, usable_cpus

logger = logging.getLogger(__name__)

DISABLE_VARIABLE = "NEURON_XTTS_DISABLE"


class Engine:
    """Graphs, buckets, counters and the lock of one patched model.

    Args:
        gpt: coqui-tts's ``GPT``.
        decoder: coqui-tts's ``HifiDecoder``.
        make_backend: makes the backend of the graphs, which it is given by name.
        strict: raise instead of falling back.
    """

    def __init__(
        self,
        gpt: Any,
        decoder: Any,
        make_backend: Callable[[dict[str, Any]], Backend],
        *,
        strict: bool,
    ) -> None:
        self.gpt = gpt
        self.decoder = decoder
        self.strict = strict
        graphs, self.missing = make_graphs(gpt, decoder)
        self.halo = max(receptive_field(graphs["vocoder"])) if "vocoder" in graphs else 0
        self.backend = make_backend(graphs)
        self.plan = self.backend.plan
        if "vocoder" in graphs:
            check_windows(self.plan, self.halo)
        self.buckets = Buckets(self.plan, self.backend.missing)
        self._sources = {name: self._modules(name) for name in graphs}
        self.counters = Counters()
        self._cpus = usable_cpus()
        self._lock = threading.RLock()
        self._serving = False

    def _modules(self, graph: str) -> tuple[Any, ...]:
        """The modules of the model that a graph was made of."""
        if graph == "vocoder":
            generator = self.decoder.waveform_decoder
            names = ("conv_pre", "cond_layer", "ups", "conds", "resblocks", "conv_post")
            return (generator, *(getattr(generator, name, None) for name in names))
        gpt = self.gpt
        if graph == "conditioning":
            return (*gpt.conditioning_encoder.modules(), *gpt.conditioning_perceiver.modules())
        return (gpt.gpt, gpt.gpt.h, gpt.gpt.ln_f, gpt.final_norm, gpt.mel_head)

    def require(self, *graphs: str) -> None:
        """Raise `Fallback` unless these graphs are to be had, made of the modules that the model has now."""
        for graph in graphs:
            if () in self.plan.dimensions(graph):
                raise Fallback(f"no {graph} graph")
            if graph in self.missing:
                raise Fallback(self.missing[graph])
            if list(map(id, self._modules(graph))) != list(map(id, self._sources[graph])):
                raise Fallback("the model's modules were replaced after patch()")
            self.backend.check(graph)

    def serve(
        self,
        name: str,
        route: Callable[..., Any],
        wrapped: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Answer a call of a routed method: with graphs, or, for a recorded reason, with the method itself.

        Args:
            name: of the route.
            route: makes the result of graphs; raises `Fallback`, or anything else, if it cannot.
            wrapped: coqui-tts's own method.
            args: of the call.
            kwargs: of the call.
        """
        if disabled():
            self.counters.count_fallback(name, f"{DISABLE_VARIABLE} is set")
            return wrapped(*args, **kwargs)
        # One call at a time: coqui-tts keeps the prefix of a generation on the model, and torch's generator is global.
        with self._lock:
            if self._serving:  # a method of coqui-tts that calls another routed one, inside a fallback
                return wrapped(*args, **kwargs)
            self._serving = True
            start = time.perf_counter()
            try:
                served, result = self._attempt(name, partial(route, *args, **kwargs))
                return result if served else wrapped(*args, **kwargs)
            finally:
                self._serving = False
                self.counters.add_seconds(name, time.perf_counter() - start)

    def stream(self, name: str, route: Any, wrapped: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[Any]:
        """As `serve`, for a method that returns a generator.

        If a step fails, coqui-tts's own generator starts over with the random state of the first step, and goes on
        where the failed one stopped.

        Args:
            name: of the route.
            route: makes an iterator, and with ``original`` coqui-tts's own.
            wrapped: coqui-tts's own method.
            args: of the call.
            kwargs: of the call.
        """
        original = route.original(wrapped, *args, **kwargs)
        if disabled():
            self.counters.count_fallback(name, f"{DISABLE_VARIABLE} is set")
            return original  # type: ignore[no-any-return]
        with self._lock:
            served, steps = self._attempt(name, partial(route, *args, **kwargs), count=False)
        return self._steps(name, steps, original) if served else original

    def _steps(self, name: str, steps: Iterator[Any], original: Iterator[Any]) -> Iterator[Any]:
        first, done = torch.get_rng_state(), 0
        end = object()
        while True:
            with self._lock:  # not while the caller has the step
                start = time.perf_counter()
                served, step = self._attempt(name, partial(next, steps, end), count=False)
                self.counters.add_seconds(name, time.perf_counter() - start)
            if not served:
                break
            if step is end:
                self.counters.count_served(name)
                return
            done += 1
            try:
                yield step
            except GeneratorExit:
                self.counters.count_served(name)
                raise
        now = torch.get_rng_state()
        torch.set_rng_state(first)
        with self._lock:
            for _ in range(done):
                next(original)
        if done:
            torch.set_rng_state(now)
        while True:
            with self._lock:
                step = next(original, end)
            if step is end:
                return
            yield step

    def _attempt(self, name: str, call: Callable[[], Any], *, count: bool = True) -> tuple[bool, Any]:
        """Whether ``call`` succeeded, and its result; if not, the random state is what it was."""
        random_state = torch.get_rng_state()
        try:
            with at_most(self._cpus):
                result = call()
        except Exception as error:
            torch.set_rng_state(random_state)
            expected = isinstance(error, Fallback)
            reason = str(error) if expected else describe(error)[:200]
            if self.counters.count_fallback(name, reason):
                logger.warning("%s falls back to coqui-tts: %s", name, reason, exc_info=not expected)
            if self.strict:
                raise FallbackError(name, reason) from error
            return False, None
        if count:
            self.counters.count_served(name)
        return True, result

    def run(self, graph: str, bucket: Bucket, used: int, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Run a graph of one dimension on inputs that fill ``bucket``, of which ``used`` is not padding."""
        start = time.perf_counter()
        outputs = self.backend.run(graph, bucket, *inputs)
        self._count(graph, bucket, start, used, bucket[0])
        return outputs

    def step(
        self, state: DecodeState, used: int, embeds: Tensor, positions: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run a decode step; ``used`` of the slots of ``mask`` (rows times positions) are not padding."""
        start = time.perf_counter()
        outputs = state.step(embeds, positions, mask)
        bucket = (mask.shape[0], mask.shape[-1])
        self._count("decode", bucket, start, used, math.prod(bucket))
        return outputs

    def _count(self, graph: str, bucket: Bucket, start: float, used: int, padded: int) -> None:
        self.counters.count_run(graph, self.buckets.name(graph, bucket), time.perf_counter() - start, used, padded)

    def report(self, routes: Iterable[str], gone: list[str]) -> Report:
        """A snapshot of the counters.

        Args:
            routes: the routes that were installed, in the order to show.
            gone: those no longer installed.
        """
        route_counts, graph_counts = self.counters.snapshot(routes)
        buckets = {f"{graph} {bucket_name(b)}": reason for (graph, b), reason in list(self.backend.missing.items())}
        return Report(
            backend=self.backend.name,
            precision=self.backend.precision,
            buckets=self.plan.to_dict(),
            routes=route_counts,
            graphs=graph_counts,
            missing=self.missing | buckets,
            copied=self.backend.copied,
            gone=gone,
        )


def disabled() -> bool:
    """Whether the user turned every route off."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


def check_windows(plan: BucketPlan, halo: int) -> None:
    """Raise ValueError if a window of the vocoder has no room beside its halo."""
    if plan.vocoder and min(plan.vocoder) <= 2 * halo:
        raise ValueError(
            f"BucketPlan.vocoder has a window of {min(plan.vocoder)} frames; this vocoder needs more than "
            f"{2 * halo}, because {halo} on either side are halo"
        )


def make_graphs(gpt: Any, decoder: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The graphs of a model over its own modules, and, for those that cannot be had, the reason.

    Args:
        gpt: coqui-tts's ``GPT``.
        decoder: coqui-tts's ``HifiDecoder``.
    """
    graphs: dict[str, Any] = {}
    missing: dict[str, str] = {}
    try:
        check_gpt(gpt)
        trunk = Trunk(gpt.gpt, gpt.final_norm, gpt.heads)
        graphs["prefill"] = Prefill(trunk, gpt.mel_head)
        graphs["decode"] = Decode(trunk, gpt.mel_head)
        graphs["latents"] = Latents(trunk)
    except Fallback as fallback:
        missing |= dict.fromkeys(("prefill", "decode", "latents"), str(fallback))
    try:
        check_conditioning(gpt)
        graphs["conditioning"] = Conditioning(gpt.conditioning_encoder, gpt.conditioning_perceiver)
    except Fallback as fallback:
        missing["conditioning"] = str(fallback)
    try:
        check_vocoder(decoder)
        graphs["vocoder"] = Vocoder(decoder.waveform_decoder)
    except Fallback as fallback:
        missing["vocoder"] = str(fallback)
    return graphs, missing
