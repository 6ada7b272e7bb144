"""A stopwatch for the stages of a sentence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from neuron_xtts.patching.proxy import Installation


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
