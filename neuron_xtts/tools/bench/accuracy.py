"""What a precision costs in accuracy: how far its latents and its audio are from coqui-tts's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import neuron_xtts
from neuron_xtts.backends.neuron.verification import correlation
from neuron_xtts.coqui.models import SENTENCES
from neuron_xtts.options import PatchOptions
from neuron_xtts.tools.bench import Voice


@dataclass
class Accuracy:
    """How far a precision is from coqui-tts, teacher-forced on coqui-tts's own codes.

    Attributes:
        latents: Pearson correlation of the latents.
        snr: signal-to-noise ratio of the waveform, in dB.
        spectrum: Pearson correlation of the magnitudes of the waveform's short-time Fourier transform (1024 points,
            hop 256).
        vocoder_snr: signal-to-noise ratio, in dB, of what the vocoder makes of coqui-tts's latents.
    """

    latents: float
    snr: float
    spectrum: float
    vocoder_snr: float


def snr(ours: Tensor, theirs: Tensor) -> float:
    """Signal-to-noise ratio of a waveform in dB, where the noise is its difference from ``theirs``."""
    return float(20 * torch.log10(theirs.norm() / (ours - theirs).norm().clamp_min(1e-30)))


def magnitudes(wave: Tensor) -> Tensor:
    """Magnitudes (513, frames) of a waveform's short-time Fourier transform."""
    return torch.stft(wave.flatten(), 1024, 256, window=torch.hann_window(1024), return_complex=True).abs()


@torch.inference_mode()
def accuracy(
    xtts: Any,
    voice: Voice,
    codes: int,
    options: PatchOptions,
    unpatch: Callable[[Any], object] = neuron_xtts.unpatch,
) -> Accuracy:
    """Compare a patch with ``options`` with coqui-tts.

    Args:
        xtts: the model, unpatched.
        voice: conditioning latents and speaker embedding.
        codes: how many codes the sentence has.
        options: keyword arguments of `neuron_xtts.patch`.
        unpatch: what ends the patch, given ``xtts``.
    """
    text = torch.tensor(xtts.tokenizer.encode(SENTENCES[0].lower(), lang="en"))[None]
    torch.manual_seed(1)
    drawn = xtts.gpt.generate(
        voice[0], text, do_sample=True, top_k=50, top_p=0.85, temperature=0.75, repetition_penalty=10.0,
        min_new_tokens=codes, max_new_tokens=codes,
    )  # fmt: skip
    lengths = torch.tensor([text.shape[1]]), torch.tensor([drawn.shape[1] * xtts.gpt.code_stride_len])

    def forward() -> Tensor:
        latents: Tensor = xtts.gpt(text, lengths[0], drawn, lengths[1], cond_latents=voice[0], return_latent=True)
        return latents

    theirs = forward()
    wave = xtts.hifigan_decoder(theirs, g=voice[1])
    neuron_xtts.patch(xtts, **options)
    try:
        ours = forward()
        our_wave, vocoded = (xtts.hifigan_decoder(latents, g=voice[1]) for latents in (ours, theirs))
    finally:
        unpatch(xtts)
    spectrum = correlation(magnitudes(our_wave), magnitudes(wave))
    return Accuracy(correlation(ours, theirs), snr(our_wave, wave), spectrum, snr(vocoded, wave))
