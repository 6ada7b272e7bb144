"""A stopwatch for the stages of a sentence, and what tells that a code was made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from neuron_xtts.patching.patch import find_patch
from neuron_xtts.patching.proxy import Installation


@contextmanager
def each_code(xtts: Any, tick: Callable[..., None]) -> Iterator[None]:
    """Call ``tick`` for every code that is embedded, which each is once, patched or not, for the length of a block.

    Where a device embeds codes itself nothing is called: a hook would keep them from its graphs.
    """
    found = find_patch(xtts)
    if found is not None and found.runner.steps > 1:
        yield
        return
    hook = xtts.gpt.mel_embedding.register_forward_hook(tick)
    try:
        yield
    finally:
        hook.remove()


class Stopwatch:
    """Seconds that ``Xtts`` spends in each stage of a sentence, patched or not.

    A context manager: it wraps the stages' methods, on top of a patch if there is one, and unwraps them at the end.

    Args:
        xtts: the model.

    Attributes:
        seconds: time so far, by stage.
    """

    STAGES = ("voice", "codes", "latents", "vocoder")

    def __init__(self, xtts: Any) -> None:
        self.seconds = dict.fromkeys(self.STAGES, 0.0)
        self._methods = {
            "voice": (xtts, "get_conditioning_latents"),
            "codes": (xtts.gpt, "generate"),
            "latents": (xtts.gpt, "forward"),
            "vocoder": (xtts.hifigan_decoder, "forward"),
        }

    def __enter__(self) -> Stopwatch:
        self._installations = [
            Installation(module, method).install(partial(self._time, stage))
            for stage, (module, method) in self._methods.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for installation in self._installations:
            installation.remove()

    def _time(
        self, stage: str, wrapped: Callable[..., Any], args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Any:
        start = time.perf_counter()
        try:
            return wrapped(*args, **kwargs)
        finally:
            self.seconds[stage] += time.perf_counter() - start
