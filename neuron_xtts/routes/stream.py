"""The route ``GPT.get_generator``: the codes and latents that ``inference_stream`` pulls, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neuron_xtts.engine import Engine
from neuron_xtts.errors import Fallback
from neuron_xtts.routes.generate import Generation, embed_code
from neuron_xtts.routes.latents import check_trunk
from neuron_xtts.sampling import Sampling

Step = tuple[Tensor, Tensor]


class StreamRoute:
    """Pairs of a code and its latents, as ``GPT.get_generator`` yields them.

    Args:
        engine: of the patched model.
    """

    name = "GPT.get_generator"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, fake_inputs: Tensor, **kwargs: Any) -> Iterator[Step]:
        """Serve ``GPT.get_generator``; nothing is computed before the first pair is asked for.

        Args:
            fake_inputs: (1, P) ids that stand for the prefix, which ``GPT.compute_embeddings`` has put on the model.
            kwargs: of Hugging Face's ``generate``.

        Returns:
            an iterator of code (1,) and latents (1, D).
        """
        gpt, engine = self.engine.gpt, self.engine
        for name in ("output_hidden_states", "return_dict_in_generate"):  # without them coqui-tts has no latents
            if not kwargs.pop(name, False):
                raise Fallback(f"argument {name}=False")
        sampling = Sampling.parse(kwargs, gpt.gpt_inference.generation_config, gpt.max_gen_mel_tokens)
        engine.require("prefill", "decode")
        check_trunk(gpt)
        prefix = gpt.gpt_inference.cached_prefix_emb
        if sampling.num_return_sequences != 1 or fake_inputs.shape[0] != 1:
            raise Fallback("a stream of several rows")
        if prefix is None or prefix.shape[:2] != (1, fake_inputs.shape[1] - 1):
            raise Fallback("ids that do not fit the prefix on the model")
        if prefix.dtype != torch.float32:
            raise Fallback(f"a prefix of {prefix.dtype}")
        start = embed_code(gpt, torch.full((1,), gpt.start_audio_token), 0)
        # coqui-tts draws in a stream even if it was asked not to sample.
        return iter(Generation(engine, replace(sampling, draws=True), torch.cat([prefix, start], dim=1)))

    def original(self, wrapped: Callable[..., Iterator[Step]], *args: Any, **kwargs: Any) -> Iterator[Step]:
        """coqui-tts's own generator of the same call, whatever other streams put on the model meanwhile."""
        inference = self.engine.gpt.gpt_inference
        prefix = inference.cached_prefix_emb
        steps = wrapped(*args, **kwargs)

        def run() -> Iterator[Step]:
            while True:
                inference.store_prefix_emb(prefix)
                try:
                    yield next(steps)
                except StopIteration:
                    return

        return run()
