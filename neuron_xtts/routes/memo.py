"""Memos: what was made lately, so that it is handed over and not made again."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_xtts.coqui.surface import Gpt
from neuron_xtts.coqui.weights import Stamp, stamp

# A choice of ours: as many sentences as threads may have between generating and asking for latents.
_GENERATIONS = 4

# A choice of ours: bytes of frames and audio to remember; a stream of 600 codes takes 13 MB.
_AUDIO_BYTES = 64 * 2**20

Vocode = Callable[[int], Iterable[Tensor]]
Voice = Tensor | tuple[Tensor, ...]


class LatentsMemo:
    """The latents of the latest generations, found by everything they depend on."""

    def __init__(self) -> None:
        self._entries: deque[tuple[Stamp, tuple[Tensor, ...], Tensor]] = deque(maxlen=_GENERATIONS)

    def store(self, gpt: Gpt, cond_latents: Tensor, text_inputs: Tensor, codes: Tensor, latents: Tensor) -> None:
        """Remember ``latents`` (B, N, D). The inputs are copied: callers may write into theirs."""
        inputs = (cond_latents.clone(), text_inputs.clone(), codes.clone())
        self._entries.append((stamp(gpt.parameters()), inputs, latents))

    def find(self, gpt: Gpt, *inputs: Tensor) -> Tensor | None:
        """The latents for conditioning latents, text and codes; None if they were not among the latest."""
        for then, known, latents in reversed(self._entries):
            if all(a.shape == b.shape and torch.equal(a, b.to(a.dtype)) for a, b in zip(inputs, known, strict=True)):
                return latents.clone() if then == stamp(gpt.parameters()) else None
        return None


@dataclass(eq=False)
class Vocoded:
    """What a call of the vocoder made: ``audio`` (1, 1, samples) of ``frames`` (1, D, T)."""

    frames: Tensor
    audio: Tensor
    speaker: Tensor
    vocoder: Hashable

    @property
    def length(self) -> int:
        """Frames, T."""
        return self.frames.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of frames and audio."""
        return self.frames.nbytes + self.audio.nbytes


class AudioMemo:
    """The audio of the latest calls, found by the frames it begins with.

    Args:
        halo: frames to either side that the audio of a frame depends on.
        size: bytes to keep at most.
    """

    def __init__(self, halo: int, size: int = _AUDIO_BYTES) -> None:
        self._halo = halo
        self._size = size
        self._entries: deque[Vocoded] = deque()

    def complete(self, frames: Tensor, speaker: Tensor, vocoder: Hashable, vocode: Vocode) -> tuple[Tensor, bool]:
        """The audio (1, 1, samples) of ``frames``, and whether all of it was known.

        Args:
            frames: (1, D, T).
            speaker: (1, G, 1).
            vocoder: whatever else the audio depends on.
            vocode: makes the audio from a frame on, in pieces.
        """
        start, known = self._find(frames, speaker, vocoder)
        if known is not None and start == frames.shape[2]:
            self._entries.remove(known)
            self._entries.append(known)
            return known.audio.clone(), True
        pieces = [] if known is None else [known.audio[:, :, : start * (known.audio.shape[2] // known.length)]]
        audio = torch.cat([*pieces, *vocode(start)], dim=2)
        if known is not None and start >= known.length - 2 * self._halo:  # it goes on: the same stream, a chunk later
            self._entries.remove(known)
        # A copy: coqui-tts writes the cross-fade of two chunks into what it is given.
        self._entries.append(Vocoded(frames, audio.clone(), speaker.clone(), vocoder))
        while sum(entry.nbytes for entry in self._entries) > self._size:
            self._entries.popleft()
        return audio, False

    def _find(self, frames: Tensor, speaker: Tensor, vocoder: Hashable) -> tuple[int, Vocoded | None]:
        """How many of ``frames`` sound as in an earlier call, and that call."""
        best: tuple[int, Vocoded | None] = 0, None
        for entry in reversed(self._entries):
            if entry.vocoder != vocoder or not torch.equal(entry.speaker, speaker):
                continue
            common = common_length(entry.frames, frames)
            # Frames before the first that differs sound different if they can see it, or the end in its place.
            same = common if common == entry.length == frames.shape[2] else common - self._halo
            if same > best[0]:
                best = same, entry
        return best


def common_length(a: Tensor, b: Tensor) -> int:
    """How many frames two sequences (1, D, T) have in common from the start on."""
    length = min(a.shape[2], b.shape[2])
    if not torch.equal(a[:, :, :1], b[:, :, :1]):  # nearly always decides
        return 0
    differs = (a[:, :, :length] != b[:, :, :length]).any(dim=1)[0]
    return int(differs.int().argmax()) if differs.any() else length


class VoiceMemo:
    """What a method made of recordings; the one asked for least recently goes first.

    Args:
        size: how many to remember; 0 for none.

    Attributes:
        lock: held while a voice is looked for and made, so that threads that ask for the same compute it once.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.lock = threading.RLock()
        self._known: OrderedDict[Hashable, Voice] = OrderedDict()

    def find(self, key: Hashable) -> Voice | None:
        """What is known under a key: a copy, which the caller may write into."""
        voice = self._known.get(key)
        if voice is None:
            return None
        self._known.move_to_end(key)
        return _copy(voice)

    def store(self, key: Hashable, voice: Voice) -> None:
        """Remember a copy."""
        self._known[key] = _copy(voice)
        if len(self._known) > self.size:
            self._known.popitem(last=False)


@torch.inference_mode()  # as coqui-tts makes them
def _copy(voice: Voice) -> Voice:
    return voice.clone() if isinstance(voice, Tensor) else tuple(tensor.clone() for tensor in voice)
