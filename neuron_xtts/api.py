"""The public verbs: patch, unpatch, patched, compile, report, is_patched."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from neuron_xtts.buckets import BucketPlan
from neuron_xtts.options import VOICES, Options
from neuron_xtts.precision import Precision
from neuron_xtts.report import Report
from neuron_xtts.target import check_ready, check_versions, find_xtts

if TYPE_CHECKING:
    from neuron_xtts.compiler import CompileSummary

Model = TypeVar("Model")
PathLike = str | os.PathLike[str]
Handler = Callable[..., Any]


class Patch:
    """The engine of one model and the proxies that lead to it.

    It holds no reference to the ``Xtts``, and nothing but its proxies holds it: model and patch are freed together.
    """

    def __init__(self, xtts: Any, options: Options, *, strict: bool, voice_cache: int) -> None:
        from neuron_xtts.engine import Engine
        from neuron_xtts.proxy import Installation
        from neuron_xtts.routes.conditioning import ConditioningRoute
        from neuron_xtts.routes.generate import GenerateRoute
        from neuron_xtts.routes.latents import LatentsMemo, LatentsRoute
        from neuron_xtts.routes.stream import StreamRoute
        from neuron_xtts.routes.vocoder import VocoderRoute
        from neuron_xtts.routes.voice import ConditioningLatentsRoute, SpeakerEmbeddingRoute

        gpt, decoder = xtts.gpt, xtts.hifigan_decoder
        engine = self.engine = Engine(gpt, decoder, options.make_backend, strict=strict)
        memo, vocoder, stream = LatentsMemo(), VocoderRoute(engine), StreamRoute(engine)

        def serve(name: str, route: Callable[..., Any]) -> Handler:
            return partial(engine.serve, name, route)

        handlers: dict[str, tuple[Any, str, Handler]] = {
            ConditioningRoute.name: (gpt, "get_style_emb", serve(ConditioningRoute.name, ConditioningRoute(engine))),
            GenerateRoute.name: (gpt, "generate", serve(GenerateRoute.name, GenerateRoute(engine, memo))),
            LatentsRoute.name: (gpt, "forward", serve(LatentsRoute.name, LatentsRoute(engine, memo))),
            vocoder.FORWARD: (decoder, "forward", serve(vocoder.FORWARD, vocoder.forward)),
            vocoder.INFERENCE: (decoder, "inference", serve(vocoder.INFERENCE, vocoder.inference)),
            stream.name: (gpt, "get_generator", partial(engine.stream, stream.name, stream)),
        }
        for voice in (ConditioningLatentsRoute, SpeakerEmbeddingRoute):
            handlers[voice.name] = xtts, voice.name.removeprefix("Xtts."), voice(xtts, engine, voice_cache)
        self.installations = {name: Installation(*handler, owner=self) for name, handler in handlers.items()}

    def gone(self, xtts: Any) -> list[str]:
        """Routes that calls no longer reach, because ``load_checkpoint`` or the user replaced what they were on."""
        modules = [xtts.gpt, xtts.hifigan_decoder]
        if xtts.gpt is self.engine.gpt and xtts.hifigan_decoder is self.engine.decoder:
            modules.append(xtts)  # else its routes lead to the voices of other encoders
        return [name for name, installation in self.installations.items() if not installation.is_on(*modules)]

    def remove(self) -> None:
        """Take every proxy off again, and leave the weights as they were found."""
        for installation in reversed(self.installations.values()):
            installation.remove()
        self.engine.backend.close()


# Not an attribute of the model: unpatch must leave every __dict__ as it was, and a deepcopy must not inherit a patch.
_patches: weakref.WeakKeyDictionary[Any, weakref.ref[Patch]] = weakref.WeakKeyDictionary()


def find_patch(xtts: Any) -> Patch | None:
    """The patch of a model, if it has one."""
    reference = _patches.get(xtts)
    return None if reference is None else reference()


def patch(
    model: Model,
    *,
    backend: str = "auto",
    precision: str | Precision = "fp32",
    buckets: BucketPlan | None = None,
    store: PathLike | None = None,
    strict: bool = False,
    voice_cache: int = VOICES,
) -> Model:
    """Route the expensive calls of a coqui-tts XTTS model to graphs. Undone by `unpatch`.

    A model that is patched already is unpatched first. Nothing is compiled: on Neuron, graphs that the store does not
    hold are named in a warning and in `report`, and coqui-tts serves their calls.

    Args:
        model: a ``TTS.api.TTS``, a ``Synthesizer`` or an ``Xtts``, ready to synthesize.
        backend: where graphs run: ``"cpu"``, the host; ``"neuron"``, or ``"neuron:1"`` to name the NeuronCore, counted
            among those the process may use; ``"auto"``: Neuron if its packages and a device are there, else the host.
        precision: of the graphs: ``"fp32"``, which on the host gives coqui-tts's own audio; ``"bf16"``; on the host
            also ``"int8"``, on Neuron ``"bf16-all"``; or a `Precision`, which has more to say.
        buckets: the sizes of the graphs; by default the backend's own: on the host exact shapes but for the vocoder,
            `BucketPlan.static` on Neuron.
        store: folder of the compiled graphs; by default what NEURON_XTTS_CACHE names, else the user's cache folder.
        strict: raise `FallbackError` where a call would fall back to coqui-tts.
        voice_cache: how many voices to remember, by the content of their recordings; 0 to compute each at every call.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is something else.
        ModelNotReadyError: no XTTS model is loaded in it.
        UnsupportedVersionError: coqui-tts, transformers or torch are of a version that is not supported.
        NeuronMissingError: ``backend="neuron"`` where Neuron's packages, its driver or a device are not there.
        ValueError: an option has a value that does not exist.
    """
    check_versions()
    xtts = find_xtts(model)
    options = Options.make(backend, precision, buckets, store, to_run=True)
    if type(voice_cache) is not int or voice_cache < 0:
        raise ValueError(f"voice_cache={voice_cache!r}; expected how many voices to remember, or 0 for none")
    check_ready(xtts)
    unpatch(model)
    _patches[xtts] = weakref.ref(Patch(xtts, options, strict=strict, voice_cache=voice_cache))
    return model


def compile(
    model: Any,
    *,
    backend: str = "auto",
    precision: str | Precision = "fp32",
    buckets: BucketPlan | None = None,
    store: PathLike | None = None,
    progress: bool = True,
    target: str | None = None,
    jobs: int | None = None,
    timeout: float | None = None,
) -> CompileSummary:
    """Compile the graphs of a model for Neuron and put them into the store, from which `patch` loads them.

    It takes minutes for every graph that is not there yet, and needs no device. Each graph is compiled in a process of
    its own: one that fails leaves the others alone.

    Args:
        model: as for `patch`.
        backend: ``"neuron"``; ``"auto"``: Neuron if its packages are there, else the host, which needs no compilation.
        precision: as for `patch`.
        buckets: as for `patch`.
        store: as for `patch`.
        progress: show a bar.
        target: family of instances to compile for: ``"inf2"``, ``"trn1"``, ``"trn1n"`` or ``"trn2"``; by default this
            machine's.
        jobs: graphs compiled at a time; by default as many as memory and processors allow.
        timeout: seconds for one graph; by default an hour.

    Returns:
        what became of each graph. Failures are in it, they do not raise.

    Raises:
        NeuronMissingError: ``backend="neuron"`` without Neuron's packages, or no target is known.
        ModelNotReadyError: as for `patch`, or the weights are not in fp32 on the CPU.
        TypeError, UnsupportedVersionError, ValueError: as for `patch`.
    """
    from neuron_xtts.compiler import CompileSummary, check_exact, compile_all, make_recipes
    from neuron_xtts.engine import make_graphs
    from neuron_xtts.jobs import TIMEOUT

    check_versions()
    xtts = find_xtts(model)
    options = Options.make(backend, precision, buckets, store, to_run=False, target=target)
    check_ready(xtts)
    summary = CompileSummary()
    if options.neuron is None:
        return summary
    start = time.monotonic()
    graphs, summary.missing = make_graphs(xtts.gpt, xtts.hifigan_decoder)
    check_exact(graphs)
    recipes = make_recipes(graphs, options.static_plan, options.precision, options.neuron, summary.weights)
    summary.store = options.store.root
    summary.entries = compile_all(
        graphs,
        recipes,
        options.store,
        precision=options.precision,
        neuron=options.neuron,
        progress=progress,
        workers=jobs,
        timeout=timeout or TIMEOUT,
    )
    summary.seconds = time.monotonic() - start
    return summary


def unpatch(model: Model) -> Model:
    """Undo `patch`: every object's ``__dict__`` is as it was found. Does nothing to a model that is not patched.

    Args:
        model: as for `patch`.

    Returns:
        ``model``.
    """
    xtts = find_xtts(model)
    found = find_patch(xtts)
    if found is not None:
        found.remove()
        del _patches[xtts]
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
    found = find_patch(xtts)
    return found is not None and len(found.gone(xtts)) < len(found.installations)


def report(model: Any) -> Report:
    """What ran where since ``model`` was patched, and why not in a graph.

    Args:
        model: as for `patch`. The report of a model that is not patched says so.
    """
    xtts = find_xtts(model)
    found = find_patch(xtts)
    if found is None:
        return Report()
    return found.engine.report(found.installations, found.gone(xtts))
