"""The route ``GPT.get_style_emb``: the conditioning latents of a chunk of the reference recording."""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_xtts.errors import Fallback, NotFinite
from neuron_xtts.routes.base import Context, check_fp32


def get_style_emb(context: Context, /, cond_input: Tensor, return_latent: bool = False) -> Tensor:
    """Serve ``GPT.get_style_emb``.

    Args:
        context: of the patched model.
        cond_input: (B, 80, T) or (B, 1, 80, T) mel spectrogram.
        return_latent: falls back.

    Returns:
        latents (B, D, 32).
    """
    runner = context.runner
    if return_latent:
        raise Fallback("argument return_latent")
    if torch.is_grad_enabled():
        raise Fallback("gradients are on")
    runner.require("conditioning")
    runner.check_state("conditioning")
    mel = cond_input.squeeze(1) if cond_input.ndim == 4 else cond_input
    if mel.ndim != 3:
        raise Fallback(f"a spectrogram of {mel.ndim} dimensions")
    check_fp32(a_spectrogram=mel)
    bucket = runner.buckets.choose("conditioning", mel.shape[2])
    rows = [runner.run("conditioning", bucket, bucket[0], row)[0] for row in torch.split(mel, 1)]
    latents = torch.cat(rows)
    if not latents.isfinite().all():
        raise NotFinite("conditioning latents that are not finite")
    return latents
