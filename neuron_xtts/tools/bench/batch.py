"""Many callers at once: whole sentences and streams, beside the same calls one after another."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import neuron_xtts
from neuron_xtts.coqui.constants import CODE_RATE, OUTPUT_RATE, SAMPLES_PER_CODE, STREAM_CHUNK
from neuron_xtts.decoding.caller import Caller
from neuron_xtts.options import PatchOptions
from neuron_xtts.tables import Table
from neuron_xtts.tools.bench import (
    PLAIN,
    Benchmark,
    Figures,
    Subject,
    Utterance,
    Voice,
    in_precision,
    machine,
    utterances,
)

CALLERS = (1, 2, 4, 8, 16)
CODES = 100
RATE = 0.5  # calls a second that arrive

#: What callers want, and when they come.
SCENES = {
    "whole": "whole sentences, all at once",
    "streams": "streams, all at once",
    "within a second": "streams that begin within a second",
    "arrivals": "streams that arrive at random",
}
ONE_BY_ONE = "one by one"  # behind a lock
TOGETHER = "together"


@dataclass
class Heard:
    """What one caller heard.

    Attributes:
        chunks: seconds from the call to each chunk of audio, and samples in it; a whole sentence is one chunk.
        codes: how many the audio is made of.
    """

    codes: int = 0
    chunks: list[tuple[float, int]] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first audio."""
        return self.chunks[0][0]

    @property
    def last(self) -> float:
        """Seconds to the last audio."""
        return self.chunks[-1][0]

    @property
    def seconds(self) -> float:
        """Of audio."""
        return sum(samples for _, samples in self.chunks) / OUTPUT_RATE

    @property
    def silence(self) -> float:
        """Seconds for which a listener who plays the first chunk at once waits for further ones."""
        late, buffered = 0.0, self.first
        for moment, samples in self.chunks:
            late += max(moment - buffered, 0)
            buffered = max(moment, buffered) + samples / OUTPUT_RATE
        return late


@dataclass
class Scene:
    """One performance of a scene.

    Attributes:
        seconds: from the first call to the last audio.
        heard: by every caller.
        steps: decode steps that graphs made, and ``rows``, all of theirs; 0 of coqui-tts.
    """

    seconds: float
    heard: list[Heard]
    steps: int
    rows: int


