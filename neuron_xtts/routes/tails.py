"""Tails: the guard of a model at work. What was said is judged by its codes, and heard for where its voice ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from neuron_xtts.coqui.constants import OUTPUT_RATE
from neuron_xtts.guard import Guard
from neuron_xtts.report import GuardCounters

Said = TypeVar("Said")

# Samples whose loudness is one number: 21 ms, two periods of a low voice. A choice of ours.
_BLOCK = 512


class Tails:
    """What keeps one patched model from tails.

    Args:
        guard: what is a tail.

    Attributes:
        guard: likewise.
        counters: of what was done.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.counters = GuardCounters()

    def best(self, say: Callable[[bool], Said], ended: Callable[[Said], bool], *, draws: bool) -> Said:
        """What is said within a cap; said again, if that is any better.

        Args:
            say: says it; is told whether it is for the second time.
            ended: whether what was said ended by itself.
            draws: whether it may be other codes the second time.
        """
        first = say(False)
        if ended(first):
            return first
        second = say(True) if draws and self.guard.retry else None
        better = second is not None and ended(second)
        self.counters.capped(retried=second is not None, ended=better)
        return second if second is not None and better else first

    def trimmed(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Samples (N,) without their tail; those of several rows as they are."""
        if self.guard.trim is None or samples.ndim != 1:
            return samples
        end = Ear(self.guard.trim, self.guard.keep).hear(samples)
        if end == len(samples):
            return samples
        self.counters.trimmed((len(samples) - end) / OUTPUT_RATE)
        kept: NDArray[np.float32] = samples[:end].copy()
        return kept

    def held_back(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Chunks (N,) of a stream without its tail: what is quiet waits until something louder follows."""
        if self.guard.trim is None:
            yield from chunks
            return
        ear, held, given = Ear(self.guard.trim, self.guard.keep), list[Tensor](), 0
        for chunk in chunks:
            ready = ear.hear(chunk.detach().float().cpu().numpy()) - given
            held.append(chunk)
            while held and ready > 0:
                piece = held.pop(0)
                if len(piece) > ready:
                    held.insert(0, piece[ready:])
                    piece = piece[:ready]
                if len(piece):
                    given += len(piece)
                    ready -= len(piece)
                    yield piece
        left = sum(map(len, held))
        if left:
            self.counters.trimmed(left / OUTPUT_RATE)


class Ear:
    """Hears where a voice ends, in audio that comes piece by piece.

    What is quieter is so compared to the loudest so far. At the end that is the loudest of all: all that counts comes
    behind it. So the end is that of the whole audio, in whatever pieces it came.

    Args:
        trim: dB that a voice is at most quieter than its loudest part.
        keep: seconds behind it that belong to it.
    """

    def __init__(self, trim: float, keep: float) -> None:
        self._least = 10 ** (-trim / 20)
        self._keep = round(keep * OUTPUT_RATE)
        self._loudest = 0.0
        self._heard = 0  # samples
        self._end = 0  # of the last block with a voice, and what is kept behind it
        self._rest: NDArray[np.float32] = np.zeros(0, np.float32)  # of the block that is not full yet

    def hear(self, samples: NDArray[np.float32]) -> int:
        """Go on with ``samples`` (N,). Returns how many, of all that were heard, belong to the voice so far."""
        samples = np.concatenate([self._rest, samples])
        begin = self._heard - len(self._rest)
        self._heard = begin + len(samples)
        full = len(samples) // _BLOCK
        # The block that is not full can only become louder.
        padded = np.pad(samples, (0, -len(samples) % _BLOCK)).reshape(-1, _BLOCK)
        loud = _loudness(padded)
        loudest = np.fmax.accumulate([self._loudest, *loud])
        voiced = np.flatnonzero(~(loud < self._least * loudest[1:]))  # what is no number is no silence
        if len(voiced):
            self._end = begin + (int(voiced[-1]) + 1) * _BLOCK + self._keep
        self._loudest = float(loudest[full])
        self._rest = samples[full * _BLOCK :]
        return min(self._end, self._heard)


def _loudness(blocks: NDArray[np.float32]) -> NDArray[np.float64]:
    """The root of the mean square (B,) of blocks (B, samples)."""
    import librosa  # takes long to import

    if not len(blocks):
        return np.zeros(0)
    size = blocks.shape[1]
    power: NDArray[np.float64] = librosa.feature.rms(
        y=blocks, frame_length=size, hop_length=size, center=False, dtype=np.float64
    )
    return power[:, 0, 0]
