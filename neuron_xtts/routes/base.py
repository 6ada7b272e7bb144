"""What a route is: one method of coqui-tts that is proxied, and its translation into graph calls."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from neuron_xtts.coqui.surface import Xtts
from neuron_xtts.decoding.scheduler import Scheduler
from neuron_xtts.errors import Fallback
from neuron_xtts.routes.listening import Listening
from neuron_xtts.routes.memo import AudioMemo, LatentsMemo, VoiceMemo
from neuron_xtts.routes.tails import Tails
from neuron_xtts.runner import Runner
from neuron_xtts.timeline import Phase

Method = Callable[..., Any]
Result = TypeVar("Result")

DISABLE_VARIABLE = "NEURON_XTTS_DISABLE"

# The attributes of an ``Xtts`` that hold what has routed methods, and what that is called; "" is the Xtts itself.
OWNERS = {"": "Xtts", "gpt": "GPT", "hifigan_decoder": "HifiDecoder"}


class Kind(Enum):
    """What ``Route.call`` returns, and so how a call is served."""

    WHOLE = "the result"
    STEPS = "an iterator, which is pulled one step at a time"
    REMEMBERED = "what identifies the result, which coqui-tts computes once"
    NOTED = "the method's own result, of which something is noted for another route"
    FINISHED = "the method's own result, of which a tail is cut off; there only where there is a guard"


@dataclass(eq=False)
class Context:
    """What a route serves a call with: an engine, and what all engines of one patched model share.

    Attributes:
        runner: of the graphs of the engine.
        scheduler: of the rows that decode on it.
        xtts: the model; no reference to it is kept.
        latents: of the latest generations.
        audio: of the latest calls of the vocoder.
        voices: by the name of the route that remembers them.
        listening: which stream a thread is at.
        prefixes: (B, P - 1, D) without the start code, by the ids (B, P) that stand for each.
        tails: what keeps the model from them; None without a guard.
    """

    runner: Runner
    scheduler: Scheduler
    xtts: weakref.ref[Xtts]
    latents: LatentsMemo
    audio: AudioMemo
    voices: dict[str, VoiceMemo]
    listening: Listening
    prefixes: MutableMapping[Tensor, Tensor | None]
    tails: Tails | None

    @property
    def guard(self) -> Tails | None:
        """What keeps the model from tails now: nothing while the user has turned every route off."""
        return None if self.tails is None or disabled() else self.tails


@dataclass
class HandedOver(Generic[Result]):
    """A result that was already there. A route returns it in place of the result itself, so that it is counted."""

    result: Result


def disabled() -> bool:
    """Whether the user turned every route off."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


def check_fp32(**tensors: Tensor) -> None:
    """Raise `Fallback` unless every tensor is in fp32, with its name, in which ``_`` stands for a space."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise Fallback(f"{name.replace('_', ' ')} of {tensor.dtype}")


def anything(arguments: Mapping[str, Any]) -> None:
    """Refuse no arguments."""


def as_it_is(context: Context, method: Method) -> Method:
    """coqui-tts's own method, without further ado."""
    return method


@dataclass(frozen=True)
class Route:
    """One method of coqui-tts, and what serves its calls in place of it.

    Attributes:
        owner: the attribute of the ``Xtts`` whose method it is, of `OWNERS`.
        method: its name.
        call: ``call(context, *args, **kwargs)`` with the arguments of the method; of a remembered, noted or finished
            result ``call(context, method, *args, **kwargs)``. Raises `Fallback`, or anything else, if coqui-tts must
            serve it.
        phase: what an utterance is at in it.
        kind: what ``call`` returns.
        own: ``own(context, method)`` is coqui-tts's method as a fallback calls it.
        check: raises, before anything is tried, for keyword arguments that are ours and mean nothing.
        draws: whether it draws from torch's global generator, unless it is given a ``seed``.
    """

    owner: str
    method: str
    call: Callable[..., Any]
    phase: Phase
    kind: Kind = Kind.WHOLE
    own: Callable[[Context, Method], Method] = as_it_is
    check: Callable[[Mapping[str, Any]], None] = anything
    draws: bool = False

    @property
    def name(self) -> str:
        """The route as reports and errors write it, such as ``GPT.generate``."""
        return f"{OWNERS[self.owner]}.{self.method}"

    def module(self, xtts: Xtts) -> nn.Module:
        """The module of a model whose method it is."""
        found: Any = getattr(xtts, self.owner) if self.owner else xtts
        module: nn.Module = found
        return module
