"""Single methods of coqui-tts over and over, with fresh inputs each time: mean and standard deviation.

By default in the sizes of the first published XTTS on inf2: 50 text tokens, 100 audio codes, 100 latents.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

import neuron_xtts
from neuron_xtts.options import PatchOptions
from neuron_xtts.tables import Table
from neuron_xtts.tools.bench import PLAIN, Benchmark, Figures, Subject, Voice, in_precision, machine

#: Makes the inputs of one call and returns the call.
MakeCall: TypeAlias = Callable[[], Callable[[], object]]

_BLOCK = 10  # iterations of one variant before it is another's turn


def make_calls(xtts: Any, voice: Voice, text: int, codes: int) -> dict[str, MakeCall]:
    """What is timed, by the name of the method.

    No input comes twice: what is known is not computed again.

    Args:
        xtts: the model, patched or not.
        voice: conditioning latents and speaker embedding.
        text: how many text tokens.
        codes: how many audio codes, and how many latents.
    """
    gpt = xtts.gpt

    def tokens() -> Tensor:
        return torch.randint(1, 60, (1, text))

    def forward() -> Callable[[], object]:
        drawn = torch.randint(0, gpt.start_audio_token, (1, codes))
        inputs = tokens(), torch.tensor([text]), drawn, torch.tensor([codes * gpt.code_stride_len])
        return lambda: gpt(*inputs, cond_latents=voice[0], return_latent=True)

    def vocode() -> Callable[[], object]:
        latents = torch.randn(1, codes, gpt.final_norm.weight.shape[0])
        return lambda: xtts.hifigan_decoder(latents, g=voice[1])

    def generate() -> Callable[[], object]:
        inputs = tokens()
        return lambda: gpt.generate(
            voice[0], inputs, do_sample=True, top_k=50, top_p=0.85, temperature=0.75, repetition_penalty=10.0,
            min_new_tokens=codes, max_new_tokens=codes,
        )  # fmt: skip

    return {"GPT.forward": forward, "vocoder": vocode, "GPT.generate": generate}


def share(name: str, iterations: int) -> int:
    """How many of ``iterations`` a method gets: generation, which takes a hundred times as long, a tenth."""
    return max(iterations // 10, 1) if name == "GPT.generate" else iterations


@dataclass(kw_only=True)
class MethodResults(Benchmark):
    """Methods by themselves, in every precision.

    Attributes:
        text: how many text tokens.
        codes: how many audio codes, and how many latents.
        samples: seconds of every iteration, by method and variant.
        warm_up: iterations before the first turn, that are not counted; before every later turn there is one.
    """

    text: int
    codes: int
    samples: dict[str, dict[str, list[float]]]
    warm_up: int

    def medians(self) -> dict[str, Figures]:
        """Mean and standard deviation in seconds, by method and variant."""
        return {
            method: {
                variant: {"mean": statistics.mean(taken), "sd": standard_deviation(taken)}
                for variant, taken in by.items()
            }
            for method, by in self.samples.items()
        }

    def tables(self) -> list[Table]:
        """A table with a row for each method."""
        found = self.medians()
        variants = list(next(iter(found.values())))
        rows: list[tuple[str, ...]] = []
        for method, by_variant in found.items():
            cells = []
            for variant, figures in by_variant.items():
                times = by_variant[PLAIN]["mean"] / figures["mean"]
                faster = "" if variant == PLAIN else f", {times:.2f}x"
                cells.append(f"{1e3 * figures['mean']:.2f} ms (sd {1e3 * figures['sd']:.2f}){faster}")
            rows.append((method, str(len(self.samples[method][PLAIN])), *cells))
        return [((f"{self.text} text tokens, {self.codes} codes", "iterations", *variants), rows)]

    def draw(self, path: Path) -> None:
        """Draw the mean of each method, with its standard deviation, into a PNG file."""
        from matplotlib.figure import Figure

        found = self.medians()
        figure = Figure(figsize=(4 * len(found), 3.6), layout="constrained")
        for axes, (method, by_variant) in zip(
            figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
        ):
            means, sds = ([1e3 * figures[kind] for figures in by_variant.values()] for kind in ("mean", "sd"))
            axes.bar(list(by_variant), means, yerr=sds, capsize=3)
            axes.set(title=method, ylabel="ms")
            axes.grid(alpha=0.3, axis="y")
        figure.suptitle(f"{self.text} text tokens, {self.codes} codes; mean and deviation; {self.machine['cpu']}")
        figure.savefig(path, dpi=120)


def standard_deviation(samples: Sequence[float]) -> float:
    """Standard deviation of samples; 0 of a single one."""
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.inference_mode()
def bench_methods(
    subject: Subject,
    *,
    text: int = 50,
    codes: int = 100,
    iterations: int = 100,
    warm_up: int = 10,
    precisions: Sequence[str],
    options: PatchOptions,
) -> MethodResults:
    """Time single methods, unpatched and in every precision, in turns of a few iterations.

    Args:
        subject: the model and the voice.
        text: how many text tokens.
        codes: how many audio codes, and how many latents.
        iterations: how often each method is timed in each variant; generation a tenth as often.
        warm_up: iterations before them that are not counted, in the first turn; in later turns there is one.
        precisions: the precisions to patch with.
        options: keyword arguments of `neuron_xtts.patch`, but for the precision.
    """
    xtts, voice = subject.prepare()
    variants = (PLAIN, *precisions)
    calls = make_calls(xtts, voice, text, codes)
    samples: dict[str, dict[str, list[float]]] = {method: {name: [] for name in variants} for method in calls}
    results = MethodResults(machine=machine(), text=text, codes=codes, samples=samples, warm_up=warm_up)
    turns = -(-iterations // _BLOCK)
    with tqdm(total=turns * len(variants), desc="turns", unit="turn") as bar:
        for turn in range(turns):
            for variant in variants[:: 1 if turn % 2 else -1]:
                if variant != PLAIN:
                    neuron_xtts.patch(xtts, **in_precision(options, variant))
                for method, make in calls.items():
                    taken = results.samples[method][variant]
                    for _ in range(share(method, warm_up) if turn == 0 else 1):
                        make()()
                    count = min(share(method, _BLOCK), share(method, iterations) - len(taken))
                    taken += [_seconds(make()) for _ in range(count)]
                if variant != PLAIN:
                    results.unpatch(xtts, variant)
                bar.update()
    return results
