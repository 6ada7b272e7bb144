"""What a judgement found: samples, figures with intervals, differences, verdicts; as tables and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from neuron_xtts.tables import Table
from neuron_xtts.tools.bench import PLAIN, Results
from neuron_xtts.tools.judge.gates import Gate, Verdict
from neuron_xtts.tools.judge.intervals import Estimate, Sums, difference, estimate

ESPEAK = "espeak-ng"  # the control that speaks
SHUFFLED = "shuffled"  # the control that is coqui-tts's speech, judged by the texts of other sentences

#: Figures, and whether they are shown in percent, or else with how many decimals. A figure that there is several times
#: has a slash and which one it is behind its name: the recognizer, or the voice.
METRICS: dict[str, int | None] = {
    "wer": None,  # word errors by words
    "cer": None,  # character errors by characters
    "similarity": 3,  # cosine of the speaker embeddings of speech and recording
    "wrong-voice": None,  # sentences that are more similar to another voice's recording
    "length": 3,  # seconds by those of espeak-ng, or of coqui-tts
    "stopped": None,  # sentences that ended by themselves
    "same-codes": None,  # sentences with the codes that coqui-tts spoke
    "agreement": None,  # codes of coqui-tts for which the most probable next one is the same
    "latents": 6,  # Pearson correlation with the latents of coqui-tts, of the same codes
}


@dataclass
class Sample:
    """One sentence, spoken once.

    Attributes:
        sentence: its number, from 0.
        voice: the name of the recording whose voice it is in.
        seed: of the codes that were drawn; espeak-ng draws nothing, and says the same with every seed.
        heard: what each recognizer heard.
        ratios: numerator and denominator of each figure, by name; of its own voice only.
    """

    sentence: int
    voice: str
    seed: int
    heard: dict[str, str]
    ratios: dict[str, tuple[float, float]]


@dataclass(kw_only=True)
class JudgeResults(Results):
    """What a judgement found.

    Attributes:
        judged: what was judged and how, in plain data: checkpoint and digest of its weights, recordings, options.
        texts: the sentences.
        samples: by variant: the controls, coqui-tts, and every precision.
        baseline: the variant from which differences are taken.
        notes: what a reader must know, such as that a control is missing.
        verdicts: of the gates.
    """

    judged: dict[str, Any] = field(default_factory=dict)
    texts: Sequence[str]
    samples: dict[str, list[Sample]]
    baseline: str = PLAIN
    notes: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every gate was passed."""
        return all(verdict.passed for verdict in self.verdicts)

    @property
    def spoken(self) -> list[str]:
        """The variants that the model spoke."""
        return [variant for variant in self.samples if variant not in (ESPEAK, SHUFFLED)]

    def metrics(self, *variants: str) -> list[str]:
        """Names of the figures that all of some variants have, or that any has if none is given."""
        every = {variant: self._names(variant) for variant in variants or self.samples}
        kept = set.intersection(*every.values()) if variants else set.union(*every.values())
        order = list(METRICS)
        return sorted(kept, key=lambda name: (order.index(name.partition("/")[0]), name))

    def estimate(self, variant: str, metric: str) -> Estimate:
        """A figure of a variant, with its interval over the sentences."""
        return estimate(self._sums(variant, metric))

    def difference(self, variant: str, metric: str, baseline: str) -> Estimate:
        """How much larger a figure is than that of another variant, of the same sentences."""
        return difference(self._sums(variant, metric), self._sums(baseline, metric))

    def check(self, gates: Sequence[Gate]) -> None:
        """Judge by gates, each of every figure that it is about; one of which nothing was measured fails."""
        for gate in gates:
            verdicts = [
                self._verdict(gate, variant, metric)
                for variant in gate.variants(self.spoken)
                for metric in filter(gate.means, self._tried(variant, gate.baseline or variant))
            ]
            nothing = Verdict(gate.text, gate.by_interval, gate.variant or "all", gate.metric, None, False)
            self.verdicts += verdicts or [nothing]

    def to_dict(self) -> dict[str, Any]:
        """All samples, and the figures made of them, as plain data."""
        figures = {
            variant: {metric: asdict(self.estimate(variant, metric)) for metric in self.metrics(variant)}
            for variant in self.samples
        }
        differences = {
            variant: {
                metric: asdict(self.difference(variant, metric, self.baseline))
                for metric in self.metrics(variant, self.baseline)
            }
            for variant in self._compared
        }
        return super().to_dict() | {"figures": figures, "differences": differences, "passed": self.passed}

    def tables(self) -> list[Table]:
        """Figures, differences from the baseline, verdicts and notes."""
        tables = [
            self._table(f"{len(self.texts)} sentences, 95 % intervals", list(self.samples), self.metrics(), None),
            self._table(
                f"difference from {self.baseline}, paired",
                self._compared,
                self.metrics(self.baseline),
                self.baseline,
            ),
        ]
        if self.verdicts:
            tables.append(self._verdicts())
        if self.notes:
            tables.append((("note",), [(note,) for note in self.notes]))
        return tables

    @property
    def _compared(self) -> list[str]:
        return [variant for variant in self.samples if variant not in (self.baseline, SHUFFLED)]

    def _tried(self, *variants: str) -> list[str]:
        """Names of the figures that all of some variants were judged by, whether there is anything of them or not."""
        every = [{name for sample in self.samples[variant] for name in sample.ratios} for variant in variants]
        return sorted(set.intersection(*every))

    def _verdict(self, gate: Gate, variant: str, metric: str) -> Verdict:
        measured = metric in self.metrics(variant, gate.baseline or variant)
        found = self._figure(variant, metric, gate.baseline) if measured else None
        return Verdict(gate.text, gate.by_interval, variant, metric, found, found is not None and gate.passes(found))

    def _figure(self, variant: str, metric: str, baseline: str | None) -> Estimate:
        return self.difference(variant, metric, baseline) if baseline else self.estimate(variant, metric)

    def _sums(self, variant: str, metric: str) -> Sums:
        sums = np.zeros((2, len(self.texts)))
        for sample in self.samples[variant]:
            sums[:, sample.sentence] += sample.ratios.get(metric, (0, 0))
        return Sums(*sums)

    def _table(self, label: str, variants: Sequence[str], metrics: Sequence[str], baseline: str | None) -> Table:
        """A row for each figure, or its difference from that of a baseline, and a column for each variant."""

        def cell(variant: str, metric: str) -> str:
            if metric not in self._names(variant):
                return ""
            return _show(metric, self._figure(variant, metric, baseline), sign="+" if baseline else "")

        return (label, *variants), [(metric, *(cell(variant, metric) for variant in variants)) for metric in metrics]

    def _verdicts(self) -> Table:
        rows = [
            (
                verdict.gate + (" (interval)" if verdict.by_interval else ""),
                verdict.variant,
                verdict.metric,
                _show(verdict.metric, verdict.estimate) if verdict.estimate else "nothing was measured",
                "passed" if verdict.passed else "FAILED",
            )
            for verdict in self.verdicts
        ]
        return ("gate", "variant", "figure", "found", ""), rows

    def _names(self, variant: str) -> set[str]:
        """Figures that there is anything of: in silence there is no length, for one."""
        return {name for sample in self.samples[variant] for name, (_, of) in sample.ratios.items() if of}


def _show(metric: str, found: Estimate, sign: str = "") -> str:
    """A figure and its interval, if that has any width: ``18.1 % (15.0 to 21.3)``."""
    decimals = METRICS[metric.partition("/")[0]]
    scale, unit, decimals = (100, " %", 1) if decimals is None else (1, "", decimals)
    value, low, high = (f"{scale * number:{sign}.{decimals}f}" for number in (found.value, found.low, found.high))
    return f"{value}{unit}" + (f" ({low} to {high})" if found.low < found.high else "")
