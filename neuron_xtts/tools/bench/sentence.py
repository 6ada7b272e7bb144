"""Whole sentences in every precision: seconds by stage, first audio, peak memory, and what it costs in accuracy."""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import neuron_xtts
from neuron_xtts.coqui.constants import STREAM_CHUNK, seconds_of
from neuron_xtts.options import PatchOptions
from neuron_xtts.precision import HOST, WEIGHT_BYTES, Precision
from neuron_xtts.tables import Table
from neuron_xtts.tools.bench import (
    PLAIN,
    Benchmark,
    Figures,
    Subject,
    Utterance,
    Voice,
    exactly,
    in_precision,
    machine,
    utterances,
)
from neuron_xtts.tools.bench.accuracy import Accuracy, accuracy
from neuron_xtts.tools.bench.stream import stream
from neuron_xtts.tools.stopwatch import Stopwatch, each_code

LENGTHS = (50, 100, 200, 400)  # codes
STAGES = ("codes", "latents", "vocoder")
RELEASED = " released"  # what a variant is called whose fp32 weights are not kept in memory


def speak(xtts: Any, voice: Voice, utterance: Utterance) -> dict[str, float]:
    """Time one sentence.

    Returns:
        seconds of the whole sentence and of each stage; the median time from one code to the next (where a device makes
        several at once the mean, prefill included); how much of that, on average, is not in the decode graph (0 where
        time is not told apart); its ``length`` in codes.
    """
    ticks: list[float] = []
    marks: list[tuple[float, float]] = []

    def tick(*_: object) -> None:
        ticks.append(time.perf_counter())
        if len(ticks) in (2, utterance.codes):  # the ends of what is told apart: a pause elsewhere is no part of it
            marks.append(decoded(xtts))

    torch.manual_seed(utterance.codes or 1)  # what begins alike would share audio
    with each_code(xtts, tick), Stopwatch(xtts) as stopwatch:
        start = time.perf_counter()
        result = xtts.inference(utterance.text, "en", *voice, **utterance.arguments)
        seconds = time.perf_counter() - start
    length = result["gpt_latents"].shape[1]
    figures = {"sentence": seconds, **{stage: stopwatch.seconds[stage] for stage in STAGES}, "length": length}
    if not ticks:
        return figures | {"one code": stopwatch.seconds["codes"] / length, "sampling and loop": 0.0}
    if utterance.codes is None:
        marks.append(decoded(xtts))
    intervals = [b - a for a, b in itertools.pairwise(ticks[1:length])]
    runs, decoding = (now - before for before, now in zip(marks[0], marks[-1], strict=True))
    around = statistics.mean(intervals) - decoding / runs if runs else 0.0
    return figures | {"one code": statistics.median(intervals), "sampling and loop": around}


def decoded(xtts: object) -> tuple[float, float]:
    """How often the decode graph has run so far, and seconds in those runs."""
    counts = neuron_xtts.report(xtts).graphs.get("decode", {}).values()
    return sum(count.runs for count in counts), sum(count.seconds for count in counts)


def bandwidth() -> float:
    """Bytes a second that all threads together read of memory that no cache holds."""
    data = torch.ones(2**27)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / statistics.median(seconds)


def peak_memory(precision: str, codes: int, small: bool) -> int:
    """Bytes that a process of its own holds at most while it speaks, counted from when the model is loaded."""
    command = [sys.executable, "-m", __name__, precision, str(codes), "small" if small else "full"]
    return int(subprocess.run(command, capture_output=True, check=True).stdout.split()[-1])


def _speak_and_print_peak(precision: str, codes: int, small: bool) -> None:
    xtts, voice = Subject(small=small).prepare()
    # Making and loading the model needs more: give back what is free, and forget the peak so far.
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    if precision != PLAIN:
        name, released, _ = precision.partition(RELEASED)
        neuron_xtts.patch(xtts, backend="cpu", precision=Precision(name, release=bool(released)))
    for _ in range(2):
        speak(xtts, voice, exactly(codes))
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024)


