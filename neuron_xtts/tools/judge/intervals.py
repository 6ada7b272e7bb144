"""Ratios over sentences, and paired differences of them, with bootstrap intervals.

Every figure of a judgement is a ratio of sums: errors by words, sentences that stopped by sentences. The sentences are
what is resampled: all that was spoken of one, with every seed and in every voice, is drawn together, because a sentence
that is hard once is hard again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

#: Times the sentences are drawn anew, and the share of outcomes that an interval holds. Choices of ours.
RESAMPLES = 5000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval.

    Attributes:
        value: of all sentences.
        low: the lower end of the 95 % interval, by the percentiles of the bootstrap.
        high: the upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Sums:
    """Numerators and denominators, (N,) each, by sentence."""

    numerators: Array
    denominators: Array

    @property
    def ratio(self) -> float:
        """Of all sentences."""
        return float(self.numerators.sum() / self.denominators.sum())

    def resampled(self) -> Array:
        """Ratios (`RESAMPLES`,) of sentences that are drawn with replacement, the same ones for every `Sums`."""
        counts = _counts(len(self.numerators))
        with np.errstate(invalid="ignore"):  # a draw may have no sentence with such a figure
            ratios: Array = (counts @ self.numerators) / (counts @ self.denominators)
        return ratios


def estimate(sums: Sums) -> Estimate:
    """The ratio of all sentences, with its interval."""
    return _estimate(sums.ratio, sums.resampled())


def difference(ours: Sums, theirs: Sums) -> Estimate:
    """How much larger ``ours`` is than ``theirs``, with the interval of the difference.

    It is paired: both are of the same sentences, (N,) each, and each draw takes the same ones of both.
    """
    return _estimate(ours.ratio - theirs.ratio, ours.resampled() - theirs.resampled())


def _estimate(value: float, resampled: Array) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


@lru_cache(maxsize=2)
def _counts(sentences: int) -> Array:
    """How often each sentence is drawn, (RESAMPLES, N): always the same draws, so that figures can be repeated."""
    counts = np.random.default_rng(0).multinomial(sentences, np.full(sentences, 1 / sentences), size=RESAMPLES)
    return counts.astype(np.float64)
