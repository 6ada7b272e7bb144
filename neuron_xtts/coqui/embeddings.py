"""What coqui-tts puts in front of the trunk, on the host: embeddings of text, codes and their positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuron_xtts.coqui.constants import CONDITIONING_LATENTS
from neuron_xtts.coqui.hooks import is_hooked
from neuron_xtts.coqui.surface import Gpt, Positions


def embed_text(gpt: Gpt, text: Tensor) -> Tensor:
    """Embeddings (B, T + 2, D) of ``text`` (B, T) between its start and stop tokens."""
    text = F.pad(F.pad(text, (0, 1), value=gpt.stop_text_token), (1, 0), value=gpt.start_text_token)
    embeds: Tensor = gpt.text_embedding(text) + gpt.text_pos_embedding(text)
    return embeds


def embed_prefix(gpt: Gpt, cond_latents: Tensor, text_inputs: Tensor) -> Tensor:
    """Embeddings (B, P, D) of the conditioning latents, the text between its start and stop tokens, and the start code.

    As ``GPT.compute_embeddings`` and the first step of ``GPT2InferenceModel.forward`` make them.
    """
    return torch.cat([cond_latents, embed_text(gpt, text_inputs), embed_start(gpt, len(text_inputs))], dim=1)


def text_tokens(prefix_length: int) -> int:
    """How many text tokens are in a prefix of so many positions, as `embed_prefix` makes them."""
    return prefix_length - CONDITIONING_LATENTS - 3  # start and stop token, start code


def embed_start(gpt: Gpt, rows: int) -> Tensor:
    """Embeddings (rows, 1, D) of the start code, which ends every prefix."""
    return embed_codes(gpt, torch.full((rows,), gpt.start_audio_token), [0] * rows)


def embed_codes(gpt: Gpt, codes: Tensor, positions: Sequence[int]) -> Tensor:
    """Embeddings (B, 1, D) of one code (B,) per row, each at a position of its own in the audio."""
    embeds: Tensor = gpt.mel_embedding(codes[:, None]) + _at(gpt.mel_pos_embedding, positions, codes)
    return embeds


def _at(table: Positions, positions: Sequence[int], codes: Tensor) -> Tensor:
    """Embeddings (B or 1, 1, D) of positions; (1, 1, D) if all are the same."""
    if len(set(positions)) == 1:
        positions = positions[:1]
    if type(table).__name__ == "LearnedPositionEmbeddings" and is_plain_table(table.emb):
        # A tenth of the loop faster than a call for each.
        weight = table.emb.weight
        return weight[positions[0]] if len(positions) == 1 else weight[list(positions)][:, None]
    return torch.cat([table.get_fixed_embedding(position, codes.device) for position in positions])


def is_plain_table(embedding: nn.Module) -> bool:
    """Whether calling ``embedding`` does nothing but look up rows."""
    return type(embedding) is nn.Embedding and not is_hooked(embedding)
