"""A guard against hallucinated tails: how long speech may be for its text, and where it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from neuron_xtts.locks import Lock

_FRAME = 480  # samples of which the loudness is taken, 20 ms


@dataclass(frozen=True)
class Guard:
    """What `patch` does against tails, which XTTS makes up where it does not end a sentence in time.

    Attributes:
        codes_per_token: codes that a sentence may have for each token of its text, of which XTTS makes 21.5 a second.
        spare: codes that it may have beside those.
        retry: draw a whole sentence once more, if it did not end by itself; a stream was heard by then.
        silence: decibels below the loudest, from which on 20 ms are silence.
        trim: cut off the silence at the end.
        keep: seconds of silence that are left at the end.
    """

    codes_per_token: float = 10.0
    spare: int = 60
    retry: bool = True
    trim: bool = True
    silence: float = 50.0
    keep: float = 0.15

    def __post_init__(self) -> None:
        """Raise ValueError where a number means nothing."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type != "bool" and not (isinstance(value, (int, float)) and value >= 0):
                raise ValueError(f"Guard({field.name}={value!r}); expected a number that is not below 0")

    def limit(self, tokens: int) -> int:
        """Codes that a sentence of so many text tokens may have."""
        return max(math.ceil(self.codes_per_token * tokens + self.spare), 1)


@dataclass
class GuardCounts:
    """What a guard did.

    Attributes:
        capped: sentences that did not end by themselves before the limit of their text.
        retried: those of them that were drawn once more.
        ended: those that ended by themselves then.
        trimmed: calls of ``Xtts.inference`` and ``Xtts.inference_stream`` whose end was cut off.
        seconds: of audio that were cut off.
    """

    capped: int = 0
    retried: int = 0
    ended: int = 0
    trimmed: int = 0
    seconds: float = 0.0


class Guarding:
    """A guard at work on one patched model. Threads may count and read at the same time.

    Args:
        guard: what it does.
        rate: samples of audio per second.
    """

    def __init__(self, guard: Guard, rate: int) -> None:
        self.guard = guard
        self.rate = rate
        self._counts = GuardCounts()
        self._lock = Lock()  # reentrant: a stream that is collected anywhere is counted, too

    def capped(self, *, retried: bool = False, ended: bool = False) -> None:
        """Count a sentence that met its limit."""
        with self._lock:
            self._counts.capped += 1
            self._counts.retried += retried
            self._counts.ended += ended

    def trimmed(self, samples: int) -> None:
        """Count a call whose end, of so many samples, was cut off."""
        if samples:
            with self._lock:
                self._counts.trimmed += 1
                self._counts.seconds += samples / self.rate

    def counts(self) -> GuardCounts:
        """A copy of what was counted."""
        with self._lock:
            return GuardCounts(**vars(self._counts))


class Tail:
    """Finds the end of speech while it is made: silence is held back until something voiced follows it.

    Args:
        guard: what silence is.
        rate: samples per second.

    Attributes:
        held: (N,) samples that were not given.
    """

    def __init__(self, guard: Guard, rate: int) -> None:
        self.held = torch.zeros(0)
        self._below = 10 ** (-guard.silence / 20)
        self._keep = math.ceil(guard.keep * rate / _FRAME)  # frames
        self._loudest = 0.0

    def give(self, chunk: Tensor) -> Tensor:
        """What is heard now, of what was held and ``chunk`` (N,): up to the last voiced frame, and some silence."""
        samples = torch.cat([self.held, chunk]) if len(self.held) else chunk
        loudness = _loudness(samples)
        self._loudest = max(self._loudest, loudness.max(initial=0.0))
        voiced = np.flatnonzero(loudness > self._loudest * self._below)
        end = (int(voiced[-1]) + 1 + self._keep) * _FRAME if len(voiced) else 0
        end = min(end, len(samples) // _FRAME * _FRAME)  # frames stay where they are
        given, self.held = samples[:end], samples[end:]
        return given

    def rest(self) -> tuple[Tensor, int]:
        """What is left to be heard where nothing more comes, and how many samples are cut off.

        Where nothing was voiced, all is heard.
        """
        voiced = _loudness(self.held).max(initial=0.0) > self._loudest * self._below  # a frame that was not whole
        if voiced or not self._loudest:
            return self.held, 0
        return self.held[:0], len(self.held)


def _loudness(samples: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Root mean square of every frame, the last filled up with zeros."""
    import librosa

    if not len(samples):
        return np.zeros(0, np.float32)
    padded = np.pad(samples.detach().cpu().float().numpy(), (0, -len(samples) % _FRAME))
    found: np.ndarray[tuple[int], np.dtype[np.float32]] = librosa.feature.rms(
        y=padded, frame_length=_FRAME, hop_length=_FRAME, center=False
    )[0]
    return found
