"""The route ``GPT.forward``: latents that decoding already made are handed over, others come from the latents graph."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neuron_xtts.engine import Engine
from neuron_xtts.errors import Fallback
from neuron_xtts.target import check_state
from neuron_xtts.weights import Stamp, stamp

# A choice of ours: as many sentences as threads may have between generating and asking for latents.
_REMEMBERED = 4

# GPT.forward counts this many positions more than it has codes, pads with stop tokens up to there and cuts the result
# short by as much; by causality they can be left out.
_TAIL = 5


class LatentsMemo:
    """The latents of the latest generations, found by everything they depend on."""

    def __init__(self) -> None:
        self._entries: deque[tuple[Stamp, tuple[Tensor, ...], Tensor]] = deque(maxlen=_REMEMBERED)

    def store(self, gpt: Any, cond_latents: Tensor, text_inputs: Tensor, codes: Tensor, latents: Tensor) -> None:
        """Remember ``latents`` (B, N, D). The inputs are copied: callers may write into theirs."""
        inputs = (cond_latents.clone(), text_inputs.clone(), codes.clone())
        self._entries.append((stamp(gpt.parameters()), inputs, latents))

    def find(self, gpt: Any, *inputs: Tensor) -> Tensor | None:
        """The latents for conditioning latents, text and codes; None if they were not among the latest."""
        for then, known, latents in reversed(self._entries):
            if all(a.shape == b.shape and torch.equal(a, b.to(a.dtype)) for a, b in zip(inputs, known, strict=True)):
                return latents.clone() if then == stamp(gpt.parameters()) else None
        return None


def check_trunk(gpt: Any) -> None:
    """Raise `Fallback` where the model is in a state that the transformer graphs do not compute."""
    if gpt.training or gpt.gpt.training:
        raise Fallback("training mode")
    bypassed = [module for block in gpt.gpt.h for module in (block, block.attn, block.mlp)]
    check_state(gpt.mel_head, gpt.gpt, *bypassed)


class LatentsRoute:
    """Latents of audio codes, as ``GPT.forward`` makes them for the vocoder."""

    name = "GPT.forward"

    def __init__(self, engine: Engine, memo: LatentsMemo) -> None:
        self.engine = engine
        self.memo = memo

    def __call__(
        self,
        text_inputs: Tensor,
        text_lengths: Tensor,
        audio_codes: Tensor,
        wav_lengths: Tensor,
        cond_mels: Any = None,
        cond_idxs: Any = None,
        cond_lens: Any = None,
        cond_latents: Tensor | None = None,
        return_attentions: bool = False,
        return_latent: bool = False,
    ) -> Tensor:
        """Serve ``GPT.forward(..., return_latent=True)``.

        Args:
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
        gpt = self.engine.gpt
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
        if cond_latents.dtype != torch.float32:
            raise Fallback(f"conditioning latents of {cond_latents.dtype}")
        check_trunk(gpt)
        text, codes = layout(gpt, text_inputs, text_lengths, audio_codes, wav_lengths)
        if codes.shape[1] + _TAIL > gpt.mel_pos_embedding.emb.num_embeddings:
            raise Fallback("more audio codes than the model has positions")
        latents = self.memo.find(gpt, cond_latents, text, codes)
        if latents is not None:
            self.engine.counters.count_handed_over(self.name)
            return latents
        self.engine.require("latents")
        return self._compute(cond_latents, text, codes)

    def _compute(self, cond_latents: Tensor, text: Tensor, codes: Tensor) -> Tensor:
        gpt = self.engine.gpt
        inputs = F.pad(codes[:, :-1], (1, 0), value=gpt.start_audio_token)  # each latent predicts the code at its place
        code_embeds = gpt.mel_embedding(inputs) + gpt.mel_pos_embedding(inputs)
        embeds = torch.cat([cond_latents, embed_text(gpt, text), code_embeds], dim=1)
        length = embeds.shape[1]
        bucket = self.engine.buckets.choose("latents", length)
        padded = F.pad(embeds, (0, 0, 0, bucket[0] - length))
        rows = [self.engine.run("latents", bucket, length, row)[0] for row in torch.split(padded, 1)]
        latents = torch.cat(rows)[:, length - codes.shape[1] : length]
        if not latents.isfinite().all():
            raise Fallback("latents that are not finite")
        return latents


def embed_text(gpt: Any, text: Tensor) -> Tensor:
    """Embeddings (B, T + 2, D) of ``text`` (B, T) between its start and stop tokens."""
    text = F.pad(F.pad(text, (0, 1), value=gpt.stop_text_token), (1, 0), value=gpt.start_text_token)
    embeds: Tensor = gpt.text_embedding(text) + gpt.text_pos_embedding(text)
    return embeds


def layout(
    gpt: Any, text_inputs: Tensor, text_lengths: Tensor, audio_codes: Tensor, wav_lengths: Tensor
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