def perform(
    xtts: Any, voice: Voice, calls: Sequence[tuple[float, Utterance]], *, streamed: bool, lock: bool, seed: int
) -> Scene:
    """Have every caller call from a thread of its own.

    Args:
        xtts: the model, patched or not.
        voice: conditioning latents and speaker embedding.
        calls: seconds to wait, and what is said.
        streamed: in chunks.
        lock: one call at a time.
        seed: of the first call; of each further one it is one more.
    """
    patched = neuron_xtts.is_patched(xtts)
    heard = [Heard() for _ in calls]
    errors: list[BaseException] = []
    patient = Caller(patient=True)
    turn: contextlib.AbstractContextManager[Any] = threading.Lock() if lock else contextlib.nullcontext()
    steps, rows = _steps(xtts)

    def call(number: int, wait: float, said: Utterance) -> None:
        moment = begin + wait
        time.sleep(max(moment - time.perf_counter(), 0))
        arguments: dict[str, Any] = dict(said.arguments)
        if patched:
            arguments["seed"] = seed + number
        try:
            with turn, patient.calls():
                if not patched:
                    torch.manual_seed(seed + number)
                for samples, codes in _audio(xtts, voice, said.text, streamed, arguments):
                    heard[number].chunks.append((time.perf_counter() - moment, samples))
                    heard[number].codes += codes
        except BaseException as error:
            errors.append(error)

    begin = time.perf_counter() + 0.1
    threads = [threading.Thread(target=call, args=(number, *each)) for number, each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    for (_, said), each in zip(calls, heard, strict=True):
        if not each.chunks:
            raise ValueError(f"{said.text!r} has no more audio than what chunks overlap; it takes more codes")
    first = min(wait for wait, _ in calls)
    end = max(wait + each.last for (wait, _), each in zip(calls, heard, strict=True))
    now, all_rows = _steps(xtts)
    return Scene(end - first, heard, now - steps, all_rows - rows)


def _audio(xtts: Any, voice: Voice, text: str, streamed: bool, arguments: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Samples of each piece of audio that is not empty, and how many codes it is made of, by its length if streamed."""
    if not streamed:
        result = xtts.inference(text, "en", *voice, **arguments)
        yield len(result["wav"]), result["gpt_latents"].shape[1]
        return
    for chunk in xtts.inference_stream(text, "en", *voice, stream_chunk_size=STREAM_CHUNK, **arguments):
        if len(chunk):
            yield len(chunk), round(len(chunk) * CODE_RATE / OUTPUT_RATE / SAMPLES_PER_CODE)


def _steps(xtts: object) -> tuple[int, int]:
    """Decode steps so far, and rows that they had."""
    steps = neuron_xtts.report(xtts).batch.steps
    return sum(steps.values()), sum(rows * times for rows, times in steps.items())


@dataclass(kw_only=True)
class BatchResults(Benchmark):
    """Callers at once, in every precision.

    Attributes:
        samples: one a round, by scene, callers, variant and whether they call one by one.
        rate: calls a second that arrive.
    """

    samples: dict[str, dict[int, dict[str, dict[str, list[Scene]]]]]
    rate: float

    def figures(self, scene: str, callers: int, variant: str, how: str) -> dict[str, float]:
        """Medians over the rounds, and percentiles over all calls, by name."""
        taken = self.samples[scene][callers][variant][how]
        heard = [each for performance in taken for each in performance.heard]
        first, last = [each.first for each in heard], [each.last for each in heard]
        audio = [sum(each.seconds for each in performance.heard) for performance in taken]
        codes = [sum(each.codes for each in performance.heard) for performance in taken]
        seconds = [performance.seconds for performance in taken]
        steps = sum(performance.steps for performance in taken)
        return {
            "seconds": statistics.median(seconds),
            "aggregate RTF": statistics.median(a / b for a, b in zip(seconds, audio, strict=True)),
            "codes per second": statistics.median(a / b for a, b in zip(codes, seconds, strict=True)),
            "TTFA p50": float(np.percentile(first, 50)),
            "TTFA p95": float(np.percentile(first, 95)),
            "latency p50": float(np.percentile(last, 50)),
            "latency p95": float(np.percentile(last, 95)),
            "ran dry": statistics.mean(each.silence > 0.001 for each in heard),
            "longest silence": max(each.silence for each in heard),
            "rows a step": sum(performance.rows for performance in taken) / steps if steps else 0.0,
        }

    def medians(self) -> dict[str, Figures]:
        """What `figures` returns, by scene and callers, then by variant and whether they call one by one."""
        return {
            f"{scene}, {callers}": {
                f"{variant}, {how}": self.figures(scene, callers, variant, how)
                for variant, ways in variants.items()
                for how in ways
            }
            for scene, by_callers in self.samples.items()
            for callers, variants in by_callers.items()
        }

    def tables(self) -> list[Table]:
        """A table for each scene."""
        return [self._table(scene) for scene in self.samples]

    def _table(self, scene: str) -> Table:
        rows = []
        for callers, variants in self.samples[scene].items():
            for variant, ways in variants.items():
                alone = self.figures(scene, callers, variant, ONE_BY_ONE)
                for how in ways:
                    found = self.figures(scene, callers, variant, how)
                    cells = [f"{alone['seconds'] / found['seconds']:.2f}x" if how == TOGETHER else ""]
                    cells += [f"{found['seconds']:.2f} s", f"{found['aggregate RTF']:.3f}"]
                    cells += [f"{found['codes per second']:.1f}"]
                    if scene != "whole":
                        cells += [f"{found[name]:.2f} s" for name in ("TTFA p50", "TTFA p95")]
                        cells += [f"{found['ran dry']:.0%}, {found['longest silence']:.2f} s"]
                    cells += [f"{found[name]:.2f} s" for name in ("latency p50", "latency p95")]
                    cells += [f"{found['rows a step']:.1f}" if found["rows a step"] else ""]
                    rows.append((str(callers), variant, how, *cells))
        header = ["faster", "all done", "aggregate RTF", "codes/s"]
        header += [] if scene == "whole" else ["TTFA p50", "p95", "ran dry, longest"]
        label = SCENES[scene] + (f", {self.rate:g} a second" if scene == "arrivals" else "")
        return (label, "", "", *header, "latency p50", "p95", "rows a step"), rows

    def draw(self, path: Path) -> None:
        """Draw the aggregate RTF against the callers, for each scene, into a PNG file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.5 * len(self.samples), 3.8), layout="constrained")
        for axes, (scene, by_callers) in zip(
            figure.subplots(1, len(self.samples), squeeze=False)[0], self.samples.items(), strict=True
        ):
            lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
            for callers, variants in by_callers.items():
                for variant, ways in variants.items():
                    for how in ways:
                        point = callers, self.figures(scene, callers, variant, how)["aggregate RTF"]
                        lines.setdefault((variant, how), []).append(point)
            colors = {variant: f"C{i}" for i, variant in enumerate(dict.fromkeys(variant for variant, _ in lines))}
            for (variant, how), points in lines.items():
                style = "-" if how == TOGETHER else ":"
                axes.plot(
                    *zip(*points, strict=True), style, color=colors[variant], marker="o", label=f"{variant}, {how}"
                )
            axes.set(title=SCENES[scene], xlabel="callers", ylabel="aggregate RTF", ylim=(0, None))
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        figure.suptitle(f"Many callers; {self.machine['cpu']}")
        figure.savefig(path, dpi=120)


