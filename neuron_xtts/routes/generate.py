"""The route ``GPT.generate``: embed on the host, prefill once, one decode step per code, sample on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from neuron_xtts.coqui.embeddings import embed_prefix
from neuron_xtts.decoding.row import Row, codes_of, make_rows
from neuron_xtts.decoding.sampling import Sampler, Sampling
from neuron_xtts.decoding.scheduler import Call
from neuron_xtts.routes.base import Context, check_fp32
from neuron_xtts.routes.seeds import generator_of


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
    rows = start(context, sampling, prefix, generator_of(seed))
    call = Call(rows, prefix, context.runner.identity(), with_cache=sampling.return_dict_in_generate)
    latents = [latents for _, latents in context.scheduler.run(call)]
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


def check(context: Context) -> None:
    """Raise `Fallback` unless the model's graphs can generate what it would generate now."""
    context.runner.require("prefill", context.runner.decoder)
    context.runner.check_state(context.runner.decoder)


def start(context: Context, sampling: Sampling, prefix: Tensor, generator: torch.Generator | None) -> list[Row]:
    """The rows of a call, from its ``prefix`` (B, P, D) on, and what their codes are drawn from."""
    gpt = context.runner.networks.gpt
    sampler = Sampler(sampling, prefix.shape[1], gpt.stop_audio_token, generator)
    return make_rows(sampler, prefix.shape[0] * sampling.num_return_sequences, gpt.start_audio_token)
