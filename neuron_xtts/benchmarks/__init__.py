"""Benchmarks: patched against unpatched coqui-tts, in turns, in one process.

Whatever else the machine does at a moment hits neighbouring measurements alike, so ratios of medians of interleaved
rounds mean something on a noisy machine where seconds alone do not.
"""

from __future__ import annotations

import platform
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import neuron_xtts
from neuron_xtts.demo import load_or_make, write_reference
from neuron_xtts.report import Table, markdown, table

PLAIN = "coqui-tts"


@dataclass(kw_only=True)
class Results:
    """What a benchmark found.

    Attributes:
        machine: see `machine`.
        fallbacks: calls that coqui-tts served in place of graphs, by route and reason, by variant.
    """

    machine: dict[str, Any]
    fallbacks: dict[str, dict[str, int]] = field(default_factory=dict)

    def tables(self) -> list[Table]:
        """The figures that matter, for reading."""
        raise NotImplementedError

    def medians(self) -> dict[Any, Any]:
        """The figures that matter, for programs."""
        raise NotImplementedError

    def draw(self, path: Path) -> None:
        """Write a PNG."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n\n".join(table(*figures) for figures in self._all_tables())

    def markdown(self) -> str:
        """As ``str``, in Markdown."""
        return "\n\n".join(markdown(*figures) for figures in self._all_tables()) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """All samples, and the figures made of them, as plain data."""
        return asdict(self) | {"medians": self.medians()}

    def unpatch(self, xtts: Any, variant: str) -> None:
        """Unpatch, and note what fell back."""
        noted = self.fallbacks.setdefault(variant, {})
        for route, counts in neuron_xtts.report(xtts).routes.items():
            for reason, calls in counts.fallbacks.items():
                noted[f"{route}: {reason}"] = noted.get(f"{route}: {reason}", 0) + calls
        neuron_xtts.unpatch(xtts)

    def _all_tables(self) -> list[Table]:
        tables = self.tables()
        rows = [(variant, reason, str(calls)) for variant, by in self.fallbacks.items() for reason, calls in by.items()]
        if rows:
            tables.append((("fell back to coqui-tts", "because", "calls"), rows))
        return [*tables, (("machine", ""), [(name, str(value)) for name, value in self.machine.items()])]


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
