"""The route ``GPT.get_style_emb``: the conditioning latents of a chunk of the reference recording."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuron_xtts.engine import Engine
from neuron_xtts.errors import Fallback
from neuron_xtts.target import check_state


class ConditioningRoute:
    """Conditioning latents of mel frames, as ``GPT.get_style_emb`` makes them.

    Args:
        engine: of the patched model.
    """

    name = "GPT.get_style_emb"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, cond_input: Tensor, return_latent: bool = False) -> Tensor:
        """Serve ``GPT.get_style_emb``.

        Args:
            cond_input: (B, 80, T) or (B, 1, 80, T) mel spectrogram.
            return_latent: falls back.

        Returns:
            latents (B, D, 32).
        """
        engine, gpt = self.engine, self.engine.gpt
        if return_latent:
            raise Fallback("argument return_latent")
        if torch.is_grad_enabled():
            raise Fallback("gradients are on")
        engine.require("conditioning")
        check_conditioning_state(gpt)
        mel = cond_input.squeeze(1) if cond_input.ndim == 4 else cond_input
        if mel.ndim != 3:
            raise Fallback(f"a spectrogram of {mel.ndim} dimensions")
        if mel.dtype != torch.float32:
            raise Fallback(f"a spectrogram of {mel.dtype}")
        bucket = engine.buckets.choose("conditioning", mel.shape[2], exact=1)
        rows = [engine.run("conditioning", bucket, bucket[0], row)[0] for row in torch.split(mel, 1)]
        latents = torch.cat(rows)
        if not latents.isfinite().all():
            raise Fallback("conditioning latents that are not finite")
        return latents


def check_conditioning_state(gpt: Any) -> None:
    """Raise `Fallback` where the model is in a state that the conditioning graph does not compute."""
    if gpt.training or gpt.conditioning_encoder.training or gpt.conditioning_perceiver.training:
        raise Fallback("training mode")
    check_state(*gpt.conditioning_encoder.modules(), *gpt.conditioning_perceiver.modules())
