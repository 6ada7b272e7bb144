"""The route ``GPT.get_generator``: the codes and latents that ``inference_stream`` pulls, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neuron_xtts.coqui.embeddings import embed_start
from neuron_xtts.decoding.batch import Batch, Step, decode
from neuron_xtts.decoding.sampling import Sampling
from neuron_xtts.errors import Fallback
from neuron_xtts.routes.base import Context, Method, check_fp32
from neuron_xtts.routes.generate import check, start


def get_generator(context: Context, /, fake_inputs: Tensor, **kwargs: Any) -> Iterator[Step]:
    """Serve ``GPT.get_generator``; nothing is computed before the first step is asked for.

    Args:
        context: of the patched model.
        fake_inputs: (1, P) ids that stand for the prefix, which ``GPT.compute_embeddings`` has put on the model.
        kwargs: of Hugging Face's ``generate``.

    Returns:
        an iterator of code (1,) and latents (1, D).
    """
    gpt = context.runner.networks.gpt
    for name in ("output_hidden_states", "return_dict_in_generate"):  # without them coqui-tts has no latents
        if not kwargs.pop(name, False):
            raise Fallback(f"argument {name}=False")
    sampling = Sampling.parse(kwargs, gpt.gpt_inference.generation_config, gpt.max_gen_mel_tokens)
    check(context)
    prefix = gpt.gpt_inference.cached_prefix_emb
    if sampling.num_return_sequences != 1 or fake_inputs.shape[0] != 1:
        raise Fallback("a stream of several rows")
    if prefix is None or prefix.shape[:2] != (1, fake_inputs.shape[1] - 1):
        raise Fallback("ids that do not fit the prefix on the model")
    check_fp32(a_prefix=prefix)
    # coqui-tts draws in a stream even if it was asked not to sample.
    return _steps(context, replace(sampling, draws=True), torch.cat([prefix, embed_start(gpt, 1)], dim=1))


def _steps(context: Context, sampling: Sampling, prefix: Tensor) -> Iterator[Step]:
    rows = start(context, sampling, prefix)
    batch = Batch(context.runner, len(rows), prefix.shape[1])
    try:
        yield from decode(context.runner.networks.gpt, batch, rows, prefix)
    finally:
        batch.release(rows)


def own_generator(context: Context, method: Method) -> Method:
    """coqui-tts's own ``GPT.get_generator``, with the prefix of its call whatever others put on the model meanwhile."""
    inference = context.runner.networks.gpt.gpt_inference

    def call(*args: Any, **kwargs: Any) -> Iterator[Step]:
        prefix = inference.cached_prefix_emb
        steps = method(*args, **kwargs)

        def run() -> Iterator[Step]:
            while True:
                inference.store_prefix_emb(prefix)
                try:
                    yield next(steps)
                except StopIteration:
                    return

        return run()

    return call
