"""The public verbs: patch, unpatch, patched, report, is_patched."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from neuron_xtts.buckets import BucketPlan
from neuron_xtts.report import Report
from neuron_xtts.target import check_ready, check_versions, find_xtts

Model = TypeVar("Model")

BACKENDS = ("auto", "cpu")
PRECISIONS = ("fp32",)


class Patch:
    """The engine of one model and the proxies that lead to it. It holds no reference to the ``Xtts`` itself."""

    def __init__(self, xtts: Any, *, buckets: BucketPlan | None, precision: str, strict: bool) -> None:
        from neuron_xtts.engine import Engine
        from neuron_xtts.proxy import Installation
        from neuron_xtts.routes.generate import GenerateRoute
        from neuron_xtts.routes.latents import LatentsMemo, LatentsRoute
        from neuron_xtts.routes.vocoder import VocoderRoute

        self.engine = Engine(xtts.gpt, xtts.hifigan_decoder, buckets=buckets, precision=precision, strict=strict)
        memo = LatentsMemo()
        vocoder = VocoderRoute(self.engine)
        routes: dict[str, tuple[Any, str, Callable[..., Any]]] = {
            GenerateRoute.name: (xtts.gpt, "generate", GenerateRoute(self.engine, memo)),
            LatentsRoute.name: (xtts.gpt, "forward", LatentsRoute(self.engine, memo)),
            "HifiDecoder.forward": (xtts.hifigan_decoder, "forward", vocoder.forward),
            "HifiDecoder.inference": (xtts.hifigan_decoder, "inference", vocoder.inference),
        }
        self.installations = {
            name: Installation(module, method, partial(self.engine.serve, name, route))
            for name, (module, method, route) in routes.items()
        }

    def gone(self, xtts: Any) -> list[str]:
        """Routes that calls no longer reach, because ``load_checkpoint`` or the user replaced what they were on."""
        modules = (xtts.gpt, xtts.hifigan_decoder)
        return [
            name
            for name, installation in self.installations.items()
            if not installation.live or not any(installation.module is module for module in modules)
        ]

    def remove(self) -> None:
        """Take every proxy off again."""
        for installation in reversed(self.installations.values()):
            installation.remove()


# Not an attribute of the model: unpatch must leave every __dict__ as it was, and a deepcopy must not inherit a patch.
_patches: weakref.WeakKeyDictionary[Any, Patch] = weakref.WeakKeyDictionary()


def patch(
    model: Model,
    *,
    backend: str = "auto",
    precision: str = "fp32",
    buckets: BucketPlan | None = None,
    strict: bool = False,
) -> Model:
    """Route the expensive calls of a coqui-tts XTTS model to graphs. Undone by `unpatch`.

    A model that is patched already is unpatched first.

    Args:
        model: a ``TTS.api.TTS``, a ``Synthesizer`` or an ``Xtts``, ready to synthesize.
        backend: where graphs run: ``"cpu"``, the host; ``"auto"`` is the host too, the only backend of this version.
        precision: of the graphs: ``"fp32"``, which gives coqui-tts's own audio.
        buckets: the sizes of the graphs; by default the backend's own: exact shapes on the host.
        strict: raise `FallbackError` where a call would fall back to coqui-tts.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is something else.
        ModelNotReadyError: no XTTS model is loaded in it.
        UnsupportedVersionError: coqui-tts, transformers or torch are of a version that is not supported.
        ValueError: an option has a value that does not exist.
    """
    check_versions()
    xtts = find_xtts(model)
    _check_option("backend", backend, BACKENDS)
    _check_option("precision", precision, PRECISIONS)
    if buckets is not None and not isinstance(buckets, BucketPlan):
        raise TypeError(f"buckets must be a neuron_xtts.BucketPlan or None, got a {type(buckets).__name__}")
    check_ready(xtts)
    unpatch(model)
    _patches[xtts] = Patch(xtts, buckets=buckets, precision=precision, strict=strict)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`: every object's ``__dict__`` is as it was found. Does nothing to a model that is not patched.

    Args:
        model: as for `patch`.

    Returns:
        ``model``.
    """
    found = _patches.pop(find_xtts(model), None)
    if found is not None:
        found.remove()
    return model


@contextmanager
def patched(model: Model, **options: Any) -> Iterator[Model]:
    """Patch ``model`` for the length of a ``with`` block.

    Args:
        model: as for `patch`.
        options: as for `patch`.
    """
    patch(model, **options)
    try:
        yield model
    finally:
        unpatch(model)


def is_patched(model: Any) -> bool:
    """Whether any route of ``model`` leads to graphs.

    Args:
        model: as for `patch`.
    """
    xtts = find_xtts(model)
    found = _patches.get(xtts)
    return found is not None and len(found.gone(xtts)) < len(found.installations)


def report(model: Any) -> Report:
    """What ran where since ``model`` was patched, and why not in a graph.

    Args:
        model: as for `patch`. The report of a model that is not patched says so.
    """
    xtts = find_xtts(model)
    found = _patches.get(xtts)
    if found is None:
        return Report()
    return found.engine.report(found.installations, found.gone(xtts))


def _check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} does not exist; choose one of {', '.join(map(repr, known))}")
