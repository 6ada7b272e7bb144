"""Seeds: what the codes of a call are drawn with if it has a seed of its own.

coqui-tts knows torch's global generator alone. Where it serves a call that has a seed, the global generator is lent to
the call, and is afterwards as if there had been none.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from neuron_xtts.locks import Lock
from neuron_xtts.routes.base import Context, Method

_lent = Lock()  # torch's global generator, to one call with a seed at a time


def generator_of(seed: Any) -> torch.Generator | None:
    """The generator of a call with ``seed``; None without one: torch's global generator.

    Raises:
        ValueError: the seed is none.
    """
    if seed is None:
        return None
    try:
        if isinstance(seed, bool):
            raise TypeError
        return torch.Generator().manual_seed(operator.index(seed))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(
            f"seed={seed!r}; expected a whole number from -2**63 to 2**64 - 1, or None to draw from torch's global "
            "generator"
        ) from None


def check_seed(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if the ``seed`` among the arguments of a call is none."""
    generator_of(arguments.get("seed"))


@contextlib.contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Have torch draw from ``generator`` where it knows its global one alone; None: from that one, as it is."""
    if generator is None:
        yield
        return
    with _lent:
        before = torch.get_rng_state()
        torch.set_rng_state(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)


def own_seeded(context: Context, method: Method) -> Method:
    """coqui-tts's own method, which takes a ``seed``, too."""

    def call(*args: Any, seed: int | None = None, **kwargs: Any) -> Any:
        with drawing_from(generator_of(seed)):
            return method(*args, **kwargs)

    return call
