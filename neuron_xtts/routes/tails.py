"""The routes ``Xtts.inference`` and ``Xtts.inference_stream``: a guard cuts off the silence at their end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from neuron_xtts.guard import Guarding, Tail
from neuron_xtts.routes.base import Context, Method


def inference(context: Context, method: Method, /, *args: Any, **kwargs: Any) -> Any:
    """What ``Xtts.inference`` gives, its ``wav`` (samples,) without the silence at the end."""
    result = method(*args, **kwargs)
    guarding = context.guarding
    if guarding is None or not guarding.guard.trim or result["wav"].ndim != 1:
        return result
    tail = Tail(guarding.guard, guarding.rate)
    given = tail.give(torch.from_numpy(result["wav"]))
    rest, cut = tail.rest()
    guarding.trimmed(cut)
    return {**result, "wav": result["wav"][: len(given) + len(rest)]}


def inference_stream(context: Context, method: Method, /, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
    """What ``Xtts.inference_stream`` gives: chunks (samples,), the last of them without the silence at the end."""
    chunks = method(*args, **kwargs)
    guarding = context.guarding
    return chunks if guarding is None or not guarding.guard.trim else _without_tail(chunks, guarding)


def _without_tail(chunks: Any, guarding: Guarding) -> Iterator[Tensor]:
    tail = Tail(guarding.guard, guarding.rate)
    try:
        for chunk in chunks:
            given = tail.give(chunk)
            if len(given):
                yield given
    finally:
        chunks.close()
    rest, cut = tail.rest()
    guarding.trimmed(cut)
    if len(rest):
        yield rest
