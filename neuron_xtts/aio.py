"""Speaking from asyncio: the event loop is never blocked, and a task that is cancelled takes its speech with it.

Each call has a thread while it speaks. All of them decode together, as threads of any kind do.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from neuron_xtts.decoding.caller import Caller
from neuron_xtts.speaking import Wav, patch_of
from neuron_xtts.speaking import chunks as _chunks
from neuron_xtts.speaking import speak as _speak

T = TypeVar("T")


async def speak(model: object, text: str, **options: Any) -> Wav:
    """Say a text. Cancelled, its slot is free at the next decode step.

    Args:
        model: a patched ``TTS.api.TTS``, ``Synthesizer`` or ``Xtts``.
        text: that is said.
        options: of ``tts`` of a ``TTS`` or ``Synthesizer``, of ``synthesize`` of an ``Xtts``, and ``seed``.

    Returns:
        what that method returns: samples at 24 kHz.

    Raises:
        ValueError: the model is not patched.
        QueueFullError: as many calls as may wait already.
    """
    patch_of(model)
    thread = _Thread(Caller(thread=threading.current_thread()))
    try:
        return await thread.run(partial(_speak, model, text, **options))
    finally:
        thread.leave()


async def stream(model: object, text: str, *, language: str, **options: Any) -> AsyncIterator[Tensor]:
    """Say a text chunk by chunk. Closed, or cancelled with its task, its slot is free at the next decode step.

    Args:
        model: a patched ``TTS.api.TTS``, ``Synthesizer`` or ``Xtts``.
        text: that is said.
        language: of the text.
        options: the voice: ``speaker_wav``, recordings; ``speaker``, one of the checkpoint's; or ``gpt_cond_latent``
            and ``speaker_embedding``; and further ones of ``Xtts.inference_stream``, ``seed`` among them. Settings are
            those of the checkpoint's configuration, unless they are given.

    Yields:
        chunks (samples,) at 24 kHz, each made when it is asked for.

    Raises:
        ValueError: the model is not patched, or no voice is named.
        QueueFullError: as many calls as may wait already.
    """
    on_behalf = Caller(thread=threading.current_thread())
    async with contextlib.aclosing(stream_for(on_behalf, model, text, language=language, **options)) as chunks:
        async for chunk in chunks:
            yield chunk


async def stream_for(
    on_behalf: Caller, model: object, text: str, *, language: str, **options: Any
) -> AsyncGenerator[Tensor, None]:
    """The same as `stream`, on behalf of somebody of whom more is known than that it may go."""
    patch_of(model)
    thread = _Thread(on_behalf)
    chunks = _chunks(model, text, language=language, **options)
    try:
        while True:
            chunk = await thread.run(partial(next, chunks, None))
            if chunk is None:
                return
            yield chunk
    finally:
        thread.leave(chunks.close)  # type: ignore[attr-defined]


class _Thread:
    """A thread that calls on behalf of a task."""

    def __init__(self, on_behalf: Caller) -> None:
        self._pool = ThreadPoolExecutor(1, "neuron_xtts.aio")
        self._caller = on_behalf

    async def run(self, call: Callable[[], T]) -> T:
        """What a call gives, made in the thread."""

        def on_behalf() -> T:
            with self._caller.calls():
                return call()

        return await asyncio.get_running_loop().run_in_executor(self._pool, on_behalf)

    def leave(self, *last: Callable[[], None]) -> None:
        """The task wants nothing more: what runs ends soon, and with it, after a ``last`` call, the thread."""
        self._caller.go()
        for call in last:
            with contextlib.suppress(RuntimeError):  # the interpreter ends, and nothing may begin any more
                self._pool.submit(call)
        self._pool.shutdown(wait=False)
