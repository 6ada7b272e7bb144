"""Benchmarks: patched against unpatched coqui-tts, in turns, in one process.

Whatever else the machine does at a moment hits neighbouring measurements alike, so ratios of medians of interleaved
rounds mean something on a noisy machine where seconds alone do not.
"""

from __future__ import annotations

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from neuron_xtts.demo import load_or_make, write_reference

PLAIN = "coqui-tts"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("torch", "coqui-tts", "transformers", "neuron-xtts")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def prepare(checkpoint: Path | None, small: bool) -> tuple[Any, tuple[Any, Any]]:
    """An ``Xtts`` and a voice."""
    xtts = load_or_make(checkpoint, small).synthesizer.tts_model
    with tempfile.TemporaryDirectory() as folder:
        write_reference(Path(folder) / "reference.wav")
        return xtts, xtts.get_conditioning_latents(str(Path(folder) / "reference.wav"))
