"""Speaking many texts at once, on behalf of callers who may go away: beneath `speak_many` and `aio`."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

from torch import Tensor
from tqdm import tqdm

from neuron_xtts.coqui.find import find_xtts
from neuron_xtts.coqui.voices import settings_of, voice_of
from neuron_xtts.decoding.caller import Caller
from neuron_xtts.patching.dispatch import disabled
from neuron_xtts.patching.patch import Patch, find_patch

#: What coqui-tts returns for a text: samples at 24 kHz, as a list or an array.
Wav: TypeAlias = Any


def patch_of(model: object) -> Patch:
    """The patch of a model.

    Raises:
        ValueError: it has none; coqui-tts itself does not serve several threads.
    """
    found = find_patch(find_xtts(model))
    if found is None:
        raise ValueError(
            "This model is not patched, and coqui-tts cannot say several texts at once: neuron_xtts.patch(model) first"
        )
    return found


def speak(model: Any, text: str, **options: Any) -> Wav:
    """Say a text as coqui-tts does: by ``tts`` of a ``TTS`` or ``Synthesizer``, by ``synthesize`` of an ``Xtts``."""
    xtts: Any = find_xtts(model)
    if model is xtts:
        return xtts.synthesize(text, **options)["wav"]
    return model.tts(text, **options)


def chunks(
    model: Any,
    text: str,
    *,
    language: str,
    speaker: str | None = None,
    speaker_wav: Any = None,
    gpt_cond_latent: Tensor | None = None,
    speaker_embedding: Tensor | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Say a text chunk by chunk, by ``Xtts.inference_stream``, in a voice that is named in any of coqui-tts's ways.

    Raises:
        ValueError: no voice is named.
    """
    xtts: Any = find_xtts(model)
    if gpt_cond_latent is None or speaker_embedding is None:
        gpt_cond_latent, speaker_embedding = voice_of(xtts, speaker=speaker, speaker_wav=speaker_wav)
    options = settings_of(xtts) | options
    yield from xtts.inference_stream(text, language, gpt_cond_latent, speaker_embedding, **options)


def speak_many(
    model: object, texts: Iterable[str], *, seed: int | None, progress: bool, options: dict[str, Any]
) -> Iterator[Wav]:
    """See `neuron_xtts.speak_many`; the model is patched."""
    at_once = 1 if disabled() else patch_of(model).dispatcher.context.scheduler.counts().slots
    on_behalf = Caller(patient=True)

    def say(number: int, text: str) -> Wav:
        seeded = {} if seed is None else {"seed": seed + number}
        with on_behalf.calls():
            return speak(model, text, **seeded, **options)

    begun: deque[Future[Wav]] = deque()
    total = len(texts) if isinstance(texts, Sized) else None
    with (
        ThreadPoolExecutor(at_once, "speak_many") as pool,
        tqdm(total=total, desc="speaking", unit="text", disable=not progress) as bar,
        contextlib.ExitStack() as at_last,
    ):
        at_last.callback(_end, on_behalf, begun)
        for number, text in enumerate(texts):
            begun.append(pool.submit(say, number, text))
            if len(begun) == 2 * at_once:
                yield begun.popleft().result()
                bar.update()
        while begun:
            yield begun.popleft().result()
            bar.update()


def _end(on_behalf: Caller, begun: Iterable[Future[Wav]]) -> None:
    """Nobody takes what was begun."""
    for future in begun:
        future.cancel()
    on_behalf.go()
