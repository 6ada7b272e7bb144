"""The route ``GPT.generate``: embed on the host, prefill once, one decode step per code, sample on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.generation import GenerateDecoderOnlyOutput

from neuron_xtts.engine import Engine
from neuron_xtts.errors import Fallback
from neuron_xtts.graphs.transformer import MASKED
from neuron_xtts.hooks import is_hooked
from neuron_xtts.routes.latents import LatentsMemo, check_trunk, embed_text
from neuron_xtts.sampling import Sampling


class GenerateRoute:
    """Audio codes of a text, as ``GPT.generate`` samples them.

    Args:
        engine: of the patched model.
        memo: where the latents go that decoding makes on the way.
    """

    name = "GPT.generate"

    def __init__(self, engine: Engine, memo: LatentsMemo) -> None:
        self.engine = engine
        self.memo = memo

    @torch.no_grad()
    def __call__(self, cond_latents: Tensor, text_inputs: Tensor, **kwargs: Any) -> Any:
        """Serve ``GPT.generate``.

        Args:
            cond_latents: (B, 32, D) conditioning latents.
            text_inputs: (B, T) text tokens.
            kwargs: of Hugging Face's ``generate``.

        Returns:
            codes (rows, N), the stop code included, where rows is B * num_return_sequences; with
            ``return_dict_in_generate`` a pair of them and transformers' ``GenerateDecoderOnlyOutput``.
        """
        gpt, engine = self.engine.gpt, self.engine
        sampling = Sampling.parse(kwargs, gpt.gpt_inference.generation_config, gpt.max_gen_mel_tokens)
        engine.require("prefill", "decode")
        check_trunk(gpt)
        if cond_latents.dtype != torch.float32:
            raise Fallback(f"conditioning latents of {cond_latents.dtype}")

        prefix = embed_prefix(gpt, cond_latents, text_inputs)  # (B, P, D), the start code last
        generation = Generation(engine, sampling, prefix)
        latents = [step_latents for _, step_latents in generation]
        codes = generation.ids[:, prefix.shape[1] :]
        if sampling.num_return_sequences == 1:
            self.memo.store(gpt, cond_latents, text_inputs, codes, torch.stack(latents, dim=1))
        if not sampling.return_dict_in_generate:
            return codes
        cache = generation.decoding.cache()
        return codes, GenerateDecoderOnlyOutput(sequences=generation.ids, past_key_values=cache)


class Generation:
    """The decode loop: one code per row and step, until all rows have stopped or enough were drawn.

    Iterating yields the codes (rows,) and latents (rows, D) of each step. A step is run when it is asked for.

    Args:
        engine: of the patched model.
        sampling: what was asked for.
        prefix: (B, P, D) embeddings, the start code last.

    Attributes:
        ids: (rows, P + N) the prefix as Hugging Face's loop sees it, and the codes so far.
    """

    def __init__(self, engine: Engine, sampling: Sampling, prefix: Tensor) -> None:
        self.engine = engine
        self.sampling = sampling
        self.prefix = prefix
        self.ids = torch.ones(prefix.shape[0] * sampling.num_return_sequences, prefix.shape[1], dtype=torch.long)
        self.ids[:, -1] = engine.gpt.start_audio_token  # as GPT.compute_embeddings makes them

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        gpt, sampling = self.engine.gpt, self.sampling
        self.decoding = Decoding(self.engine, self.prefix, sampling.num_return_sequences)
        processors = sampling.processors(self.prefix.shape[1], gpt.stop_audio_token)
        stopped: set[int] = set()  # rows
        for step, (latents, logits) in enumerate(self.decoding):
            codes = sampling.draw(processors, self.ids, logits)
            if stopped:
                codes[list(stopped)] = gpt.stop_audio_token
            self.ids = torch.cat([self.ids, codes[:, None]], dim=1)
            yield codes, latents
            stopped.update(row for row, code in enumerate(codes.tolist()) if code == gpt.stop_audio_token)
            if step + 1 == sampling.max_new_tokens or len(stopped) == len(self.ids):
                return
            self.decoding.feed(embed_code(gpt, codes, step + 1))


def embed_prefix(gpt: Any, cond_latents: Tensor, text_inputs: Tensor) -> Tensor:
    """Embeddings (B, P, D) of the conditioning latents, the text between its start and stop tokens, and the start code.

    As ``GPT.compute_embeddings`` and the first step of ``GPT2InferenceModel.forward`` make them.
    """
    start = torch.full((text_inputs.shape[0],), gpt.start_audio_token)
    return torch.cat([cond_latents, embed_text(gpt, text_inputs), embed_code(gpt, start, 0)], dim=1)


def embed_code(gpt: Any, codes: Tensor, position: int) -> Tensor:
    """Embeddings (B, 1, D) of one code (B,) per row at ``position`` of the audio."""
    positions = gpt.mel_pos_embedding
    if type(positions).__name__ == "LearnedPositionEmbeddings" and is_plain_table(positions.emb):
        position_embed = positions.emb.weight[position]  # a tenth of the loop faster
    else:
        position_embed = positions.get_fixed_embedding(position, codes.device)  # (1, 1, D)
    embeds: Tensor = gpt.mel_embedding(codes[:, None]) + position_embed
    return embeds


def is_plain_table(embedding: nn.Module) -> bool:
    """Whether calling ``embedding`` does nothing but look up rows."""
    return type(embedding) is nn.Embedding and not is_hooked(embedding)


class Decoding:
    """Rows decoding together: prefill, the decode graph's state, positions, mask and buckets.

    Iterating yields the latents (rows, D) and logits (rows, V) of each step, as long as `feed` is called in between.

    Args:
        engine: of the patched model.
        prefix: (B, P, D) embeddings.
        copies: rows that share a prefix; each prefix is run once.
    """

    def __init__(self, engine: Engine, prefix: Tensor, copies: int) -> None:
        self.engine = engine
        self.rows = prefix.shape[0] * copies
        self.length = prefix.shape[1]  # positions written so far
        self.slots, width = engine.buckets.choose("decode", self.rows, self.length + 1)
        self.state = engine.backend.new_state(self.slots, width)
        self.mask = prefix.new_empty(self.slots, 1, 1, 0)
        outputs = [self._prefill(row, embeds, copies) for row, embeds in enumerate(torch.split(prefix, 1))]
        self.latents, self.logits = (
            torch.cat(tensors).repeat_interleave(copies, 0) for tensors in zip(*outputs, strict=True)
        )
        self.embeds: Tensor | None = None

    def _prefill(self, row: int, embeds: Tensor, copies: int) -> tuple[Tensor, Tensor]:
        bucket = self.engine.buckets.choose("prefill", self.length)
        padded = F.pad(embeds, (0, 0, 0, bucket[0] - self.length))
        last = torch.tensor([self.length - 1], dtype=torch.int32)
        latents, logits, *keys_and_values = self.engine.run("prefill", bucket, self.length, padded, last)
        for slot in range(row * copies, (row + 1) * copies):
            self.state.fill(slot, keys_and_values, self.length)
        return latents, logits

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._checked(self.latents, self.logits)
        while self.embeds is not None:
            embeds, self.embeds = self.embeds, None
            yield self._step(embeds)

    def feed(self, embeds: Tensor) -> None:
        """Give the embeddings (rows, 1, D) of the next position."""
        self.embeds = embeds

    def _step(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        _, width = self.engine.buckets.choose("decode", self.slots, self.length + 1, exact=1)
        if width > self.state.positions:
            self.state.grow(width)
        spare = self.slots - self.rows
        positions = torch.tensor([self.length] * self.rows + [0] * spare, dtype=torch.int32)
        if spare:
            embeds = F.pad(embeds, (0, 0, 0, 0, 0, spare))
        mask = self._mask(width)
        self.length += 1
        latents, logits = self.engine.step(self.state, self.rows * self.length, embeds, positions, mask)
        return self._checked(latents[: self.rows], logits[: self.rows])

    def _mask(self, width: int) -> Tensor:
        """The mask (slots, 1, 1, width) of the step that writes position ``length``."""
        if self.rows == self.slots and self.length + 1 == width:
            return self.mask.new_zeros(self.slots, 1, 1, width)
        if self.mask.shape[-1] != width:
            self.mask = self.mask.new_full((self.slots, 1, 1, width), MASKED)
            self.mask[..., 0] = 0  # of a spare row too, which must see something
            self.mask[: self.rows, ..., : self.length] = 0
        self.mask[: self.rows, ..., self.length] = 0
        return self.mask

    @staticmethod
    def _checked(latents: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        if not math.isfinite(logits.sum()):
            raise Fallback("logits that are not finite")
        return latents, logits

    def cache(self) -> transformers.DynamicCache:
        """The keys and values so far, as transformers keeps them."""
        cache = transformers.DynamicCache()
        rows = [self.state.prefix(row, self.length) for row in range(self.rows)]
        for block, pairs in enumerate(zip(*rows, strict=True)):
            keys, values = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
            cache.update(keys, values, block)
        return cache
