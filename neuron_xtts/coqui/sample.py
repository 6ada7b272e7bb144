"""A sample of what comes in front of the trunk, made of the model's own tables, for whoever must see it at work."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from neuron_xtts.coqui.recognise import check_plain_conditioning, conditioning_parts
from neuron_xtts.coqui.surface import Networks
from neuron_xtts.coqui.weights import is_plain, tensors_of
from neuron_xtts.errors import Fallback
from neuron_xtts.graphs.conditioning import Conditioning

# Choices of ours, about as in a short sentence: mel frames of the voice, text tokens, codes. Twice as many text tokens
# and codes, or those of real sentences, made int8 hardly more exact (a probe on a small model that was trained).
_FRAMES, _TEXT, _CODES = 64, 24, 72


class Sample:
    """The embeddings of a sentence that means nothing: the voice of noise, random text, random codes.

    Always the same ones, without a draw from torch's random state, and without a call of anybody's hooks: without the
    voice, if somebody hooked its encoder.

    Args:
        networks: of the model.
    """

    def __init__(self, networks: Networks) -> None:
        self._networks = networks

    def tensors(self) -> list[Tensor]:
        """What it is made of, in a fixed order."""
        gpt: Any = self._networks.gpt
        parts = (*self._tables(), gpt.conditioning_encoder, getattr(gpt, "conditioning_perceiver", None))
        return [tensor for part in parts if isinstance(part, nn.Module) for tensor in tensors_of(part)]

    @torch.no_grad()
    def embeds(self) -> Tensor:
        """Embeddings (1, L, D) with positions.

        Raises:
            LookupError: embeddings are no tables of rows in fp32 on the CPU.
        """
        generator = torch.Generator().manual_seed(0)
        parts = []
        voice = self._voice()
        if voice is not None:
            mel = torch.randn(1, voice.init.in_channels, _FRAMES, generator=generator, dtype=torch.float32)
            parts.append(voice(mel)[0][0].T)
        tables = self._tables()
        if any(type(table) is not nn.Embedding or not is_plain(table) for table in tables):
            raise LookupError("embeddings of another kind")
        for (tokens, positions), most in zip((tables[:2], tables[2:]), (_TEXT, _CODES), strict=True):
            count = min(most, positions.num_embeddings)  # a model may be made for shorter sentences
            drawn = torch.randint(tokens.num_embeddings, (count,), generator=generator)
            parts.append(tokens.weight[drawn] + positions.weight[:count])
        return torch.cat(parts)[None]

    def _tables(self) -> tuple[Any, ...]:
        """Embeddings of text, its positions, codes and theirs."""
        gpt = self._networks.gpt
        positions = (getattr(table, "emb", None) for table in (gpt.text_pos_embedding, gpt.mel_pos_embedding))
        text, codes = zip((gpt.text_embedding, gpt.mel_embedding), positions, strict=True)
        return *text, *codes

    def _voice(self) -> Conditioning | None:
        """The graph of the voice encoder, unless it is another one or somebody hooked it."""
        with contextlib.suppress(Fallback):
            encoder, perceiver = conditioning_parts(self._networks)
            check_plain_conditioning(self._networks)
            return Conditioning(encoder, perceiver)
        return None
