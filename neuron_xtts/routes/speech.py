"""The routes ``Xtts.inference`` and ``.inference_stream``, where there is a guard: speech without its tail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from neuron_xtts.coqui.surface import Networks
from neuron_xtts.routes.base import Context, Method
from neuron_xtts.routes.tails import Tails


def inference(context: Context, method: Method, /, *args: Any, **kwargs: Any) -> Any:
    """What ``Xtts.inference`` returns, its ``wav`` without the tail; latents are those of all codes."""
    result = method(*args, **kwargs)
    tails = _tails(context)
    return result if tails is None else result | {"wav": tails.trimmed(result["wav"])}


def inference_stream(context: Context, method: Method, /, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
    """The chunks of ``Xtts.inference_stream`` without the tail; nothing begins before the first is asked for."""
    chunks: Iterator[Tensor] = method(*args, **kwargs)
    tails = _tails(context)
    return chunks if tails is None else _finished(tails, chunks)


@torch.inference_mode()  # as coqui-tts makes them
def _finished(tails: Tails, chunks: Any) -> Iterator[Tensor]:
    try:
        yield from tails.held_back(chunks)
    finally:
        if hasattr(chunks, "close"):  # a wrapper's may be any iterator
            chunks.close()  # not when it is collected: its row is to leave now


def _tails(context: Context) -> Tails | None:
    """The guard of a model whose networks are those that were patched."""
    xtts = context.xtts()
    patched = xtts is not None and Networks.of(xtts) == context.runner.networks
    return context.guard if patched else None
