"""Benchmarks: patched against unpatched coqui-tts, in turns, in one process.

Whatever else the machine does at a moment hits neighbouring measurements alike, so ratios of medians of interleaved
rounds mean something on a noisy machine where seconds alone do not.
"""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

import neuron_xtts
from neuron_xtts.backends.host.kernels import cpu_has
from neuron_xtts.coqui.models import SENTENCES, load_or_make
from neuron_xtts.coqui.recordings import check_recording, write_reference
from neuron_xtts.options import PatchOptions
from neuron_xtts.report import Report
from neuron_xtts.tables import Table, markdown, table

PLAIN = "coqui-tts"  # the variant that is not patched

#: Instruction sets, as Linux names them, by which int8 and the vocoder of bf16 and int8 choose what they compute in.
_CHOSEN_BY = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16")

#: Conditioning latents (1, N, D) and a speaker embedding (1, G, 1).
Voice: TypeAlias = tuple[Tensor, Tensor]
#: Figures by name, by variant.
Figures: TypeAlias = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, and the voice that it speaks in.

    Attributes:
        checkpoint: the folder of a real XTTS v2 checkpoint; None for random weights.
        small: a small model instead of one of full size, if the weights are random.
        speaker_wav: a recording of the voice; None for a tone.
    """

    checkpoint: Path | None = None
    small: bool = False
    speaker_wav: Path | None = None

    def prepare(self) -> tuple[Any, Voice]:
        """The ``Xtts``, and its voice."""
        if self.speaker_wav is not None:
            check_recording(self.speaker_wav)
        xtts = load_or_make(self.checkpoint, self.small).synthesizer.tts_model
        with tempfile.TemporaryDirectory() as folder:
            tone = Path(folder) / "reference.wav"
            if self.speaker_wav is None:
                write_reference(tone)
            latents, speaker = xtts.get_conditioning_latents(str(self.speaker_wav or tone))
        return xtts, (latents, speaker)


@dataclass(frozen=True)
class Utterance:
    """A sentence to measure.

    Attributes:
        text: what is said.
        codes: how many codes it has exactly, whatever the weights; None if it ends by itself.
    """

    text: str
    codes: int | None = None

    @property
    def key(self) -> int | str:
        """What it is called in results: its codes, or its text."""
        return self.text if self.codes is None else self.codes

    @property
    def arguments(self) -> dict[str, int]:
        """Keyword arguments of ``Xtts.inference``."""
        return {} if self.codes is None else {"min_new_tokens": self.codes, "max_new_tokens": self.codes}


def label_of(key: int | str) -> str:
    """What the sentence with this `Utterance.key` is called in tables."""
    return key if isinstance(key, str) else f"{key} codes"


def exactly(codes: int) -> Utterance:
    """A sentence that is made to have so many codes."""
    return Utterance(SENTENCES[0], codes)


def utterances(lengths: Sequence[int], texts: Sequence[str]) -> tuple[Utterance, ...]:
    """Texts that end by themselves if there are any, else a sentence of each length in codes.

    Raises:
        ValueError: one is there twice, of which the second would be known by then.
    """
    spoken = tuple(map(Utterance, texts) if texts else map(exactly, lengths))
    for key, times in Counter(utterance.key for utterance in spoken).items():
        if times > 1:
            raise ValueError(f"{label_of(key)!r} is there {times} times; leave it in once")
    return spoken


@dataclass(kw_only=True)
class Results:
    """What a benchmark or a judgement found.

    Attributes:
        machine: what the figures depend on, as `machine` returns it.
        fallbacks: calls that coqui-tts served in place of graphs, by route and reason, by variant.
    """

    machine: dict[str, str | int]
    fallbacks: dict[str, dict[str, int]] = field(default_factory=dict)

    def tables(self) -> list[Table]:
        """Tables of the figures that matter, for reading."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n\n".join(table(*figures) for figures in self._all_tables())

    def markdown(self) -> str:
        """Every table in Markdown; ``str`` has them as text."""
        return "\n\n".join(markdown(*figures) for figures in self._all_tables()) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """All samples, and the figures made of them, as plain data."""
        return asdict(self)

    def unpatch(self, xtts: object, variant: str) -> None:
        """Unpatch ``xtts``, and note what fell back while it was patched as ``variant``."""
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


@dataclass(kw_only=True)
class Benchmark(Results):
    """What a benchmark measured."""

    def __post_init__(self) -> None:
        self._reports: dict[str, Report] = {}  # no field: samples do not have it

    def medians(self) -> dict[int | str, Figures] | dict[str, Figures]:
        """The figures that matter, for programs: by what was measured, then by variant."""
        raise NotImplementedError

    def draw(self, path: Path) -> None:
        """Draw the figures that matter into a PNG file."""
        raise NotImplementedError

    def unpatch(self, xtts: object, variant: str) -> None:
        """Unpatch ``xtts``, and keep the report with the longest timeline of each variant."""
        report = neuron_xtts.report(xtts)
        if variant not in self._reports or report.timeline.seconds > self._reports[variant].timeline.seconds:
            self._reports[variant] = report
        super().unpatch(xtts, variant)

    def draw_timelines(self, path: Path) -> list[Path]:
        """Draw what utterances were at, for each variant that was patched, beside the PNG file of `draw`.

        Returns:
            the files, such as ``bench-timeline-int8.png`` of ``bench.png``.
        """
        files = {path.with_name(f"{path.stem}-timeline-{name}{path.suffix}"): name for name in self._reports}
        for file, name in files.items():
            self._reports[name].plot(file)
        return list(files)

    def to_dict(self) -> dict[str, Any]:
        """All samples, and the medians, as plain data."""
        return super().to_dict() | {"medians": self.medians()}


def machine() -> dict[str, str | int]:
    """What figures depend on: the CPU and its instruction sets, threads, and versions."""
    packages = ("torch", "coqui-tts", "transformers", "neuron-xtts")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "instructions": ", ".join([torch.backends.cpu.get_cpu_capability(), *filter(cpu_has, _CHOSEN_BY)]),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def in_precision(options: PatchOptions, precision: str) -> PatchOptions:
    """The same options of `neuron_xtts.patch`, with a precision."""
    return {**options, "precision": precision}