@dataclass(kw_only=True)
class SentenceResults(Benchmark):
    """Sentences of several lengths, in every precision.

    Attributes:
        samples: what `speak` returned, by `Utterance.key` and variant, one a round; and ``bandwidth``, what `bandwidth`
            measured right before.
        first_audio: seconds to the first chunk of a stream, of `STREAM_CHUNK` codes, by variant, one a round.
        patching: seconds that `patch` took, by precision, one a round.
        accuracy: how far each precision is from coqui-tts.
        memory: bytes that a process holds at most, by variant.
        weights: bytes of weights that a decode step reads, by variant on the host.
    """

    samples: dict[int | str, dict[str, list[dict[str, float]]]]
    first_audio: dict[str, list[float]]
    patching: dict[str, list[float]]
    accuracy: dict[str, Accuracy]
    memory: dict[str, int]
    weights: dict[str, int]

    def figures(self, key: int | str, variant: str) -> dict[str, float]:
        """Figures of one sentence and variant, by name.

        Medians over the rounds; the RTF; codes per second while codes are made; and, where it is known what a decode
        step reads, the time of a code over the time of merely reading its weights.
        """
        taken = self.samples[key][variant]
        result = {stage: statistics.median(sample[stage] for sample in taken) for stage in taken[0]}
        codes = round(result["length"])
        result |= {"RTF": result["sentence"] / seconds_of(codes), "codes per second": codes / result["codes"]}
        if variant in self.weights:
            reads = [sample["one code"] * sample["bandwidth"] / self.weights[variant] for sample in taken]
            result["code / reading weights"] = statistics.median(reads)
        return result

    def medians(self) -> dict[int | str, Figures]:
        """What `figures` returns, by `Utterance.key` and variant."""
        return {
            key: {variant: self.figures(key, variant) for variant in variants} for key, variants in self.samples.items()
        }

    def tables(self) -> list[Table]:
        """Tables of speed, one for each sentence, then of first audio, accuracy and memory."""
        tables = [self._speed(key) for key in self.samples]
        tables += [self._first_audio(), self._accuracy()]
        if self.memory:
            tables.append(self._memory())
        return tables

    def _first_audio(self) -> Table:
        first = {variant: statistics.median(seconds) for variant, seconds in self.first_audio.items()}
        rows = [(name, f"{1e3 * seconds:.0f} ms", f"{first[PLAIN] / seconds:.2f}x") for name, seconds in first.items()]
        return (f"TTFA, first chunk of {STREAM_CHUNK} codes", "", "faster"), rows

    def _accuracy(self) -> Table:
        rows = [
            (name, f"{a.latents:.6f}", f"{a.snr:.1f} dB", f"{a.spectrum:.6f}", f"{a.vocoder_snr:.1f} dB",
             f"{statistics.median(self.patching[name]):.1f} s")
            for name, a in self.accuracy.items()
        ]  # fmt: skip
        return ("precision", "latents PCC", "SNR", "STFT PCC", "SNR of vocoder", "patch"), rows

    def _memory(self) -> Table:
        plain = self.memory[PLAIN]
        rows = [(name, f"{size / 2**20:.0f} MiB", f"{size / plain - 1:+.1%}") for name, size in self.memory.items()]
        return ("peak memory", "", "against coqui-tts"), rows

    def _speed(self, key: int | str) -> Table:
        plain = self.figures(key, PLAIN)
        rows: list[tuple[str, ...]] = []
        for variant in self.samples[key]:
            found = self.figures(key, variant)
            cells = [f"{plain['sentence'] / found['sentence']:.2f}x", f"{found['RTF']:.2f}"]
            cells += [f"{1e3 * found[stage]:.0f} ms" for stage in ("sentence", *STAGES)]
            cells += [f"{found['codes per second']:.1f}"]
            cells += [
                f"{1e3 * found[part]:.2f} ms" if found[part] else "" for part in ("one code", "sampling and loop")
            ]
            limit = found.get("code / reading weights")
            rows.append((variant, *cells, f"{limit:.2f}" if limit else "", f"{found['bandwidth'] / 1e9:.0f} GB/s"))
        codes = round(plain["length"])
        label = f"{codes} codes, {seconds_of(codes):.2f} s"
        if isinstance(key, str):
            label = f"{key} ({label})"
        header = ("faster", "RTF", "sentence", *STAGES, "codes/s", "one code", "sampling, loop")
        return (label, *header, "code / reading weights", "memory read at"), rows

    def draw(self, path: Path) -> None:
        """Draw the real-time factor against the length into a PNG file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for variant in next(iter(self.samples.values())):
            found = [self.figures(key, variant) for key in self.samples]
            points = sorted((figures["length"], figures["RTF"]) for figures in found)
            axes.plot(*zip(*points, strict=True), marker="o", label=variant)
        axes.axhline(1, color="gray", linewidth=0.8, linestyle="dashed")
        axes.set(title=f"One sentence; {self.machine['cpu']}", xlabel="codes", ylabel="RTF", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)


def bench_sentence(
    subject: Subject,
    *,
    lengths: Sequence[int] = LENGTHS,
    texts: Sequence[str] = (),
    rounds: int = 3,
    precisions: Sequence[str],
    memory: bool = True,
    options: PatchOptions,
) -> SentenceResults:
    """Time sentences with a known voice, unpatched and in every precision.

    Args:
        subject: the model and the voice.
        lengths: how many codes the sentences have.
        texts: sentences in their place, which are spoken until they end by themselves.
        rounds: each speaks every sentence in every variant once, in alternating order.
        precisions: the precisions to patch with.
        memory: on the host: measure peak memory, too, in processes of their own (of random weights).
        options: keyword arguments of `neuron_xtts.patch`, but for the precision.
    """
    xtts, voice = subject.prepare()
    variants = (PLAIN, *precisions)
    spoken = utterances(lengths, texts)
    results = SentenceResults(
        machine=machine(),
        samples={utterance.key: {name: [] for name in variants} for utterance in spoken},
        first_audio={name: [] for name in variants},
        patching={name: [] for name in precisions},
        accuracy={},
        memory={},
        weights=_weights_read(xtts) if memory else {},
    )
    with tqdm(total=rounds * len(spoken) * len(variants), desc="sentences", unit="sentence") as bar:
        for round_ in range(rounds):
            for variant in variants[:: 1 if round_ % 2 else -1]:
                if variant != PLAIN:
                    start = time.perf_counter()
                    neuron_xtts.patch(xtts, **in_precision(options, variant))
                    results.patching[variant].append(time.perf_counter() - start)
                results.first_audio[variant].append(_first_audio(xtts, voice))
                for utterance in spoken:
                    sample = {"bandwidth": bandwidth(), **speak(xtts, voice, utterance)}
                    results.samples[utterance.key][variant].append(sample)
                    bar.update()
                if variant != PLAIN:
                    results.unpatch(xtts, variant)
    for name in precisions:
        unpatch = partial(results.unpatch, variant=name)
        codes = min(100, max(lengths))
        results.accuracy[name] = accuracy(xtts, voice, codes, in_precision(options, name), unpatch)
    if memory and subject.checkpoint is None:
        released = [name + RELEASED for name in precisions if HOST[name].linears != "fp32"]
        results.memory = {name: peak_memory(name, min(lengths), subject.small) for name in (*variants, *released)}
    return results


def _weights_read(xtts: Any) -> dict[str, int]:
    """Bytes of weights that a decode step reads, by variant on the host."""
    trunk = sum(parameter.numel() for parameter in xtts.gpt.gpt.h.parameters() if parameter.ndim == 2)
    sizes = {name: trunk * WEIGHT_BYTES[precision.linears] for name, precision in HOST.items()}
    return {PLAIN: sizes["fp32"], **sizes}


def _first_audio(xtts: Any, voice: Voice) -> float:
    """Seconds to the first chunk of a stream."""
    stream(xtts, voice, exactly(2), size=1)  # what torch, coqui-tts or a device set up once
    return stream(xtts, voice, exactly(STREAM_CHUNK), size=STREAM_CHUNK).chunks[0]


if __name__ == "__main__":
    _speak_and_print_peak(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "small")
