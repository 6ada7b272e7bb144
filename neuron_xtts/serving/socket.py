"""``WS /v1/audio/speech/stream``: text that arrives word by word, spoken sentence by sentence, in vLLM-Omni's messages.

A client sends ``session.config``, then ``input.text`` as often as it likes and ``input.done``; it may then begin again,
or ``session.close``. It gets ``audio.start``, bytes and ``audio.done`` of each sentence, and ``session.done``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from neuron_xtts.coqui.constants import OUTPUT_RATE
from neuron_xtts.narration.encoding import Encoder, check_format
from neuron_xtts.narration.narrator import end
from neuron_xtts.narration.text import Incoming, Sentence
from neuron_xtts.serving.errors import ApiError, as_api_error
from neuron_xtts.serving.metrics import Metrics
from neuron_xtts.serving.speech import Drawing, FormatName, whole
from neuron_xtts.serving.studio import Studio

_PATIENCE = 300.0  # seconds without a message while nothing is spoken
_MESSAGE = 2**16  # characters
_UNREAD = 2**20  # characters of messages that wait
_OPEN = 4096  # characters without an end of a sentence
_BIT = 2048  # characters that are read at once
_BACKLOG = 64  # sentences that wait to be said, before more is read


class Config(Drawing):
    """How a session speaks."""

    type: Literal["session.config"]
    model: str | None = Field(default=None, max_length=256)
    voice: str = Field(default="alloy", max_length=256)
    language: str | None = Field(default=None, max_length=64)
    response_format: FormatName = "wav"
    speed: float = Field(default=1.0, ge=0.25, le=4.0)
    stream_audio: bool = True


class Text(BaseModel):
    """A bit of what is to be said."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["input.text"]
    text: str


def router(studio: Studio, metrics: Metrics) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.websocket("/v1/audio/speech/stream")
    async def stream(socket: WebSocket) -> None:
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            await Session(socket, studio, metrics).run()

    return routes


