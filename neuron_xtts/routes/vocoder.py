"""The routes ``HifiDecoder.forward`` and ``.inference``: interpolate on the host, vocode windows of frames, join.

A stream asks for the audio of all latents so far with every chunk. What an earlier call made of the same frames is not
made again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neuron_xtts.engine import Engine
from neuron_xtts.errors import Fallback
from neuron_xtts.target import check_state
from neuron_xtts.weights import stamp, tensors_of

# A choice of ours: bytes of frames and audio to remember; a stream of 600 codes takes 13 MB.
_REMEMBERED = 64 * 2**20

Vocode = Callable[[int], Iterable[Tensor]]


@dataclass(eq=False)
class Vocoded:
    """What a call made: ``audio`` (1, 1, samples) of ``frames`` (1, D, T)."""

    frames: Tensor
    audio: Tensor
    speaker: Tensor
    vocoder: Any

    @property
    def length(self) -> int:
        """Of the frames."""
        return self.frames.shape[2]

    @property
    def size(self) -> int:
        """In bytes."""
        return self.frames.nbytes + self.audio.nbytes


class AudioMemo:
    """The audio of the latest calls, found by the frames it begins with.

    Args:
        halo: frames to either side that the audio of a frame depends on.
        size: bytes to keep at most.
    """

    def __init__(self, halo: int, size: int = _REMEMBERED) -> None:
        self._halo = halo
        self._size = size
        self._entries: deque[Vocoded] = deque()

    def complete(self, frames: Tensor, speaker: Tensor, vocoder: Any, vocode: Vocode) -> tuple[Tensor, bool]:
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
        while sum(entry.size for entry in self._entries) > self._size:
            self._entries.popleft()
        return audio, False

    def _find(self, frames: Tensor, speaker: Tensor, vocoder: Any) -> tuple[int, Vocoded | None]:
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


class VocoderRoute:
    """The waveform of latents, as ``HifiDecoder.forward`` and ``.inference`` make it."""

    FORWARD, INFERENCE = "HifiDecoder.forward", "HifiDecoder.inference"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.memo = AudioMemo(engine.halo)

    def forward(self, latents: Tensor, g: Tensor | None = None) -> Tensor:
        """Serve ``HifiDecoder.forward``.

        Args:
            latents: (B, N, D).
            g: (B or 1, G, 1) speaker embedding.

        Returns:
            audio (B, 1, samples) at 24 kHz.
        """
        if torch.is_grad_enabled():
            raise Fallback("gradients are on")
        return self.vocode(self.FORWARD, latents, g)

    @torch.inference_mode()
    def inference(self, c: Tensor, g: Tensor) -> Tensor:
        """Serve ``HifiDecoder.inference``, which is ``forward`` in inference mode, whatever the caller's."""
        return self.vocode(self.INFERENCE, c, g)

    def vocode(self, route: str, latents: Tensor, speaker: Tensor | None) -> Tensor:
        """Waveform (B, 1, samples) of ``latents`` (B, N, D)."""
        engine = self.engine
        engine.require("vocoder")
        check_state(*engine.decoder.waveform_decoder.modules())
        if latents.ndim != 3:
            raise Fallback(f"latents of {latents.ndim} dimensions")
        if speaker is None or speaker.ndim != 3 or speaker.shape[0] not in (1, latents.shape[0]):
            raise Fallback("a speaker embedding that is not one per row")
        for name, tensor in {"latents": latents, "speaker embedding": speaker}.items():
            if tensor.dtype != torch.float32:
                raise Fallback(f"{name} of {tensor.dtype}")
        frames = interpolate(engine.decoder, latents)  # (B, D, T)
        speakers = speaker.expand(latents.shape[0], -1, -1)
        rows = [self._row(row[None], voice[None]) for row, voice in zip(frames, speakers, strict=True)]
        if all(known for _, known in rows):
            engine.counters.count_handed_over(route)
        return torch.cat([audio for audio, _ in rows]) if len(rows) > 1 else rows[0][0]

    def _row(self, frames: Tensor, speaker: Tensor) -> tuple[Tensor, bool]:
        """Audio (1, 1, samples) of ``frames`` (1, D, T), and whether all of it was known."""
        generator = self.engine.decoder.waveform_decoder

        def vocode(start: int) -> Iterator[Tensor]:
            for audio in self._windows(frames, speaker, start):
                if not audio.isfinite().all():
                    raise Fallback("audio that is not finite")
                yield audio

        vocoder = (tuple(map(id, generator.modules())), stamp(tensors_of(generator)))
        return self.memo.complete(frames, speaker, vocoder, vocode)

    def _windows(self, frames: Tensor, speaker: Tensor, start: int) -> Iterator[Tensor]:
        """Audio (1, 1, samples) of ``frames`` (1, D, T) from ``start`` on, window by window.

        A window has a halo where it does not begin or end with the audio itself.
        """
        engine, total = self.engine, frames.shape[2]
        sizes = engine.buckets.sizes("vocoder")
        while start < total:
            first = max(start - engine.halo, 0)
            size = total - first
            if sizes is not None:
                size = next((held for held in sizes if held >= size), sizes[-1])
            last = min(first + size, total)
            end = last if last == total else last - engine.halo
            padding = (0, first + size - last)
            window = F.pad(frames[:, :, first:last], padding)
            mask = None if sizes is None else F.pad(frames.new_ones(1, 1, last - first), padding)
            (audio,) = engine.run("vocoder", (size,), end - start, window, speaker, mask)
            hop = audio.shape[2] // size
            yield audio[:, :, (start - first) * hop : (end - first) * hop]
            start = end


def interpolate(decoder: Any, latents: Tensor) -> Tensor:
    """Vocoder frames (B, D, T) of latents (B, N, D): to frames of 256 samples, then from 22.05 to 24 kHz.

    With the arguments of ``HifiDecoder.forward``: both depend on absolute positions, so windows come afterwards.
    """
    frames_per_latent = decoder.ar_mel_length_compression / decoder.output_hop_length
    frames = F.interpolate(latents.transpose(1, 2), scale_factor=[frames_per_latent], mode="linear")
    if decoder.output_sample_rate == decoder.input_sample_rate:
        return frames
    return F.interpolate(frames, scale_factor=[decoder.output_sample_rate / decoder.input_sample_rate], mode="linear")
