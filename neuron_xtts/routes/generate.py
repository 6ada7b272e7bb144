"""The route ``GPT.generate``: embed on the host, prefill once, one decode step per code, sample on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from neuron_xtts.coqui.embeddings import embed_prefix
from neuron_xtts.decoding.row import Row, codes_of, make_rows
from neuron_xtts.decoding.sampling import Sampler, Sampling
from neuron_xtts.decoding.scheduler import Call
from neuron_xtts.errors import Fallback, QueueFullError
from neuron_xtts.routes.base import Context, Method, check_fp32, disabled
from neuron_xtts.routes.seeds import generator_of, own_seeded


@torch.no_grad()
def generate(
    context: Context, /, cond_latents: Tensor, text_inputs: Tensor, *, seed: int | None = None, **kwargs: Any
) -> Any:
    """Serve ``GPT.generate``.

    Args:
        context: of the patched model.
        cond_latents: (B, 32, D) conditioning latents.
        text_inputs: (B, T) text tokens.
        seed: of a generator that codes are drawn from; None to draw from torch's global one.
        kwargs: of Hugging Face's ``generate``.

    Returns:
        codes (rows, N), the stop code included, where rows is B * num_return_sequences; with
        ``return_dict_in_generate`` a pair of them and transformers' ``GenerateDecoderOnlyOutput``.
    """
    gpt = context.runner.networks.gpt
    sampling = Sampling.parse(kwargs, gpt.gpt_inference.generation_config, gpt.max_gen_mel_tokens)
    check(context)
    check_fp32(conditioning_latents=cond_latents)
    limited = within_limit(context, sampling, text_inputs.shape[1])
    prefix = embed_prefix(gpt, cond_latents, text_inputs)  # (B, P, D), the start code last
    generator = generator_of(seed)
    made = _make(context, limited, prefix, generator)
    if limited is not sampling and not _ended(made):
        made = _another_try(context, limited, prefix, generator, made)
    rows, call, latents = made
    codes = codes_of(rows)
    if sampling.num_return_sequences == 1:
        context.latents.store(gpt, cond_latents, text_inputs, codes, torch.stack(latents, dim=1))
    if call.cache is None:
        return codes
    if not torch.is_inference_mode_enabled():  # in which it was made
        for layer in call.cache.layers:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    sequences = torch.stack([row.ids for row in rows])
    return codes, GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=call.cache)


Made = tuple[list[Row], Call, list[Tensor]]


def _make(context: Context, sampling: Sampling, prefix: Tensor, generator: torch.Generator | None) -> Made:
    """Rows that are over, the call that they were, and the latents (rows, D) of every position."""
    rows = start(context, sampling, prefix, generator)
    call = Call(rows, prefix, context.runner.identity(), with_cache=sampling.return_dict_in_generate)
    return rows, call, [latents for _, latents in context.scheduler.run(call)]


def _ended(made: Made) -> bool:
    return all(row.stopped for row in made[0])


def _another_try(
    context: Context, sampling: Sampling, prefix: Tensor, generator: torch.Generator | None, first: Made
) -> Made:
    """Of two tries, the second with the draws that follow, what ends by itself; else, or without it, the first."""
    assert context.guarding is not None
    if not context.guarding.guard.retry:
        context.guarding.capped()
        return first
    try:
        second = _make(context, sampling, prefix, generator)
    except (Fallback, QueueFullError):
        context.guarding.capped()
        return first
    context.guarding.capped(retried=True, ended=_ended(second))
    return second if _ended(second) else first


def within_limit(context: Context, sampling: Sampling, tokens: int) -> Sampling:
    """The sampling of a text of so many tokens, where a guard limits it; else the same object."""
    limit = sampling.max_new_tokens if context.guarding is None else context.guarding.guard.limit(tokens)
    limit = max(limit, sampling.min_new_tokens)
    return sampling if limit >= sampling.max_new_tokens else replace(sampling, max_new_tokens=limit)


def own_generate(context: Context, method: Method) -> Method:
    """coqui-tts's own ``GPT.generate``, which takes a ``seed``, too, and keeps within the limit of a guard."""
    seeded = own_seeded(context, method)

    def call(cond_latents: Tensor, text_inputs: Tensor, **kwargs: Any) -> Any:
        return seeded(cond_latents, text_inputs, **limited(context, kwargs, text_inputs.shape[1]))

    return call


def limited(context: Context, kwargs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Arguments of Hugging Face's ``generate`` within the limit of a guard, for a text of so many tokens."""
    if context.guarding is None or disabled():
        return kwargs
    gpt = context.runner.networks.gpt
    asked = kwargs.get("max_new_tokens") or gpt.max_gen_mel_tokens
    limit = max(context.guarding.guard.limit(tokens), kwargs.get("min_new_tokens") or 0)
    return {**kwargs, "max_new_tokens": limit} if limit < asked else kwargs


def check(context: Context) -> None:
    """Raise `Fallback` unless the model's graphs can generate what it would generate now."""
    context.runner.require("prefill", context.runner.decoder)
    context.runner.check_state(context.runner.decoder)


def start(context: Context, sampling: Sampling, prefix: Tensor, generator: torch.Generator | None) -> list[Row]:
    """The rows of a call, from its ``prefix`` (B, P, D) on, and what their codes are drawn from."""
    gpt = context.runner.networks.gpt
    sampler = Sampler(sampling, prefix.shape[1], gpt.stop_audio_token, generator)
    return make_rows(sampler, prefix.shape[0] * sampling.num_return_sequences, gpt.start_audio_token)
