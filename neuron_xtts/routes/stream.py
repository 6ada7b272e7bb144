"""The route ``GPT.get_generator``: the codes and latents that ``inference_stream`` pulls, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from neuron_xtts.coqui.embeddings import embed_start, text_tokens
from neuron_xtts.decoding.call import Call, Step
from neuron_xtts.decoding.caller import caller
from neuron_xtts.decoding.sampling import Sampling
from neuron_xtts.errors import Fallback
from neuron_xtts.routes.base import Context, Method, check_fp32
from neuron_xtts.routes.generate import cap, check, own_cap, start
from neuron_xtts.routes.listening import Listener
from neuron_xtts.routes.seeds import drawing_from, generator_of
from neuron_xtts.turns import now


def get_generator(
    context: Context, /, fake_inputs: Tensor, *, seed: int | None = None, **kwargs: Any
) -> Iterator[Step]:
    """Serve ``GPT.get_generator``; nothing is computed before the first step is asked for.

    Args:
        context: of the patched model.
        fake_inputs: (1, P) ids that stand for the prefix, as ``GPT.compute_embeddings`` returned them.
        seed: of a generator that codes are drawn from; None to draw from torch's global one.
        kwargs: of Hugging Face's ``generate``.

    Returns:
        an iterator of code (1,) and latents (1, D).
    """
    gpt = context.runner.networks.gpt
    for name in ("output_hidden_states", "return_dict_in_generate"):  # without them coqui-tts has no latents
        if not kwargs.pop(name, False):
            raise Fallback(f"argument {name}=False")
    sampling = Sampling.parse(kwargs, gpt.gpt_inference.generation_config, gpt.max_gen_mel_tokens)
    with context.runner.turns.pressing(now):
        check(context)
    prefix = prefix_of(context, fake_inputs)
    if sampling.num_return_sequences != 1 or fake_inputs.shape[0] != 1:
        raise Fallback("a stream of several rows")
    if prefix is None or prefix.shape[:2] != (1, fake_inputs.shape[1] - 1):
        raise Fallback("ids that do not fit the prefix on the model")
    check_fp32(a_prefix=prefix)
    # coqui-tts draws in a stream even if it was asked not to sample.
    prefix = torch.cat([prefix, embed_start(gpt, 1)], dim=1)
    capped = cap(context, sampling, text_tokens(fake_inputs.shape[1]))
    rows = start(context, replace(capped, draws=True), prefix, generator_of(seed))
    listener = Listener(context.runner.turns, caller())
    call = Call(rows, prefix, context.runner.identity(), streamed=True, urgency=listener.urgency)
    steps = context.scheduler.stream(call)
    if capped is not sampling:
        steps = _counted(context, steps, capped.max_new_tokens)
    return context.listening.to(listener, steps)


def _counted(context: Context, steps: Iterator[Step], most: int) -> Iterator[Step]:
    """The steps of a stream, which is counted if it ends at ``most`` of them: what was heard cannot be said again."""
    made, code = 0, None
    for code, latents in steps:
        made += 1
        yield code, latents
    stopped = code is not None and bool((code == context.runner.networks.gpt.stop_audio_token).all())
    if made == most and not stopped and context.tails is not None:
        context.tails.counters.capped()


def compute_embeddings(context: Context, method: Method, /, *args: Any, **kwargs: Any) -> Tensor:
    """Note the prefix that ``GPT.compute_embeddings`` puts on the model, for `get_generator`.

    There is one place for it, and threads that begin streams at the same time all put theirs there.
    """
    ids: Tensor = method(*args, **kwargs)
    context.prefixes[ids] = context.runner.networks.gpt.gpt_inference.cached_prefix_emb
    return ids


def prefix_of(context: Context, ids: Tensor) -> Tensor | None:
    """The prefix (B, P - 1, D) that ids (B, P) stand for; that on the model, if they are of somebody's own making."""
    if ids in context.prefixes:
        return context.prefixes[ids]
    return context.runner.networks.gpt.gpt_inference.cached_prefix_emb  # another object's once eval() has made one


def own_generator(context: Context, method: Method) -> Method:
    """coqui-tts's own ``GPT.get_generator``, which takes a ``seed``, too.

    Its steps have the prefix of their call, whatever others put on the model meanwhile.
    """
    gpt = context.runner.networks.gpt

    def call(fake_inputs: Tensor, *args: Any, seed: int | None = None, **kwargs: Any) -> Iterator[Step]:
        inference, prefix, generator = gpt.gpt_inference, prefix_of(context, fake_inputs), generator_of(seed)
        most = own_cap(context, text_tokens(fake_inputs.shape[1]), kwargs)
        steps = method(fake_inputs, *args, **kwargs)
        if most is not None:
            steps = _counted(context, islice(steps, most), most)

        def run() -> Iterator[Step]:
            while True:
                inference.store_prefix_emb(prefix)
                with drawing_from(generator):
                    step = next(steps, None)
                if step is None:
                    return
                yield step

        return run()

    return call
