"""The public verbs: patch, unpatch, patched, compile, speak_many, report, is_patched."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from neuron_xtts.buckets import BucketPlan
from neuron_xtts.coqui.find import check_ready, check_versions, find_xtts
from neuron_xtts.guard import Guard
from neuron_xtts.options import QUEUE, VOICES, Options
from neuron_xtts.precision import Precision
from neuron_xtts.report import Report

if TYPE_CHECKING:
    from neuron_xtts.backends.neuron.compiler import CompileSummary

Model = TypeVar("Model")
PathLike = str | os.PathLike[str]


def patch(
    model: Model,
    *,
    backend: str = "auto",
    precision: str | Precision = "fp32",
    buckets: BucketPlan | None = None,
    store: PathLike | None = None,
    strict: bool = False,
    voice_cache: int = VOICES,
    queue: int = QUEUE,
    guard: bool | Guard = False,
) -> Model:
    """Route the expensive calls of a coqui-tts XTTS model to graphs. Undone by `unpatch`.

    A model that is patched already gets the new patch in place of the old one; calls that begin meanwhile wait for it.
    Nothing is compiled: on Neuron, graphs that the store does not
    hold are named in a warning and in `report`, and coqui-tts serves their calls.

    Args:
        model: a ``TTS.api.TTS``, a ``Synthesizer`` or an ``Xtts``, ready to synthesize.
        backend: where graphs run: ``"cpu"``, the host; ``"neuron"``, or ``"neuron:1"`` to name the NeuronCore, counted
            among those the process may use, or ``"neuron:0-3"`` to spread calls over several; ``"auto"``: Neuron if its
            packages and a device are there, else the host.
        precision: of the graphs: ``"fp32"``, which on the host gives coqui-tts's own audio; ``"bf16"``; on the host
            also ``"int8"``, on Neuron ``"bf16-all"``; or a `Precision`, which has more to say.
        buckets: the sizes of the graphs; by default the backend's own: on the host exact shapes but for the vocoder,
            `BucketPlan.static` on Neuron.
        store: folder of the compiled graphs; by default what NEURON_XTTS_CACHE names, else the user's cache folder.
        strict: raise `FallbackError` where a call would fall back to coqui-tts.
        voice_cache: how many voices to remember, by the content of their recordings; 0 to compute each at every call.
        queue: how many calls of other threads may wait while as many rows decode as ``buckets.slots`` lets; one more
            raises `QueueFullError`.
        guard: keep speech from going on when all of a text has been said: ``True``, or a `Guard`, which has more to
            say; ``False``: it ends where coqui-tts's would.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is something else, or so is an option.
        ModelNotReadyError: no XTTS model is loaded in it.
        UnsupportedVersionError: coqui-tts, transformers or torch are of a version that is not supported.
        NeuronMissingError: ``backend="neuron"`` where Neuron's packages, its driver or a device are not there.
        ValueError: an option has a value that does not exist.
    """
    from neuron_xtts.patching.patch import install

    check_versions()
    xtts = find_xtts(model)
    options = Options.make(backend, precision, buckets, store, to_run=True)
    if type(voice_cache) is not int or voice_cache < 0:
        raise ValueError(f"voice_cache={voice_cache!r}; expected how many voices to remember, or 0 for none")
    if type(queue) is not int or queue < 0:
        raise ValueError(f"queue={queue!r}; expected how many calls may wait, or 0 for none")
    guards = Guard.of(guard)
    check_ready(xtts)
    install(xtts, options, strict=strict, voice_cache=voice_cache, queue=queue, guard=guards)
    return model


def compile(
    model: object,
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
    its own: one that fails leaves the others alone. Before them a canary, a graph of two small layers, is compiled, and
    run where there is a device: if it fails, no other is tried.

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
        timeout: seconds for one graph; by default an hour, for the canary ten minutes.

    Returns:
        what became of each graph. Failures are in it, they do not raise.

    Raises:
        NeuronMissingError: ``backend="neuron"`` without Neuron's packages, or no target is known.
        ModelNotReadyError: as for `patch`, or the weights are not in fp32 on the CPU.
        TypeError, UnsupportedVersionError, ValueError: as for `patch`.
    """
    from neuron_xtts.backends.neuron.compiler import CompileSummary, check_exact, compile_all
    from neuron_xtts.coqui.recognise import make_graphs
    from neuron_xtts.coqui.surface import Networks

    check_versions()
    xtts = find_xtts(model)
    options = Options.make(backend, precision, buckets, store, to_run=False, target=target)
    check_ready(xtts)
    summary = CompileSummary()
    if options.neuron is None:
        return summary
    start = time.monotonic()
    graphs, unfit = make_graphs(Networks.of(xtts))
    summary.missing = options.static_plan.lacking(unfit)
    check_exact(graphs)
    summary.store = options.store.root
    summary.entries, summary.canary = compile_all(
        graphs,
        options.static_plan,
        options.recipes(graphs, summary.weights),
        options.store,
        precision=options.precision,
        neuron=options.neuron,
        progress=progress,
        workers=jobs,
        timeout=timeout,
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
    from neuron_xtts.patching.patch import remove

    remove(find_xtts(model))
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


def is_patched(model: object) -> bool:
    """Whether any route of ``model`` leads to graphs.

    Args:
        model: as for `patch`.
    """
    from neuron_xtts.patching.patch import find_patch

    xtts = find_xtts(model)
    found = find_patch(xtts)
    return found is not None and len(found.gone(xtts)) < found.installed


def speak_many(
    model: object, texts: Iterable[str], *, seed: int | None = None, progress: bool = True, **options: Any
) -> Iterator[Any]:
    """Say many texts at once, as many as the patch has slots for; what is said comes in the order of the texts.

    No more than twice as many texts as there are slots are begun before the first of them is taken, so that ``texts``
    may be an iterator of any length. Closing the iterator ends what runs.

    Args:
        model: as for `patch`, patched.
        texts: that are said.
        seed: of the first text; of each further one it is one more. None: codes are drawn from generators that nobody
            chose.
        progress: show a bar.
        options: of every call: of ``tts`` of a ``TTS`` or ``Synthesizer``, of ``synthesize`` of an ``Xtts``.

    Returns:
        an iterator of what that method returns for each text, samples at 24 kHz; where a text raised, it raises the
        same in its place, and the texts behind it are not said.

    Raises:
        TypeError: ``texts`` is one text.
        ValueError: the model is not patched, or the seed is no whole number.
    """
    from neuron_xtts import speaking

    return speaking.speak_many(model, texts, seed=seed, progress=progress, options=options)


def report(model: object) -> Report:
    """What ran where since ``model`` was patched, and why not in a graph.

    Args:
        model: as for `patch`. The report of a model that is not patched says so.
    """
    from neuron_xtts.patching.patch import find_patch

    xtts = find_xtts(model)
    found = find_patch(xtts)
    return Report() if found is None else found.report(xtts)
