"""The routes ``Xtts.get_conditioning_latents`` and ``.get_speaker_embedding``: a known voice is not computed again.

``tts.tts(..., speaker_wav=...)`` computes the voice of a recording at every call. Here it is found by the content of
the recording, so that neither a copied file is new nor a changed one known. coqui-tts computes what is not known,
through whatever other routes lead to graphs.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_xtts.coqui.hooks import check_unhooked
from neuron_xtts.coqui.surface import Networks
from neuron_xtts.coqui.voices import encoders_of
from neuron_xtts.coqui.weights import file_digest, stamp, tensor_digest
from neuron_xtts.errors import Fallback
from neuron_xtts.routes.base import Context, Method


def get_conditioning_latents(context: Context, method: Method, /, *args: Any, **kwargs: Any) -> Hashable:
    """What identifies the conditioning latents and the speaker embedding of one file or several."""
    call = _Call(context, method, args, kwargs)
    return call.key("audio_path", _files)


def get_speaker_embedding(context: Context, method: Method, /, *args: Any, **kwargs: Any) -> Hashable:
    """What identifies the speaker embedding of samples."""
    call = _Call(context, method, args, kwargs)
    return call.key("audio", _samples)


@dataclass(frozen=True)
class _Call:
    """A call of a method that makes a voice of a recording."""

    context: Context
    method: Method
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def key(self, recording: str, identify: Callable[[object], Hashable]) -> Hashable:
        """Everything that the result depends on. Raises `Fallback` if it cannot be said.

        Args:
            recording: the argument with the recording.
            identify: makes what stands for its content.
        """
        xtts = self.context.xtts()
        if xtts is None or Networks.of(xtts) != self.context.runner.networks:
            raise Fallback("the model's modules were replaced after patch()")
        modules, tensors = encoders_of(xtts)
        if any(module.training for module in modules):
            raise Fallback("training mode")
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise Fallback("autocast")
        check_unhooked(modules)
        try:
            call = inspect.signature(self.method).bind(*self.args, **self.kwargs)
        except TypeError:
            raise Fallback("arguments that the method does not take") from None
        call.apply_defaults()
        content = identify(call.arguments.pop(recording, None))  # a wrapper may hide its name
        # By repr: 6 is not 6.0, with which coqui-tts raises.
        return content, repr(call.arguments), tuple(map(id, modules)), stamp(tensors)


def _files(recording: Any) -> Hashable:
    """The digests of the files."""
    paths = recording if isinstance(recording, list) else [recording]
    # A pipe is none: reading it here would leave nothing for coqui-tts.
    if not all(isinstance(path, (str, os.PathLike)) and os.path.isfile(path) for path in paths):
        raise Fallback("a reference that is not a file")
    return tuple(file_digest(Path(path)) for path in paths)


def _samples(recording: object) -> Hashable:
    """The digest of the samples."""
    if not isinstance(recording, Tensor):
        raise Fallback("a reference that is not a tensor")
    return tensor_digest(recording), recording.device
