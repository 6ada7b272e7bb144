"""Gates: limits that a judgement must keep, such as ``int8 wer - fp32 <= 0.02``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from neuron_xtts.tools.judge.intervals import Estimate

_GATE = re.compile(
    r"\s*(?:(?P<variant>\S+)\s+)?(?P<metric>[a-z-]*[a-z](?:/[^\s<>]+)?)(?:\s+-\s+(?P<baseline>[^\s<>]+))?"
    r"\s*(?P<operator><=|>=)\s*(?P<limit>-?\d*\.?\d+(?:e-?\d+)?)\s*"
)


@dataclass(frozen=True)
class Gate:
    """A limit.

    Attributes:
        text: as it was written.
        variant: whose figure it is; None for every variant that the model spoke.
        metric: the figure; without what stands behind its slash, it stands for each of that name.
        baseline: the variant from which the difference is taken; None for the figure itself.
        at_most: whether the limit is the largest value that passes, or the smallest.
        limit: the limit.
        by_interval: whether the whole 95 % interval must be within the limit, or only the figure.
    """

    text: str
    variant: str | None
    metric: str
    baseline: str | None
    at_most: bool
    limit: float
    by_interval: bool

    @classmethod
    def parse(cls, text: str, *, by_interval: bool = False) -> Gate:
        """Read ``[VARIANT] METRIC [- BASELINE] <= NUMBER``, or ``>=``.

        Raises:
            ValueError: it is something else.
        """
        found = _GATE.fullmatch(text)
        if found is None:
            raise ValueError(
                f"{text!r} is no gate; expected [VARIANT] METRIC [- BASELINE] <= NUMBER, or >=, such as "
                "'wer <= 0.2' or 'int8 wer - fp32 <= 0.02', where 0.2 is 20 %"
            )
        if found["variant"] and found["variant"] == found["baseline"]:
            raise ValueError(f"{text!r} compares {found['variant']} with itself; name another baseline")
        return cls(
            text.strip(),
            found["variant"],
            found["metric"],
            found["baseline"],
            found["operator"] == "<=",
            float(found["limit"]),
            by_interval,
        )

    def variants(self, spoken: Sequence[str]) -> list[str]:
        """Those whose figures it is about, if the model speaks these."""
        return [self.variant] if self.variant else [variant for variant in spoken if variant != self.baseline]

    def means(self, metric: str) -> bool:
        """Whether it is about a metric, such as ``wer/whisper``."""
        return self.metric in (metric, metric.partition("/")[0])

    def passes(self, estimate: Estimate) -> bool:
        """Whether a figure, or its interval, is within the limit."""
        if self.at_most:
            return (estimate.high if self.by_interval else estimate.value) <= self.limit
        return (estimate.low if self.by_interval else estimate.value) >= self.limit


@dataclass(frozen=True)
class Verdict:
    """What a gate says of one figure.

    Attributes:
        gate: as it was written.
        by_interval: whether the interval was judged.
        variant: whose figure it is.
        metric: the figure.
        estimate: its value, or the difference, with its interval; None if nothing of it was measured, which fails.
        passed: whether it is within the limit.
    """

    gate: str
    by_interval: bool
    variant: str
    metric: str
    estimate: Estimate | None
    passed: bool
