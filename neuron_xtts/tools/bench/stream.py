"""Streams: time to first audio, and time per chunk against the number of the chunk."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import neuron_xtts
from neuron_xtts.coqui.constants import OUTPUT_RATE, STREAM_CHUNK
from neuron_xtts.options import PatchOptions
from neuron_xtts.patching.proxy import Installation
from neuron_xtts.tables import Table
from neuron_xtts.tools.bench import (
    PLAIN,
    Benchmark,
    Figures,
    Subject,
    Utterance,
    Voice,
    exactly,
    label_of,
    machine,
    utterances,
)

LENGTHS = (100, 300, 600)  # codes
VARIANTS = (PLAIN, "neuron_xtts")


@dataclass
class Stream:
    """What one stream took.

    Attributes:
        chunks: seconds from one chunk to the next; of the first, from the call: the TTFA.
        vocoder: how many of those seconds were spent in the vocoder.
        frames: vocoder frames that were asked for, all calls together.
        samples: how many samples of audio came, at 24 kHz.
    """

    chunks: list[float] = field(default_factory=list)
    vocoder: float = 0.0
    frames: int = 0
    samples: int = 0

    @property
    def total(self) -> float:
        """Seconds of the whole stream."""
        return sum(self.chunks)


def stream(xtts: Any, voice: Voice, utterance: Utterance, *, size: int) -> Stream:
    """Time a stream.

    Args:
        xtts: the model, patched or not.
        voice: conditioning latents and speaker embedding.
        utterance: what is said.
        size: codes per chunk.
    """
    result = Stream()

    def vocode(wrapped: Callable[..., Tensor], args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor:
        start = time.perf_counter()
        audio = wrapped(*args, **kwargs)
        result.vocoder += time.perf_counter() - start
        result.frames += audio.shape[-1] // xtts.hifigan_decoder.output_hop_length
        return audio

    torch.manual_seed(1000 * size + (utterance.codes or 0))  # what begins alike would share audio
    installation = Installation(xtts.hifigan_decoder, "forward").install(vocode)
    try:
        last = time.perf_counter()
        for chunk in xtts.inference_stream(utterance.text, "en", *voice, stream_chunk_size=size, **utterance.arguments):
            now = time.perf_counter()
            result.chunks.append(now - last)
            result.samples += len(chunk)
            last = now
    finally:
        installation.remove()
    return result


@dataclass(kw_only=True)
class StreamResults(Benchmark):
    """Streams of several lengths, patched and unpatched.

    Attributes:
        size: codes per chunk.
        samples: the streams, by `Utterance.key` and variant, one a round.
        worked: vocoder frames that graphs computed, halo and padding included, by `Utterance.key`.
    """

    size: int
    samples: dict[int | str, dict[str, list[Stream]]]
    worked: dict[int | str, int]

    def chunks(self, key: int | str, variant: str) -> list[float]:
        """Median seconds of each chunk of the streams of one sentence and variant."""
        taken = (sample.chunks for sample in self.samples[key][variant])
        return [statistics.median(times) for times in zip(*taken, strict=True)]

    def figures(self, key: int | str, variant: str) -> dict[str, float]:
        """Medians over the rounds, by name: seconds, and the RTF."""
        taken, chunks = self.samples[key][variant], self.chunks(key, variant)
        last = max(len(chunks) - 2, 0)  # after it comes one with what is left: no code, or fewer than `size`
        total = statistics.median(sample.total for sample in taken)
        return {
            "TTFA": chunks[0],
            "second chunk": chunks[min(1, last)],
            "last whole chunk": chunks[last],
            "whole stream": total,
            "vocoder": statistics.median(sample.vocoder for sample in taken),
            "RTF": total * OUTPUT_RATE / taken[0].samples,
        }

    def medians(self) -> dict[int | str, Figures]:
        """What `figures` returns, by `Utterance.key` and variant."""
        return {key: {variant: self.figures(key, variant) for variant in VARIANTS} for key in self.samples}

    def tables(self) -> list[Table]:
        """A table for each sentence."""
        return [self._table(key) for key in self.samples]

    def _table(self, key: int | str) -> Table:
        plain, patched = (self.figures(key, variant) for variant in VARIANTS)
        rows: list[tuple[str, ...]] = []
        for name, seconds in plain.items():
            unit = "" if name == "RTF" else " s"
            ratio = f"{seconds / patched[name]:.2f}x"
            rows.append((name, f"{seconds:.3f}{unit}", f"{patched[name]:.3f}{unit}", ratio))
        growth = [figures["last whole chunk"] / figures["second chunk"] for figures in (plain, patched)]
        rows.append(("last / second chunk", *(f"{ratio:.2f}" for ratio in growth), ""))
        frames = self.samples[key][PLAIN][0].frames
        worked = self.worked[key]
        rows.append(("vocoder frames", str(frames), str(worked), f"{frames / worked:.1f}x" if worked else ""))
        seconds = self.samples[key][PLAIN][0].samples / OUTPUT_RATE
        header = f"{label_of(key)}, {seconds:.2f} s of audio, chunks of {self.size} codes"
        return (header, *VARIANTS, ""), rows

    def draw(self, path: Path) -> None:
        """Draw the seconds per chunk of each length into a PNG file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.5 * len(self.samples), 3.6), layout="constrained")
        for axes, key in zip(figure.subplots(1, len(self.samples), squeeze=False)[0], self.samples, strict=True):
            for variant in VARIANTS:
                chunks = self.chunks(key, variant)
                axes.plot(range(1, len(chunks) + 1), chunks, marker="o", markersize=3, label=variant)
            axes.set(title=label_of(key), xlabel="chunk", ylabel="seconds", ylim=(0, None))
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.suptitle(f"Time per chunk of {self.size} codes, median; {self.machine['cpu']}")
        figure.savefig(path, dpi=120)


