"""Whole sentences: seconds by stage in every precision, peak memory, and what a precision costs in accuracy."""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import neuron_xtts
from neuron_xtts.benchmarks import PLAIN, machine, prepare
from neuron_xtts.demo import SENTENCES, Stopwatch
from neuron_xtts.precision import HOST, WEIGHT_BYTES, Precision
from neuron_xtts.report import table
from neuron_xtts.verification import correlation

STAGES = ("codes", "latents", "vocoder")
RELEASED = " released"  # what a variant is called whose fp32 weights are not kept in memory


def speak(xtts: Any, voice: tuple[Any, Any], codes: int) -> dict[str, float]:
    """Seconds of one sentence of ``codes`` codes, by stage, and the median time from one code to the next."""
    ticks: list[float] = []
    # Every code is embedded once, patched or not.
    hook = xtts.gpt.mel_embedding.register_forward_hook(lambda *_: ticks.append(time.perf_counter()))
    torch.manual_seed(1)
    try:
        with Stopwatch(xtts) as stopwatch:
            start = time.perf_counter()
            xtts.inference(SENTENCES[0], "en", *voice, min_new_tokens=codes, max_new_tokens=codes)
            seconds = time.perf_counter() - start
    finally:
        hook.remove()
    stages = {stage: stopwatch.seconds[stage] for stage in STAGES}
    one_code = statistics.median(b - a for a, b in itertools.pairwise(ticks[1:codes]))
    return {"sentence": seconds, **stages, "one code": one_code}


def bandwidth() -> float:
    """Bytes a second that all threads together read of memory that no cache holds."""
    data = torch.ones(2**27)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / statistics.median(seconds)


@dataclass
class Accuracy:
    """How far a precision is from coqui-tts, teacher-forced on coqui-tts's own codes.

    Attributes:
        latents: Pearson correlation of the latents.
        snr: of the waveform, in dB.
        spectrum: Pearson correlation of the magnitudes of its short-time Fourier transform (1024 points, hop 256).
        vocoder_snr: as ``snr``, of the vocoder alone, given coqui-tts's latents.
    """

    latents: float
    snr: float
    spectrum: float
    vocoder_snr: float


def snr(ours: Tensor, theirs: Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    return float(20 * torch.log10(theirs.norm() / (ours - theirs).norm().clamp_min(1e-30)))


def magnitudes(wave: Tensor) -> Tensor:
    """Of the short-time Fourier transform."""
    return torch.stft(wave.flatten(), 1024, 256, window=torch.hann_window(1024), return_complex=True).abs()


@torch.inference_mode()
def accuracy(xtts: Any, voice: tuple[Any, Any], codes: int, options: Mapping[str, Any]) -> Accuracy:
    """Compare a patch with ``options`` with coqui-tts.

    Args:
        xtts: unpatched.
        voice: conditioning latents and speaker embedding.
        codes: how many.
        options: of `neuron_xtts.patch`.
    """
    text = torch.tensor(xtts.tokenizer.encode(SENTENCES[0].lower(), lang="en"))[None]
    torch.manual_seed(1)
    drawn = xtts.gpt.generate(
        voice[0], text, do_sample=True, top_k=50, top_p=0.85, temperature=0.75, repetition_penalty=10.0,
        min_new_tokens=codes, max_new_tokens=codes,
    )  # fmt: skip
    lengths = torch.tensor([text.shape[1]]), torch.tensor([drawn.shape[1] * xtts.gpt.code_stride_len])

    def forward() -> Tensor:
        latents: Tensor = xtts.gpt(text, lengths[0], drawn, lengths[1], cond_latents=voice[0], return_latent=True)
        return latents

    theirs = forward()
    wave = xtts.hifigan_decoder(theirs, g=voice[1])
    with neuron_xtts.patched(xtts, **options):
        ours = forward()
        our_wave, vocoded = (xtts.hifigan_decoder(latents, g=voice[1]) for latents in (ours, theirs))
    spectrum = correlation(magnitudes(our_wave), magnitudes(wave))
    return Accuracy(correlation(ours, theirs), snr(our_wave, wave), spectrum, snr(vocoded, wave))


def peak_memory(precision: str, codes: int, small: bool) -> int:
    """Bytes that a process of its own holds at most while it speaks, counted from when the model is loaded."""
    command = [sys.executable, "-m", __name__, precision, str(codes), "small" if small else "full"]
    return int(subprocess.run(command, capture_output=True, check=True).stdout.split()[-1])


def _speak_and_print_peak(precision: str, codes: int, small: bool) -> None:
    xtts, voice = prepare(None, small)
    # Making and loading the model needs more: give back what is free, and forget the peak so far.
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    if precision != PLAIN:
        name, released, _ = precision.partition(RELEASED)
        neuron_xtts.patch(xtts, backend="cpu", precision=Precision(name, release=bool(released)))
    for _ in range(2):
        speak(xtts, voice, codes)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024)


