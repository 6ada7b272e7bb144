"""Sentences as one stream of audio, made as it is asked for: the next one decodes while one is still played."""

from __future__ import annotations

import asyncio
import operator
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuron_xtts import aio
from neuron_xtts.coqui.constants import OUTPUT_RATE
from neuron_xtts.decoding.caller import Caller
from neuron_xtts.narration.encoding import Samples
from neuron_xtts.narration.text import Sentence


@dataclass
class Span:
    """When a sentence is said.

    Attributes:
        text: of the sentence.
        start: seconds from the beginning of the audio.
        end: likewise; without the silence between sentences.
    """

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Chunk:
    """A piece of audio.

    Attributes:
        samples: (N,) of it.
        sentence: number of the sentence it is of, from 0 on.
        begins: whether it is the first piece of that sentence.
        ends: whether the sentence is over with it, which is known once nothing but silence comes: it may be empty.
    """

    samples: Samples
    sentence: int
    begins: bool = False
    ends: bool = False


class Narration:
    """Says sentences one after another, on a patched model.

    Args:
        model: a patched ``TTS.api.TTS``, ``Synthesizer`` or ``Xtts``.
        sentences: that are said; they may still be written.
        language: of them, as the checkpoint names it.
        seed: of the first sentence; of each further one it is one more. None: nobody chose.
        first: codes of a chunk of the first sentence, 20 of the others; fewer are heard sooner, and cost more.
        options: of ``aio.stream``: the voice, and settings.

    Attributes:
        spans: of the sentences that were said so far.
    """

    def __init__(
        self,
        model: object,
        sentences: Iterable[Sentence] | AsyncIterable[Sentence],
        *,
        language: str,
        seed: int | None = None,
        first: int | None = None,
        **options: Any,
    ) -> None:
        self.spans: list[Span] = []
        self._model = model
        self._sentences = _asynchronous(sentences)
        self._language = language
        self._seed = None if seed is None else operator.index(seed)
        self._first = first
        self._options = options
        self._begun: list[_Speech] = []
        self._samples = 0  # given
        self._started: float | None = None  # when the first were

    @property
    def codes(self) -> int:
        """That were decoded for it so far."""
        return sum(speech.on_behalf.codes for speech in self._begun)

    @property
    def seconds(self) -> float:
        """Of audio that was given so far."""
        return self._samples / OUTPUT_RATE

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """The audio, at 24 kHz. Closed, or cancelled, its slots are free at the next decode step.

        Raises:
            ValueError: the model is not patched, or no voice is named.
            QueueFullError: as many calls wait as may, before anything is said. Later sentences wait, however long.
        """
        upcoming = asyncio.create_task(self._begin())
        try:
            while (begun := await upcoming) is not None:
                speech, first = begun
                number, before = len(self.spans), silence(speech.sentence.before)
                self.spans.append(Span(speech.sentence.text, self.seconds + len(before) / OUTPUT_RATE, 0.0))
                upcoming = asyncio.create_task(self._begin())
                size = len(before) // OUTPUT_RATE * OUTPUT_RATE  # a second at a time, as whoever encodes takes turns
                for start in range(0, size, OUTPUT_RATE):
                    yield self._given(before[start : start + OUTPUT_RATE], number, begins=not start)
                yield self._given(np.concatenate([before[size:], first]), number, begins=not size)
                while (samples := await speech.more()) is not None:
                    yield self._given(samples, number)
                self.spans[-1].end = self.seconds
                if len(self._begun) > len(self.spans):
                    self._begun[-1].on_behalf.due = self._runs_out()
                yield self._given(silence(speech.sentence.after), number, ends=True)
        finally:
            await end(upcoming)
            for each in self._begun:
                await each.close()

    def _given(self, samples: Samples, number: int, begins: bool = False, ends: bool = False) -> Chunk:
        if self._started is None:
            self._started = time.monotonic()
        self._samples += len(samples)
        return Chunk(samples, number, begins, ends)

    def _runs_out(self) -> float:
        """When whoever hears it has heard all, if playing began with the first piece."""
        return (self._started or time.monotonic()) + self.seconds

    async def _begin(self) -> tuple[_Speech, Samples] | None:
        """The next sentence and its first piece, as soon as that is there; None if there is no more."""
        sentence = await anext(self._sentences, None)
        if sentence is None:
            return None
        number = len(self._begun)
        on_behalf = Caller(patient=number > 0, thread=threading.current_thread())
        if number:  # until the one before is all made, nobody waits for this one
            on_behalf.due = float("inf") if not self.spans or not self.spans[-1].end else self._runs_out()
        options = dict(self._options)
        if self._seed is not None:
            options["seed"] = self._seed + number
        if not number and self._first is not None:
            options["stream_chunk_size"] = self._first
        chunks = aio.stream_for(on_behalf, self._model, sentence.text, language=self._language, **options)
        speech = _Speech(sentence, on_behalf, chunks)
        self._begun.append(speech)
        first = await speech.more()
        return speech, np.zeros(0, np.float32) if first is None else first


class _Speech:
    """One sentence that is said."""

    def __init__(self, sentence: Sentence, on_behalf: Caller, chunks: AsyncGenerator[Any, None]) -> None:
        self.sentence = sentence
        self.on_behalf = on_behalf
        self._chunks = chunks

    async def more(self) -> Samples | None:
        """The next piece; None if there is no more."""
        chunk = await anext(self._chunks, None)
        return None if chunk is None else chunk.detach().cpu().float().reshape(-1).numpy()

    async def close(self) -> None:
        await self._chunks.aclose()


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs, and wait until it is over."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at, or asyncio would complain


def silence(seconds: float) -> Samples:
    """So many seconds of exact zeros."""
    return np.zeros(round(seconds * OUTPUT_RATE), np.float32)


async def _asynchronous(sentences: Iterable[Sentence] | AsyncIterable[Sentence]) -> AsyncIterator[Sentence]:
    if isinstance(sentences, AsyncIterable):
        async for sentence in sentences:
            yield sentence
    else:
        for sentence in sentences:
            yield sentence
