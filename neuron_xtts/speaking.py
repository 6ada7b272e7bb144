"""Speaking many texts at once, on behalf of callers who may go away: beneath `speak_many` and `aio`."""

from __future__ import annotations

import operator
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from concurrent.futures import Future
from typing import Any, TypeAlias

from torch import Tensor
from tqdm import tqdm

from neuron_xtts.coqui.find import find_xtts
from neuron_xtts.coqui.voices import settings_of, voice_of
from neuron_xtts.decoding.caller import Caller, CallerGone, caller
from neuron_xtts.patching.patch import Patch, find_patch
from neuron_xtts.routes.seeds import generator_of

#: What coqui-tts returns for a text: samples at 24 kHz, as a list or an array.
Wav: TypeAlias = Any


def patch_of(model: object) -> Patch:
    """The patch of a model.

    Raises:
        ValueError: it has none; coqui-tts itself does not serve several threads.
    """
    xtts = find_xtts(model)
    found = find_patch(xtts)
    if found is None or found.gone(xtts):
        raise ValueError(
            "This model is not patched, or not any more, and coqui-tts cannot say several texts at once: "
            "neuron_xtts.patch(model) first"
        )
    return found


def speak(model: Any, text: str, **options: Any) -> Wav:
    """Say a text as coqui-tts does: by ``tts`` of a ``TTS`` or ``Synthesizer``, by ``synthesize`` of an ``Xtts``.

    Raises:
        ValueError: the model is not patched.
    """
    patch_of(model)
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
    voice_dir: Any = None,
    gpt_cond_latent: Tensor | None = None,
    speaker_embedding: Tensor | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Say a text chunk by chunk, by ``Xtts.inference_stream``, in a voice that is named in any of coqui-tts's ways.

    Raises:
        ValueError: the model is not patched, or no voice is named.
    """
    patch_of(model)
    xtts: Any = find_xtts(model)
    if gpt_cond_latent is None or speaker_embedding is None:
        synthesizer = getattr(model, "synthesizer", model)
        folder = voice_dir or getattr(synthesizer, "voice_dir", None)
        gpt_cond_latent, speaker_embedding = voice_of(xtts, speaker=speaker, speaker_wav=speaker_wav, voice_dir=folder)
    options = settings_of(xtts) | options
    yield from xtts.inference_stream(text, language, gpt_cond_latent, speaker_embedding, **options)


def speak_many(
    model: object, texts: Iterable[str], *, seed: int | None, progress: bool, options: dict[str, Any]
) -> Iterator[Wav]:
    """See `neuron_xtts.speak_many`.

    Raises:
        TypeError: ``texts`` are one text.
        ValueError: the model is not patched, or the seed is none.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts is a str, {texts[:40]!r}; expected texts, such as [{texts[:40]!r}]")
    generator_of(seed)
    at_once = patch_of(model).dispatcher.engines.counts().slots
    return _speak_many(model, texts, at_once, seed, progress, options)


def _speak_many(
    model: object, texts: Iterable[str], at_once: int, seed: int | None, progress: bool, options: dict[str, Any]
) -> Iterator[Wav]:
    on_behalf, process = Caller(patient=True, thread=threading.current_thread()), os.getpid()
    begun: deque[Future[Wav]] = deque()
    total = len(texts) if isinstance(texts, Sized) else None
    numbered = enumerate(texts)
    failure: Exception | None = None
    try:
        with tqdm(total=total, desc="speaking", unit="text", disable=not progress) as bar:
            more = True
            while more or begun:
                on_behalf.thread = threading.current_thread()  # whoever asks now
                if os.getpid() != process:
                    raise RuntimeError("These texts are said in another process, of which this is a fork: begin anew")
                if begun and (begun[0].done() or not more or len(begun) == 2 * at_once):
                    yield begun.popleft().result()
                    bar.update()
                    continue
                try:
                    number, text = next(numbered)
                except StopIteration:
                    more = False
                except Exception as error:  # once what was begun before is said
                    more, failure = False, error
                else:
                    seeded = options if seed is None else {"seed": operator.index(seed) + number, **options}
                    begun.append(_begin(on_behalf, model, text, seeded))
        if failure is not None:
            raise failure
    except CallerGone:
        raise RuntimeError("The interpreter ends: nothing more can be said by threads of its own") from None
    finally:
        # Without waiting: whoever closes this, or collects it, may be the thread that computes for all.
        on_behalf.go()


def _begin(on_behalf: Caller, model: object, text: str, options: dict[str, Any]) -> Future[Wav]:
    """Say a text in a thread of its own."""
    said: Future[Wav] = Future()

    def work() -> None:
        try:
            with on_behalf.calls():
                caller().check()
                said.set_result(speak(model, text, **options))
        except BaseException as error:
            said.set_exception(error)

    threading.Thread(target=work, name="speak_many").start()
    return said
