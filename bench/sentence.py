"""One sentence, unpatched against patched: seconds by stage, one code, memory, and the cost of a patch without graphs.

Full size, random weights, fp32. Every round runs each variant once, in one process, and each figure is the median over
the rounds, so that a slow moment of the machine hits all variants alike. Memory is the peak of a process that runs
nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import neuron_xtts
from neuron_xtts import BucketPlan
from neuron_xtts.demo import SENTENCES, Stopwatch, random_tts, write_reference
from neuron_xtts.report import table

VARIANTS = ("plain", "patched")


def prepare(small: bool) -> tuple[Any, tuple[Any, Any]]:
    """The model and a voice."""
    with tempfile.TemporaryDirectory() as folder:
        xtts = random_tts(Path(folder), small=small).synthesizer.tts_model
        write_reference(Path(folder) / "reference.wav")
        return xtts, xtts.get_conditioning_latents(str(Path(folder) / "reference.wav"))


def speak(xtts: Any, voice: tuple[Any, Any], codes: int) -> dict[str, float]:
    """Seconds of one sentence of ``codes`` codes, by stage, and the median time between two codes."""
    ticks: list[float] = []
    hook = xtts.gpt.final_norm.register_forward_hook(lambda *_: ticks.append(time.perf_counter()))
    torch.manual_seed(1)
    with Stopwatch(xtts) as stopwatch:
        start = time.perf_counter()
        xtts.inference(SENTENCES[0], "en", *voice, min_new_tokens=codes, max_new_tokens=codes)
        seconds = time.perf_counter() - start
    hook.remove()
    one_code = statistics.median(b - a for a, b in itertools.pairwise(ticks[:codes]))
    stages = {stage: stopwatch.seconds[stage] for stage in ("codes", "latents", "vocoder")}
    return {"sentence": seconds, **stages, "one code": one_code}


@torch.inference_mode()
def latents(xtts: Any, voice: tuple[Any, Any], codes: int) -> float:
    """Seconds of ``GPT.forward`` for codes that were not generated, so that nothing can be handed over."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, 60, (1, 50), generator=generator)
    audio = torch.randint(0, 1024, (1, codes), generator=generator)
    lengths = torch.tensor([codes * 1024])
    start = time.perf_counter()
    xtts.gpt(text, torch.tensor([50]), audio, lengths, cond_latents=voice[0], return_latent=True)
    return time.perf_counter() - start


def peak_memory(variant: str, arguments: argparse.Namespace) -> int:
    """Bytes of memory that a process holds at most while it speaks twice in one variant, after the model is loaded."""
    command = [sys.executable, __file__, "--peak", variant, "--codes", str(arguments.codes)]
    output = subprocess.run([*command, *(["--small"] if arguments.small else [])], capture_output=True, check=True)
    return int(output.stdout.split()[-1])


def speak_and_print_peak(arguments: argparse.Namespace) -> None:
    """What the process of `peak_memory` does."""
    xtts, voice = prepare(arguments.small)
    if arguments.peak == "patched":
        neuron_xtts.patch(xtts)
    # Making and loading the model needs more: give back what is free, and forget the peak so far.
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        speak(xtts, voice, arguments.codes)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024)


def overhead(rounds: int = 300) -> float:
    """Seconds that a patch without graphs adds to one call: the median difference over a call of 2 ms."""
    xtts, voice = prepare(small=True)
    x = torch.randn(1, 1, 64)
    seconds: dict[str, list[float]] = {"plain": [], "no graphs": []}
    with torch.inference_mode():
        for _ in range(rounds):
            for variant, samples in seconds.items():
                if variant != "plain":
                    neuron_xtts.patch(xtts, buckets=BucketPlan.none())
                    xtts.hifigan_decoder(x, g=voice[1])  # the first fallback is logged
                start = time.perf_counter()
                xtts.hifigan_decoder(x, g=voice[1])
                samples.append(time.perf_counter() - start)
                neuron_xtts.unpatch(xtts)
    return statistics.median(b - a for a, b in zip(seconds["plain"], seconds["no graphs"], strict=True))


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()

    if arguments.peak:
        speak_and_print_peak(arguments)
        return

    xtts, voice = prepare(arguments.small)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for round_ in range(arguments.rounds + 1):
        for name in VARIANTS[:: 1 if round_ % 2 else -1]:  # in turns, should one leave the machine worse off
            if name == "patched":
                neuron_xtts.patch(xtts)
            sample = speak(xtts, voice, arguments.codes)
            sample["latents, not handed over"] = latents(xtts, voice, arguments.codes)
            neuron_xtts.unpatch(xtts)
            if round_:  # the first is a warm-up
                samples[name].append(sample)
    medians = {
        name: {stage: statistics.median(sample[stage] for sample in taken) for stage in taken[0]}
        for name, taken in samples.items()
    }
    audio = arguments.codes * 1024 / 22050
    memory = {name: peak_memory(name, arguments) for name in ("plain", "patched")}
    per_call = overhead()

    plain, patched = (medians[name] for name in VARIANTS)
    rows = [
        (
            stage,
            f"{1e3 * plain[stage]:.1f} ms",
            f"{1e3 * patched[stage]:.1f} ms",
            f"{plain[stage] / patched[stage]:.2f}x",
        )
        for stage in plain
    ]
    rows.append(("RTF", f"{plain['sentence'] / audio:.2f}", f"{patched['sentence'] / audio:.2f}", ""))
    growth = memory["patched"] / memory["plain"] - 1
    rows.append(("peak memory", *(f"{memory[name] / 2**20:.0f} MiB" for name in memory), f"{growth:+.1%}"))
    print(table((f"{arguments.codes} codes", "coqui-tts", "neuron_xtts", ""), rows))
    share = 3 * per_call / plain["sentence"]
    print(f"\na patch without graphs: {1e6 * per_call:.0f} us a call, {share:.4%} of a sentence (three calls)")
    if arguments.json:
        packages = ("torch", "coqui-tts", "transformers")
        machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        result = {
            "machine": machine | {name: version(name) for name in packages},
            "codes": arguments.codes,
            "rounds": arguments.rounds,
            "medians": medians,
            "peak_memory": memory,
            "overhead_per_call": per_call,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