@dataclass
class SentenceResults:
    """Sentences of several lengths, in every precision.

    Attributes:
        machine: see `machine`.
        samples: seconds by stage, by number of codes and variant, one a round.
        patching: seconds that `patch` took, by precision, one a sentence.
        accuracy: by precision.
        memory: peak, in bytes, by variant.
        bandwidth: bytes a second that all threads read of memory that no cache holds, one a round.
        weights: bytes of weights that a decode step reads, by precision on the host.
    """

    machine: dict[str, Any]
    samples: dict[int, dict[str, list[dict[str, float]]]]
    patching: dict[str, list[float]]
    accuracy: dict[str, Accuracy]
    memory: dict[str, int]
    bandwidth: list[float]
    weights: dict[str, int]

    def medians(self, codes: int, variant: str) -> dict[str, float]:
        """Seconds by stage, and the RTF."""
        taken = self.samples[codes][variant]
        result = {stage: statistics.median(sample[stage] for sample in taken) for stage in taken[0]}
        return result | {"RTF": result["sentence"] / (codes * 1024 / 22050)}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        medians = {
            codes: {variant: self.medians(codes, variant) for variant in variants}
            for codes, variants in self.samples.items()
        }
        return asdict(self) | {"medians": medians}

    def __str__(self) -> str:
        tables = [self._speed(codes) for codes in self.samples]
        rows = [
            (name, f"{a.latents:.6f}", f"{a.snr:.1f} dB", f"{a.spectrum:.6f}", f"{a.vocoder_snr:.1f} dB",
             f"{statistics.median(self.patching[name]):.1f} s")
            for name, a in self.accuracy.items()
        ]  # fmt: skip
        tables.append(table(("precision", "latents PCC", "SNR", "STFT PCC", "SNR of vocoder", "patch"), rows))
        if self.memory:
            rows_ = [(name, f"{size / 2**20:.0f} MiB", f"{size / self.memory[PLAIN] - 1:+.1%}")
                     for name, size in self.memory.items()]  # fmt: skip
            tables.append(table(("peak memory", "", "against coqui-tts"), rows_))
        tables.append(f"memory is read at {statistics.median(self.bandwidth) / 1e9:.1f} GB/s")
        return "\n\n".join(tables)

    def _speed(self, codes: int) -> str:
        plain = self.medians(codes, PLAIN)
        rows: list[tuple[str, ...]] = []
        for variant in self.samples[codes]:
            found = self.medians(codes, variant)
            cells = [f"{1e3 * found[stage]:.0f} ms" for stage in ("sentence", *STAGES)]
            cells += [f"{1e3 * found['one code']:.1f} ms", f"{found['RTF']:.2f}"]
            cells.append(f"{plain['sentence'] / found['sentence']:.2f}x")
            limit = self.weights.get(variant, 0) / statistics.median(self.bandwidth)
            rows.append((variant, *cells, f"{found['one code'] / limit:.2f}" if limit else ""))
        seconds = codes * 1024 / 22050
        return table(
            (
                f"{codes} codes, {seconds:.2f} s",
                "sentence",
                *STAGES,
                "one code",
                "RTF",
                "faster",
                "code / reading weights",
            ),
            rows,
        )

    def draw(self, path: Path) -> None:
        """Write a PNG of the real-time factor against the length."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for variant in next(iter(self.samples.values())):
            factors = [self.medians(codes, variant)["RTF"] for codes in self.samples]
            axes.plot(list(self.samples), factors, marker="o", label=variant)
        axes.axhline(1, color="gray", linewidth=0.8, linestyle="dashed")
        axes.set(title=f"One sentence; {self.machine['cpu']}", xlabel="codes", ylabel="RTF", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)


def bench_sentence(
    *,
    lengths: Sequence[int] = (50, 100, 200, 400),
    rounds: int = 3,
    precisions: Sequence[str],
    small: bool = False,
    checkpoint: Path | None = None,
    memory: bool = True,
    options: Mapping[str, Any],
) -> SentenceResults:
    """Time sentences with a known voice, unpatched and in every precision.

    Args:
        lengths: of the sentences, in codes.
        rounds: each speaks every length in every variant once, in alternating order.
        precisions: to patch with.
        small: as for `demo.run`.
        checkpoint: as for `demo.run`.
        memory: on the host: measure peak memory, too, in processes of their own (of random weights).
        options: of `neuron_xtts.patch`, but for the precision.
    """
    xtts, voice = prepare(checkpoint, small)
    variants = (PLAIN, *precisions)
    trunk = sum(parameter.numel() for parameter in xtts.gpt.gpt.h.parameters() if parameter.ndim == 2)
    sizes = {name: trunk * WEIGHT_BYTES[precision.linears] for name, precision in HOST.items()}
    results = SentenceResults(
        machine=machine(),
        samples={codes: {name: [] for name in variants} for codes in lengths},
        patching={name: [] for name in precisions},
        accuracy={},
        memory={},
        bandwidth=[],
        weights={PLAIN: sizes["fp32"], **sizes} if memory else {},
    )
    with tqdm(total=rounds * len(lengths) * len(variants), desc="sentences", unit="sentence") as bar:
        for round_ in range(rounds):
            results.bandwidth.append(bandwidth())
            for variant in variants[:: 1 if round_ % 2 else -1]:
                if variant != PLAIN:
                    start = time.perf_counter()
                    neuron_xtts.patch(xtts, **options, precision=variant)
                    results.patching[variant].append(time.perf_counter() - start)
                speak(xtts, voice, 4)  # what torch, coqui-tts or a device set up once
                for codes in lengths:
                    results.samples[codes][variant].append(speak(xtts, voice, codes))
                    bar.update()
                neuron_xtts.unpatch(xtts)
    for name in precisions:
        results.accuracy[name] = accuracy(xtts, voice, 100, {**options, "precision": name})
    if memory and checkpoint is None:
        released = [name + RELEASED for name in precisions if HOST[name].linears != "fp32"]
        results.memory = {name: peak_memory(name, min(lengths), small) for name in (*variants, *released)}
    return results


if __name__ == "__main__":
    _speak_and_print_peak(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "small")
