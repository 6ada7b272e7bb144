"""Memos: what was made lately, so that it is handed over and not made again."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_xtts.coqui.surface import Gpt
from neuron_xtts.coqui.weights import Stamp, stamp
from neuron_xtts.locks import Lock

# Bytes to remember, choices of ours: of latents, which threads have between generating and asking for them, 2.5 MB for
# 600 codes; and of frames and audio, 13 MB for a stream of as many.
_LATENTS_BYTES = 64 * 2**20
_AUDIO_BYTES = 128 * 2**20

Vocode = Callable[[int], Iterable[Tensor]]
Voice = Tensor | tuple[Tensor, ...]


class LatentsMemo:
    """The latents of the latest generations, found by everything they depend on.

    Args:
        size: bytes to keep at most, but for the latest.
    """

    def __init__(self, size: int = _LATENTS_BYTES) -> None:
        self._size = size
        self._lock = Lock()
        self._entries: deque[tuple[Stamp, tuple[Tensor, ...], Tensor]] = deque()

    def store(self, gpt: Gpt, cond_latents: Tensor, text_inputs: Tensor, codes: Tensor, latents: Tensor) -> None:
        """Remember ``latents`` (B, N, D). The inputs are copied: callers may write into theirs."""
        inputs = (cond_latents.clone(), text_inputs.clone(), codes.clone())
        entry = stamp(gpt.parameters()), inputs, latents
        with self._lock:
            self._entries.append(entry)
            while len(self._entries) > 1 and sum(latents.nbytes for _, _, latents in self._entries) > self._size:
                self._entries.popleft()

    def find(self, gpt: Gpt, *inputs: Tensor) -> Tensor | None:
        """The latents for conditioning latents, text and codes; None if they were not among the latest."""
        with self._lock:
            entries = list(self._entries)
        for then, known, latents in reversed(entries):
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
        self._lock = Lock()
        self._entries: deque[Vocoded] = deque()

    def complete(self, frames: Tensor, speaker: Tensor, vocoder: Hashable, vocode: Vocode) -> tuple[Tensor, bool]:
        """The audio (1, 1, samples) of ``frames``, and whether all of it was known.

        Args:
            frames: (1, D, T).
            speaker: (1, G, 1).
            vocoder: whatever else the audio depends on.
            vocode: makes the audio from a frame on, in pieces.
        """
        with self._lock:
            entries = list(self._entries)
        start, known = self._find(entries, frames, speaker, vocoder)
        if known is not None and start == frames.shape[2]:
            self._keep(known, in_place_of=known)
            return known.audio.clone(), True
        pieces = [] if known is None else [known.audio[:, :, : start * (known.audio.shape[2] // known.length)]]
        audio = torch.cat([*pieces, *vocode(start)], dim=2)
        goes_on = known is not None and start >= known.length - 2 * self._halo  # the same stream, a chunk later
        # A copy: coqui-tts writes the cross-fade of two chunks into what it is given.
        self._keep(Vocoded(frames, audio.clone(), speaker.clone(), vocoder), in_place_of=known if goes_on else None)
        return audio, False

    def _keep(self, entry: Vocoded, in_place_of: Vocoded | None) -> None:
        with self._lock:
            if in_place_of is not None and in_place_of in self._entries:  # another thread may have been faster
                self._entries.remove(in_place_of)
            self._entries.append(entry)
            while sum(entry.nbytes for entry in self._entries) > self._size:
                self._entries.popleft()

    def _find(
        self, entries: Sequence[Vocoded], frames: Tensor, speaker: Tensor, vocoder: Hashable
    ) -> tuple[int, Vocoded | None]:
        """How many of ``frames`` sound as in an earlier call, one of ``entries``, and that call."""
        best: tuple[int, Vocoded | None] = 0, None
        for entry in reversed(entries):
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
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = Lock()
        self._known: OrderedDict[Hashable, Voice] = OrderedDict()

    def find(self, key: Hashable) -> Voice | None:
        """What is known under a key: a copy, which the caller may write into."""
        with self._lock:
            voice = self._known.get(key)
            if voice is None:
                return None
            self._known.move_to_end(key)
        return _copy(voice)

    def store(self, key: Hashable, voice: Voice) -> None:
        """Remember a copy."""
        with self._lock:
            self._known[key] = _copy(voice)
            if len(self._known) > self.size:
                self._known.popitem(last=False)


@torch.inference_mode()  # as coqui-tts makes them
def _copy(voice: Voice) -> Voice:
    return voice.clone() if isinstance(voice, Tensor) else tuple(tensor.clone() for tensor in voice)