def bench_stream(
    subject: Subject,
    *,
    lengths: Sequence[int] = LENGTHS,
    texts: Sequence[str] = (),
    size: int = STREAM_CHUNK,
    rounds: int = 3,
    options: PatchOptions,
) -> StreamResults:
    """Time streams with a known voice, patched and unpatched.

    Every round streams each length once in each variant, in alternating order, and patches anew, so that nothing is
    known of the round before.

    Args:
        subject: the model and the voice.
        lengths: how many codes the streams have.
        texts: sentences in their place, which are spoken until they end by themselves.
        size: codes per chunk.
        rounds: how many rounds.
        options: keyword arguments of `neuron_xtts.patch`.
    """
    xtts, voice = subject.prepare()
    spoken = utterances(lengths, texts)
    samples: dict[int | str, dict[str, list[Stream]]] = {
        utterance.key: {name: [] for name in VARIANTS} for utterance in spoken
    }
    results = StreamResults(machine=machine(), size=size, samples=samples, worked={})
    with tqdm(total=rounds * len(spoken) * len(VARIANTS), desc="streams", unit="stream") as bar:
        for round_, utterance in itertools.product(range(rounds), spoken):
            for variant in VARIANTS[:: 1 if round_ % 2 else -1]:
                if variant != PLAIN:
                    neuron_xtts.patch(xtts, **options)
                stream(xtts, voice, exactly(2), size=1)  # what torch, coqui-tts or a device set up once
                before = vocoded(xtts)
                results.samples[utterance.key][variant].append(stream(xtts, voice, utterance, size=size))
                if variant != PLAIN:
                    results.worked[utterance.key] = vocoded(xtts) - before
                    results.unpatch(xtts, variant)
                bar.update()
    return results


def vocoded(xtts: object) -> int:
    """Vocoder frames that graphs computed so far, halo and padding included."""
    return sum(counts.padded for counts in neuron_xtts.report(xtts).graphs.get("vocoder", {}).values())