class Session:
    """One connection.

    Args:
        socket: that was accepted.
        studio: that speaks.
        metrics: that count.
    """

    def __init__(self, socket: WebSocket, studio: Studio, metrics: Metrics) -> None:
        self._socket = socket
        self._studio = studio
        self._metrics = metrics
        self._sending = asyncio.Lock()
        self._config = Config(type="session.config")
        self._messages: asyncio.Queue[str] = asyncio.Queue()
        self._unread = 0  # characters of those
        self._incoming: Incoming | None = None
        self._sentences: asyncio.Queue[Sentence | None] = asyncio.Queue(_BACKLOG)
        self._speaking: asyncio.Task[tuple[int, int]] | None = None
        self._utterances = 0

    async def run(self) -> None:
        """Serve it until either side has enough."""
        receiving, serving = asyncio.create_task(self._receive()), asyncio.create_task(self._serve())
        try:
            await asyncio.wait({receiving, serving}, return_when=asyncio.FIRST_COMPLETED)
            for task in (serving, receiving):
                if task.done():
                    task.result()
            await self._socket.close()
        except WebSocketDisconnect:
            raise
        except Exception as error:
            told = as_api_error(error)
            await self._say_error(told)
            await self._socket.close(1013 if told.status == 429 else 1008 if told.status < 500 else 1011)
        finally:
            await end(receiving, serving, *([self._speaking] if self._speaking else []))

    async def _receive(self) -> None:
        """Take what comes at once: while a message waits unread, a server reads no answer to its pings."""
        while True:
            try:
                text = await self._socket.receive_text()
            except KeyError as error:
                raise ApiError(400, "Bytes were sent; expected messages in JSON") from error
            if len(text) > _MESSAGE:
                raise ApiError(413, f"A message of {len(text)} characters; expected at most {_MESSAGE}")
            self._unread += len(text)
            if self._unread > _UNREAD:
                raise ApiError(413, f"{self._unread} characters that wait; expected at most {_UNREAD}: send less ahead")
            self._messages.put_nowait(text)

    async def _serve(self) -> None:
        while await self._take(await self._next()):
            pass

    async def _next(self) -> dict[str, Any]:
        """The client's next message; in the meantime what is spoken may fail."""
        getting = asyncio.create_task(self._messages.get())
        try:
            while not getting.done():
                waited = {getting, *([self._speaking] if self._speaking else [])}
                done, _ = await asyncio.wait(waited, timeout=_PATIENCE, return_when=asyncio.FIRST_COMPLETED)
                if self._speaking in done:
                    self._spoken()
                elif not done and self._sentences.empty():
                    raise ApiError(408, f"No message for {_PATIENCE:g} s; open another session")
            return self._parse(getting.result())
        finally:
            getting.cancel()

    def _parse(self, text: str) -> dict[str, Any]:
        self._unread -= len(text)
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise ApiError(400, "A message that is no object in JSON")
        return message

    async def _take(self, message: dict[str, Any]) -> bool:
        """Do as a message says; false if it ends the session."""
        kind = message.get("type")
        try:
            if kind == "session.config":
                await self._configure(Config.model_validate(message))
            elif kind == "input.text":
                await self._hear(Text.model_validate(message).text)
            elif kind == "input.done":
                await self._done()
            elif kind == "session.close":
                return False
            else:
                expected = "session.config, input.text, input.done, session.close"
                raise ApiError(400, f"A message of type {str(kind)[:64]!r}; expected one of {expected}", param="type")
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            await self._say_error(ApiError(400, f"{kind}: {name}: {first['msg']}", param=name, code="invalid_value"))
        return True

    async def _configure(self, config: Config) -> None:
        if self._speaking is not None:
            raise ApiError(400, "session.config while text is spoken; expected it before input.text")
        check_format(config.response_format)
        self._studio.resolve(config.voice)
        self._studio.reader(config.language)
        self._config = config

    async def _hear(self, text: str) -> None:
        text = whole(text)
        if self._incoming is None:
            self._incoming = Incoming(self._studio.reader(self._config.language))
        for bit in (text[start : start + _BIT] for start in range(0, len(text), _BIT)):
            try:
                sentences = await self._studio.in_reading_room(partial(self._incoming.more, bit))
            except ValueError as error:
                raise ApiError(400, str(error), param="text") from error
            if self._incoming.open > _OPEN:
                found = f"{self._incoming.open} characters without an end of a sentence"
                raise ApiError(413, f"{found}; expected at most {_OPEN}", param="text")
            await self._put(*sentences)

    async def _put(self, *sentences: Sentence | None) -> None:
        if self._speaking is None:
            self._sentences = asyncio.Queue(_BACKLOG)
            self._speaking = asyncio.create_task(self._speak(self._sentences, self._utterances))
        for sentence in sentences:
            putting = asyncio.create_task(self._sentences.put(sentence))
            await asyncio.wait({putting, self._speaking}, return_when=asyncio.FIRST_COMPLETED)
            putting.cancel()
            if self._speaking.done():  # by an error
                return

    async def _done(self) -> None:
        rest = await self._studio.in_reading_room(self._incoming.rest) if self._incoming is not None else []
        self._incoming = None
        await self._put(*rest, None)
        said, codes = await self._until_spoken()
        # From here, so that what the client sends next is what is read next.
        await self._say("session.done", self._utterances, total_sentences=said, output_tokens=codes)
        self._utterances += 1

    async def _until_spoken(self) -> tuple[int, int]:
        """Sentences and codes of what was said. Meanwhile the client may close, or go."""
        assert self._speaking is not None
        while not self._speaking.done():
            getting = asyncio.create_task(self._messages.get())
            try:
                await asyncio.wait({getting, self._speaking}, return_when=asyncio.FIRST_COMPLETED)
                if getting.done():
                    message = self._parse(getting.result())
                    if message.get("type") == "session.close":
                        raise WebSocketDisconnect
                    await self._say_error(ApiError(400, "A message before session.done", code="not_done"))
            finally:
                getting.cancel()
        return self._spoken()

    def _spoken(self) -> tuple[int, int]:
        """Sentences and codes of what was said, which is over; raises what ended it."""
        speaking, self._speaking = self._speaking, None
        assert speaking is not None
        return speaking.result()

    async def _speak(self, sentences: asyncio.Queue[Sentence | None], utterance: int) -> tuple[int, int]:
        """Say what comes, until the client has said all; returns how many sentences, and codes."""
        began = time.monotonic()
        config = self._config
        with self._studio.admitted():
            voice = await self._studio.voice(config.voice)
            narration = self._studio.narrate(
                _until_none(sentences), self._studio.reader(config.language), voice, hurry=True, speed=config.speed,
                **config.options(),
            )  # fmt: skip
            try:
                async with contextlib.aclosing(narration.chunks()) as chunks:
                    encoder, sent, first = None, bytearray(), True
                    async for chunk in chunks:
                        if chunk.begins:
                            encoder = Encoder(config.response_format, OUTPUT_RATE)
                            text = narration.spans[chunk.sentence].text
                            await self._say("audio.start", utterance, chunk.sentence, sentence_text=text,
                                            format=config.response_format, sample_rate=OUTPUT_RATE)  # fmt: skip
                            if first:
                                self._metrics.first_audio.observe(time.monotonic() - began)
                                first = False
                        assert encoder is not None
                        data = encoder.encode(chunk.samples) + (encoder.finish() if chunk.ends else b"")
                        sent += data
                        if config.stream_audio and data:
                            await self._say_bytes(data)
                        if chunk.ends:
                            if not config.stream_audio:
                                await self._say_bytes(bytes(sent))
                            span = narration.spans[chunk.sentence]
                            await self._say("audio.done", utterance, chunk.sentence, total_bytes=len(sent),
                                            start=span.start, end=span.end, error=False)  # fmt: skip
                            sent = bytearray()
            finally:
                self._metrics.spoken(narration, time.monotonic() - began)
        return len(narration.spans), narration.codes

    async def _say(self, kind: str, utterance: int, sentence: int | None = None, **more: Any) -> None:
        numbers: dict[str, Any] = {"utterance_index": utterance}
        if sentence is not None:
            numbers["sentence_index"] = sentence
        async with self._sending:
            await self._socket.send_text(json.dumps({"type": kind, **numbers, **more}))

    async def _say_bytes(self, data: bytes) -> None:
        async with self._sending:
            await self._socket.send_bytes(data)

    async def _say_error(self, error: Exception) -> None:
        body = as_api_error(error).body["error"]
        async with self._sending:
            await self._socket.send_text(json.dumps({"type": "error", "message": body["message"], "error": body}))


async def _until_none(sentences: asyncio.Queue[Sentence | None]) -> AsyncIterator[Sentence]:
    while (sentence := await sentences.get()) is not None:
        yield sentence
