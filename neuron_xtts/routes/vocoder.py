"""The routes ``HifiDecoder.forward`` and ``.inference``: interpolate on the host, vocode windows of frames, join.

A stream asks for the audio of all latents so far with every chunk. What an earlier call made of the same frames is not
made again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from neuron_xtts.coqui.surface import HifiDecoder
from neuron_xtts.coqui.weights import stamp, tensors_of
from neuron_xtts.decoding.caller import caller
from neuron_xtts.errors import Fallback, NotFinite
from neuron_xtts.routes.base import Context, HandedOver, check_fp32
from neuron_xtts.runner import Runner

# Frames of a window that others need not wait for: of a chunk of 20 codes, coqui-tts's own, with its halos.
_SHORT = 135


def forward(context: Context, /, latents: Tensor, g: Tensor | None = None) -> Tensor | HandedOver[Tensor]:
    """Serve ``HifiDecoder.forward``.

    Args:
        context: of the patched model.
        latents: (B, N, D).
        g: (B or 1, G, 1) speaker embedding.

    Returns:
        audio (B, 1, samples) at 24 kHz.
    """
    if torch.is_grad_enabled():
        raise Fallback("gradients are on")
    return _vocode(context, latents, g)


@torch.inference_mode()
def inference(context: Context, /, c: Tensor, g: Tensor) -> Tensor | HandedOver[Tensor]:
    """Serve ``HifiDecoder.inference``, which is ``forward`` in inference mode, whatever the caller's."""
    return _vocode(context, c, g)


def _vocode(context: Context, latents: Tensor, speaker: Tensor | None) -> Tensor | HandedOver[Tensor]:
    """Waveform (B, 1, samples) of ``latents`` (B, N, D)."""
    runner = context.runner
    runner.require("vocoder")
    runner.check_state("vocoder")
    if latents.ndim != 3:
        raise Fallback(f"latents of {latents.ndim} dimensions")
    if speaker is None or speaker.ndim != 3 or speaker.shape[0] not in (1, latents.shape[0]):
        raise Fallback("a speaker embedding that is not one per row")
    check_fp32(latents=latents, speaker_embedding=speaker)
    frames = interpolate(runner.networks.decoder, latents)  # (B, D, T)
    speakers = speaker.expand(latents.shape[0], -1, -1)
    rows: list[tuple[Tensor, bool]] = []

    def make(short: bool) -> Tensor:
        rows.extend(_row(context, row[None], voice[None], short) for row, voice in zip(frames, speakers, strict=True))
        return torch.cat([audio for audio, _ in rows]) if len(rows) > 1 else rows[0][0]

    audio = context.listening.vocode(make, runner.networks.decoder.output_sample_rate, runner.turns)
    return HandedOver(audio) if all(known for _, known in rows) else audio


def _row(context: Context, frames: Tensor, speaker: Tensor, short: bool) -> tuple[Tensor, bool]:
    """Audio (1, 1, samples) of ``frames`` (1, D, T), and whether all of it was known."""
    generator = context.runner.networks.decoder.waveform_decoder

    def vocode(start: int) -> Iterator[Tensor]:
        for audio in _windows(context.runner, frames, speaker, start, short):
            if not audio.isfinite().all():
                raise NotFinite("audio that is not finite")
            yield audio

    vocoder = (tuple(map(id, generator.modules())), stamp(tensors_of(generator)))
    return context.audio.complete(frames, speaker, vocoder, vocode)


def _windows(runner: Runner, frames: Tensor, speaker: Tensor, start: int, short: bool) -> Iterator[Tensor]:
    """Audio (1, 1, samples) of ``frames`` (1, D, T) from ``start`` on, window by window, if need be ``short`` ones.

    A window has a halo where it does not begin or end with the audio itself.
    """
    halo, total = runner.halo, frames.shape[2]
    sizes = runner.buckets.sizes("vocoder")
    longest = max(_SHORT, 2 * halo + 1) if short else total
    if sizes and short:
        sizes = tuple(size for size in sizes if size <= longest or size == sizes[0])
    while start < total:
        caller().check()
        first = max(start - halo, 0)
        size = min(total - first, longest)
        if sizes is not None:
            size = next((held for held in sizes if held >= size), sizes[-1])
        last = min(first + size, total)
        end = last if last == total else last - halo
        padding = (0, first + size - last)
        window = F.pad(frames[:, :, first:last], padding)
        mask = None if sizes is None else F.pad(frames.new_ones(1, 1, last - first), padding)
        (audio,) = runner.run("vocoder", (size,), end - start, window, speaker, mask)
        hop = audio.shape[2] // size
        yield audio[:, :, (start - first) * hop : (end - first) * hop]
        start = end


def interpolate(decoder: HifiDecoder, latents: Tensor) -> Tensor:
    """Vocoder frames (B, D, T) of latents (B, N, D): to frames of 256 samples, then from 22.05 to 24 kHz.

    With the arguments of ``HifiDecoder.forward``: both depend on absolute positions, so windows come afterwards.
    """
    frames_per_latent = decoder.ar_mel_length_compression / decoder.output_hop_length
    frames = F.interpolate(latents.transpose(1, 2), scale_factor=[frames_per_latent], mode="linear")
    if decoder.output_sample_rate == decoder.input_sample_rate:
        return frames
    return F.interpolate(frames, scale_factor=[decoder.output_sample_rate / decoder.input_sample_rate], mode="linear")
