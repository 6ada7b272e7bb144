"""``POST /v1/audio/speech``: text as audio, sent as it is made."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from neuron_xtts.coqui.constants import OUTPUT_RATE
from neuron_xtts.narration.encoding import Encoder, check_format
from neuron_xtts.narration.narrator import Chunk, Narration, end
from neuron_xtts.narration.text import Reader, Sentence
from neuron_xtts.serving.errors import ApiError, as_api_error
from neuron_xtts.serving.metrics import Metrics
from neuron_xtts.serving.studio import Studio

logger = logging.getLogger(__name__)

FormatName = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]


class VoiceId(BaseModel):
    """A voice, as OpenAI's clients name one that was added."""

    id: str = Field(max_length=256)


class Drawing(BaseModel):
    """How codes are drawn; what is not given is what the checkpoint was made for."""

    model_config = ConfigDict(allow_inf_nan=False, extra="ignore")

    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="the same one gives the same speech")
    temperature: float | None = Field(default=None, ge=1e-3, le=10)
    top_k: int | None = Field(default=None, ge=1, le=1000)
    top_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.1, le=100)

    def options(self) -> dict[str, Any]:
        """Of ``Xtts.inference_stream``."""
        names = ("seed", "temperature", "top_k", "top_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}


class Speech(Drawing):
    """What is to be said, and how: OpenAI's fields, and those that XTTS needs. Others are passed over."""

    model: str = Field(max_length=256, description="any: there is one")
    input: str = Field(description="the text; [pause:0.5] is half a second of silence")
    voice: str | VoiceId
    instructions: str | None = Field(default=None, description="passed over: XTTS takes none")
    response_format: FormatName = "mp3"
    speed: float = Field(default=1.0, ge=0.25, le=4.0)
    stream_format: Literal["audio", "sse"] = "audio"
    language: str | None = Field(default=None, max_length=64, description="of the text; by default the server's")

    @property
    def voice_name(self) -> str:
        """The voice, however it is named."""
        return self.voice if isinstance(self.voice, str) else self.voice.id


class Utterance:
    """One request that is spoken, from its admission to its last byte.

    Args:
        studio: that speaks.
        metrics: that count it.
        name: of the format.
    """

    def __init__(self, studio: Studio, metrics: Metrics, name: str) -> None:
        self.format = check_format(name)
        self._studio = studio
        self._metrics = metrics
        self._name = name
        self._began = time.monotonic()
        self._open = contextlib.ExitStack()
        self._open.enter_context(studio.admitted())
        self._encoder: Encoder | None = None
        self._chunks: AsyncGenerator[Chunk, None] | None = None
        self._first: Chunk | None = None
        self.narration: Narration | None = None
        self.tokens = 0

    async def begin(
        self, request: Request, sentences: list[Sentence], reader: Reader, voice: Any, **options: Any
    ) -> None:
        """Make the first piece, so that what keeps it from being said is an answer of its own.

        Raises:
            ApiError: the queue is full, or the client has gone.
        """
        self.tokens = sum(reader.tokens(sentence.text) for sentence in sentences)
        self.narration = self._studio.narrate(sentences, reader, voice, **options)
        self._chunks = self.narration.chunks()
        first = asyncio.create_task(anext(self._chunks, None))
        gone = asyncio.create_task(until_gone(request.receive))
        try:
            await asyncio.wait({first, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                raise ApiError(499, "The client has gone", code="client_gone")
            self._first = first.result()
        finally:
            await end(gone, first)
        self._metrics.first_audio.observe(time.monotonic() - self._began)

    async def encoded(self) -> AsyncGenerator[bytes, None]:
        """What can be sent of every piece, and what ends a file."""
        assert self._chunks is not None
        assert self._first is not None
        encoder = self._encoder = Encoder(self._name, OUTPUT_RATE)
        yield encoder.encode(self._first.samples)
        async for chunk in self._chunks:
            yield encoder.encode(chunk.samples)
        yield encoder.finish()

    async def close(self) -> None:
        """Nothing more of it is wanted. May be called again."""
        with self._open:
            if self._chunks is not None:
                await self._chunks.aclose()
            if self._encoder is not None:
                self._encoder.close()
            narration, self.narration = self.narration, None
            if narration is not None:
                self._metrics.spoken(narration, time.monotonic() - self._began)


class Streamed(Response):
    """An answer that is sent as it is made. A client that goes ends it, whether or not something is being sent."""

    def __init__(self, utterance: Utterance, body: AsyncGenerator[bytes, None], media_type: str) -> None:
        self._utterance = utterance
        self._body = body
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, in terms of ASGI."""
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(until_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left = not sending.done()
            await end(gone, sending)
        if not left:
            sending.result()

    async def _send(self, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for part in self._body:
                if part:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._body.aclose()
            await self._utterance.close()


async def until_gone(receive: Receive) -> None:
    """Until the client of a request whose body was read has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def speak(
    request: Request, studio: Studio, metrics: Metrics, spoken: Speech, voice: Any = None, sse: bool = False
) -> Response:
    """The answer to a request: audio, or events that have audio in them.

    Args:
        request: of the client.
        studio: that speaks.
        metrics: that count.
        spoken: what is asked for.
        voice: what ``aio.stream`` takes for it, in place of a name.
        sse: events.

    Raises:
        ApiError: it cannot be answered.
        QueueFullError: too many calls wait.
    """
    utterance = Utterance(studio, metrics, spoken.response_format)
    try:
        if voice is None:
            voice = await studio.voice(spoken.voice_name)
        reader, sentences = await studio.read(whole(spoken.input), spoken.language)
        await utterance.begin(request, sentences, reader, voice, speed=spoken.speed, **spoken.options())
    except BaseException:
        await utterance.close()
        raise
    if sse:
        return Streamed(utterance, _events(utterance), "text/event-stream")
    return Streamed(utterance, utterance.encoded(), utterance.format.media_type)


async def _events(utterance: Utterance) -> AsyncGenerator[bytes, None]:
    """OpenAI's events. The last one also says when which sentence is heard."""
    try:
        async with contextlib.aclosing(utterance.encoded()) as pieces:
            async for data in pieces:
                if data:
                    yield event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})
    except Exception as error:
        yield event({"type": "error", **as_api_error(error).body})
        return
    narration = utterance.narration
    assert narration is not None
    tokens, codes = utterance.tokens, narration.codes
    usage = {"input_tokens": tokens, "output_tokens": codes, "total_tokens": tokens + codes}
    spans = [{**asdict(span), "start": round(span.start, 4), "end": round(span.end, 4)} for span in narration.spans]
    yield event({"type": "speech.audio.done", "usage": usage, "sentences": spans})


def event(content: Any) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content)}\n\n".encode()


def router(studio: Studio, metrics: Metrics) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/audio/speech", response_class=Response)
    async def create_speech(request: Request, spoken: Speech) -> Response:
        """Say a text: audio, sent as it is made, or with ``stream_format: sse`` events."""
        return await speak(request, studio, metrics, spoken, sse=spoken.stream_format == "sse")

    return routes


def whole(text: str) -> str:
    """Text whose characters are whole: JSON may hold halves, which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