def bench_batch(
    subject: Subject,
    *,
    callers: Sequence[int] = CALLERS,
    codes: int = CODES,
    texts: Sequence[str] = (),
    scenes: Sequence[str] = tuple(SCENES),
    rate: float = RATE,
    rounds: int = 3,
    precisions: Sequence[str],
    options: PatchOptions,
) -> BatchResults:
    """Time callers with a known voice, together and one by one, in every precision; coqui-tts behind a lock.

    Args:
        subject: the model and the voice.
        callers: how many there are.
        codes: that each has said.
        texts: what they have said in place of that, in turn, until it ends by itself.
        scenes: of `SCENES`.
        rate: calls a second, on average, of those that arrive at random.
        rounds: each performs everything once, in alternating order.
        precisions: the precisions to patch with.
        options: keyword arguments of `neuron_xtts.patch`, but for the precision.
    """
    xtts, voice = subject.prepare()
    said = utterances([codes], texts)
    variants = (PLAIN, *precisions)
    results = BatchResults(
        machine=machine(),
        samples={
            scene: {
                count: {
                    name: {how: [] for how in ((ONE_BY_ONE,) if name == PLAIN else (ONE_BY_ONE, TOGETHER))}
                    for name in variants
                }
                for count in callers
            }
            for scene in scenes
        },
        rate=rate,
    )
    seeds = itertools.count(1, 1000)  # never the same twice: what begins alike would share audio
    total = rounds * len(callers) * len(scenes) * (2 * len(variants) - 1)
    with tqdm(total=total, desc="scenes", unit="scene") as bar:
        for round_ in range(rounds):
            for variant in variants[:: 1 if round_ % 2 else -1]:
                if variant != PLAIN:
                    neuron_xtts.patch(xtts, **in_precision(options, variant))
                # What torch, coqui-tts or a device sets up once.
                perform(xtts, voice, [(0, said[0])], streamed=True, lock=True, seed=next(seeds))
                for count, scene in itertools.product(callers, scenes):
                    calls = list(zip(_moments(scene, count, rate), itertools.cycle(said), strict=False))
                    ways = results.samples[scene][count][variant]
                    for how in list(ways)[:: 1 if round_ % 2 else -1]:
                        ways[how].append(
                            perform(
                                xtts,
                                voice,
                                calls,
                                streamed=scene != "whole",
                                lock=how == ONE_BY_ONE,
                                seed=next(seeds),
                            )
                        )
                        bar.update()
                if variant != PLAIN:
                    results.unpatch(xtts, variant)
    return results


def _moments(scene: str, callers: int, rate: float) -> list[float]:
    """Seconds after which each caller calls."""
    if scene == "within a second":
        return [number / callers for number in range(callers)]
    if scene == "arrivals":
        pauses = random.Random(callers)
        return list(itertools.accumulate(pauses.expovariate(rate) for _ in range(callers)))
    return [0.0] * callers
