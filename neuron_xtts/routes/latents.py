"""The route ``GPT.forward``: latents that decoding already made are handed over, others come from the latents graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from neuron_xtts.coqui.constants import FORWARD_TAIL
from neuron_xtts.coqui.embeddings import embed_text
from neuron_xtts.coqui.surface import Gpt
from neuron_xtts.errors import Fallback, NotFinite
from neuron_xtts.routes.base import Context, HandedOver, check_fp32
from neuron_xtts.runner import Runner


def forward(
    context: Context,
    /,
    text_inputs: Tensor,
    text_lengths: Tensor,
    audio_codes: Tensor,
    wav_lengths: Tensor,
    cond_mels: Tensor | None = None,
    cond_idxs: Tensor | None = None,
    cond_lens: Tensor | None = None,
    cond_latents: Tensor | None = None,
    return_attentions: bool = False,
    return_latent: bool = False,
) -> Tensor | HandedOver[Tensor]:
    """Serve ``GPT.forward(..., return_latent=True)``.

    Args:
        context: of the patched model.
        text_inputs: (B, T) text tokens.
        text_lengths: (B,) text tokens of each row.
        audio_codes: (B, N).
        wav_lengths: (B,) or (1,) samples at 22.05 kHz that the codes stand for.
        cond_mels: falls back.
        cond_idxs: falls back.
        cond_lens: falls back.
        cond_latents: (B, 32, D).
        return_attentions: falls back.
        return_latent: must be true; the training losses fall back.

    Returns:
        latents (B, N, D).
    """
    runner, gpt = context.runner, context.runner.networks.gpt
    if not return_latent:
        raise Fallback("losses were asked for")
    if return_attentions:
        raise Fallback("argument return_attentions")
    for name, value in {"cond_mels": cond_mels, "cond_idxs": cond_idxs, "cond_lens": cond_lens}.items():
        if value is not None:
            raise Fallback(f"argument {name}")
    if cond_latents is None:
        raise Fallback("no conditioning latents")
    if torch.is_grad_enabled():
        raise Fallback("gradients are on")
    check_fp32(conditioning_latents=cond_latents)
    runner.check_state("latents")
    text, codes = layout(gpt, text_inputs, text_lengths, audio_codes, wav_lengths)
    if codes.shape[1] + FORWARD_TAIL > gpt.mel_pos_embedding.emb.num_embeddings:
        raise Fallback("more audio codes than the model has positions")
    known = context.latents.find(gpt, cond_latents, text, codes)
    if known is not None:
        return HandedOver(known)
    runner.require("latents")
    return _compute(runner, cond_latents, text, codes)


def _compute(runner: Runner, cond_latents: Tensor, text: Tensor, codes: Tensor) -> Tensor:
    gpt = runner.networks.gpt
    inputs = F.pad(codes[:, :-1], (1, 0), value=gpt.start_audio_token)  # each latent predicts the code at its place
    code_embeds = gpt.mel_embedding(inputs) + gpt.mel_pos_embedding(inputs)
    embeds = torch.cat([cond_latents, embed_text(gpt, text), code_embeds], dim=1)
    length = embeds.shape[1]
    bucket = runner.buckets.choose("latents", length)
    padded = F.pad(embeds, (0, 0, 0, bucket[0] - length))
    rows = [runner.run("latents", bucket, length, row)[0] for row in torch.split(padded, 1)]
    latents = torch.cat(rows)[:, length - codes.shape[1] : length]
    if not latents.isfinite().all():
        raise NotFinite("latents that are not finite")
    return latents


def layout(
    gpt: Gpt, text_inputs: Tensor, text_lengths: Tensor, audio_codes: Tensor, wav_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """The text (B, T) and codes (B, N) that ``GPT.forward`` computes with.

    Both are cut to the longest row; codes past the end of a row are replaced by the stop code.
    """
    text = text_inputs[:, : int(text_lengths.max())]
    if text.shape[1] < int(text_lengths.max()):
        raise Fallback("text_lengths beyond text_inputs")
    ends = torch.ceil(wav_lengths / gpt.code_stride_len).long().tolist()
    length = max(ends)
    if length < 1:
        raise Fallback("no audio codes")
    codes = F.pad(audio_codes[:, :length], (0, max(length - audio_codes.shape[1], 0)))
    for row, end in enumerate(ends):
        codes[row, end:] = gpt.stop_audio_token
    return text, codes
