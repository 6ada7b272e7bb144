"""The route ``GPT.generate``: embed on the host, prefill once, one decode step per code, sample on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from neuron_xtts.coqui.embeddings import embed_prefix
from neuron_xtts.decoding.call import Call, Step
from neuron_xtts.decoding.row import Row, codes_of, make_rows
from neuron_xtts.decoding.sampling import Sampler, Sampling
from neuron_xtts.routes.base import Context, Method, check_fp32
from neuron_xtts.routes.seeds import drawing_from, generator_of, own_seeded


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
    prefix = embed_prefix(gpt, cond_latents, text_inputs)  # (B, P, D), the start code last
    call, steps = _say(context, sampling, prefix, generator_of(seed), text_inputs.shape[1])
    codes = codes_of(call.rows)
    if sampling.num_return_sequences == 1:
        latents = torch.stack([latents for _, latents in steps], dim=1)
        context.latents.store(gpt, cond_latents, text_inputs, codes, latents)
    if call.cache is None:
        return codes
    if not torch.is_inference_mode_enabled():  # in which it was made
        for layer in call.cache.layers:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    sequences = torch.stack([row.ids for row in call.rows])
    return codes, GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=call.cache)


def _say(
    context: Context, sampling: Sampling, prefix: Tensor, generator: torch.Generator | None, tokens: int
) -> tuple[Call, list[Step]]:
    """Decode the rows of a call, as far as a guard lets them, for a text of ``tokens``; returns its steps, too."""
    capped, tails = cap(context, sampling, tokens), context.guard

    def say(again: bool) -> tuple[Call, list[Step]]:
        rows = start(context, capped, prefix, generator)  # the second time it draws on
        with_cache = sampling.return_dict_in_generate
        call = Call(rows, prefix, context.runner.identity(), with_cache=with_cache, patient=again)
        return call, context.scheduler.run(call)

    if tails is None or capped is sampling:
        return say(False)
    return tails.best(say, lambda said: all(row.stopped for row in said[0].rows), draws=sampling.do_sample)


def cap(context: Context, sampling: Sampling, tokens: int) -> Sampling:
    """What a call asks for, but with no more codes than a guard lets a text of ``tokens`` have."""
    most = context.guard and context.guard.guard.cap(tokens, sampling.max_new_tokens, sampling.min_new_tokens)
    return replace(sampling, max_new_tokens=most) if most else sampling


def own_generate(context: Context, method: Method) -> Method:
    """coqui-tts's own ``GPT.generate``, which takes a ``seed``, and minds a guard, too."""
    tails = context.guard
    if tails is None:
        return own_seeded(context, method)
    guarded, gpt = tails, context.runner.networks.gpt

    def call(cond_latents: Tensor, text_inputs: Tensor, *, seed: int | None = None, **kwargs: Any) -> Any:
        most, generator = own_cap(context, text_inputs.shape[1], kwargs), generator_of(seed)
        limited = kwargs if most is None else kwargs | {"max_new_tokens": most}

        def say(again: bool) -> Any:
            with drawing_from(generator):
                return method(cond_latents, text_inputs, **limited)

        def ended(said: Any) -> bool:
            codes: Tensor = said[0] if isinstance(said, tuple) else said
            return codes.shape[1] < (most or 0) or bool((codes == gpt.stop_audio_token).any(1).all())

        return say(False) if most is None else guarded.best(say, ended, draws=bool(kwargs.get("do_sample")))

    return call


def own_cap(context: Context, tokens: int, kwargs: Mapping[str, Any]) -> int | None:
    """Codes that a guard lets coqui-tts make of a text of ``tokens``; None where that is no fewer than without it."""
    asked, least = kwargs.get("max_new_tokens"), kwargs.get("min_new_tokens")
    if context.guard is None or not all(value is None or isinstance(value, int) for value in (asked, least)):
        return None
    most = context.runner.networks.gpt.max_gen_mel_tokens if asked is None else asked
    return context.guard.guard.cap(tokens, most, least or 0)


def check(context: Context) -> None:
    """Raise `Fallback` unless the model's graphs can generate what it would generate now."""
    context.runner.require("prefill", context.runner.decoder)
    context.runner.check_state(context.runner.decoder)


def start(context: Context, sampling: Sampling, prefix: Tensor, generator: torch.Generator | None) -> list[Row]:
    """The rows of a call, from its ``prefix`` (B, P, D) on, and what their codes are drawn from."""
    gpt = context.runner.networks.gpt
    sampler = Sampler(sampling, prefix.shape[1], gpt.stop_audio_token, generator)
    return make_rows(sampler, prefix.shape[0] * sampling.num_return_sequences, gpt.start_audio_token)
