"""The routes ``HifiDecoder.forward`` and ``.inference``: interpolate on the host, vocode windows of frames, join."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neuron_xtts.engine import Engine
from neuron_xtts.errors import Fallback
from neuron_xtts.target import check_state


class VocoderRoute:
    """The waveform of latents, as ``HifiDecoder.forward`` and ``.inference`` make it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

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
        return self.vocode(latents, g)

    @torch.inference_mode()
    def inference(self, c: Tensor, g: Tensor) -> Tensor:
        """Serve ``HifiDecoder.inference``, which is ``forward`` in inference mode, whatever the caller's."""
        return self.vocode(c, g)

    def vocode(self, latents: Tensor, speaker: Tensor | None) -> Tensor:
        """Waveform (B, 1, samples) of ``latents`` (B, N, D)."""
        engine = self.engine
        engine.require("vocoder")
        generator = engine.decoder.waveform_decoder
        check_state(generator, *generator.resblocks)
        if latents.ndim != 3:
            raise Fallback(f"latents of {latents.ndim} dimensions")
        if speaker is None or speaker.ndim != 3 or speaker.shape[0] not in (1, latents.shape[0]):
            raise Fallback("a speaker embedding that is not one per row")
        for name, tensor in {"latents": latents, "speaker embedding": speaker}.items():
            if tensor.dtype != torch.float32:
                raise Fallback(f"{name} of {tensor.dtype}")
        frames = interpolate(engine.decoder, latents)  # (B, D, T)
        speakers = speaker.expand(latents.shape[0], -1, -1)
        rows = [
            torch.cat(list(self._windows(row[None], voice[None])), dim=2)
            for row, voice in zip(frames, speakers, strict=True)
        ]
        audio = torch.cat(rows)
        if not audio.isfinite().all():
            raise Fallback("audio that is not finite")
        return audio

    def _windows(self, frames: Tensor, speaker: Tensor) -> Iterator[Tensor]:
        """Audio (1, 1, samples) of ``frames`` (1, D, T), window by window."""
        engine, total = self.engine, frames.shape[2]
        sizes = engine.buckets.sizes("vocoder")
        if sizes is None:
            yield engine.run("vocoder", (total,), total, frames, speaker, None)[0]
            return
        whole = next((size for size in sizes if size >= total), None)
        start = 0
        while start < total:
            # The last window may be a smaller one.
            fitting = (size for size in sizes if size - 2 * engine.halo >= total - start)
            size, halo = (whole, 0) if whole else (next(fitting, sizes[-1]), engine.halo)
            end = min(start + size - 2 * halo, total)
            first, last = max(start - halo, 0), min(start + size - halo, total)
            pad = (first - (start - halo), start + size - halo - last)
            mask = F.pad(frames.new_ones(1, 1, last - first), pad)
            window = F.pad(frames[:, :, first:last], pad)
            (audio,) = engine.run("vocoder", (size,), end - start, window, speaker, mask)
            hop = audio.shape[2] // size
            yield audio[:, :, halo * hop : (halo + end - start) * hop]
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
