"""For apps whose server is no longer maintained: the calls of xtts-streaming-server and of xtts-api-server."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from neuron_xtts.coqui.find import find_xtts
from neuron_xtts.serving.errors import ApiError, json_response
from neuron_xtts.serving.metrics import Metrics
from neuron_xtts.serving.speech import Drawing, Speech, speak
from neuron_xtts.serving.studio import Studio

_NUMBERS = 2**17  # of a voice, that a request may hold


class Told(Drawing):
    """What xtts-streaming-server is told to say: the voice itself is part of it."""

    text: str
    language: str = Field(default="en", max_length=64)
    speaker_embedding: list[float] = Field(max_length=_NUMBERS)
    gpt_cond_latent: list[list[float]] = Field(max_length=_NUMBERS)
    add_wav_header: bool = True
    stream_chunk_size: Any = None


class Asked(BaseModel):
    """What xtts-api-server is asked to say."""

    model_config = ConfigDict(extra="ignore")

    text: str
    speaker_wav: str = Field(max_length=256)
    language: str = Field(default="en", max_length=64)


class Tuned(BaseModel):
    """Settings that xtts-api-server keeps for all requests. They are read, and not kept: others are served, too."""

    model_config = ConfigDict(extra="allow")


def router(studio: Studio, metrics: Metrics) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    async def say(request: Request, text: str, name: str, language: str) -> Response:
        spoken = Speech(model="xtts-v2", input=text, voice=name, language=language, response_format="wav")
        return await speak(request, studio, metrics, spoken)

    @routes.get("/studio_speakers")
    async def studio_speakers() -> Response:
        """The checkpoint's own speakers, as numbers."""
        return json_response({name: _numbers(await studio.voice(name)) for name in studio.own})

    @routes.get("/languages")
    async def languages() -> Response:
        """That the checkpoint speaks."""
        return json_response(studio.languages)

    @routes.post("/tts_stream")
    async def tts_stream(request: Request, told: Told) -> Response:
        """Say a text in a voice that is given as numbers."""
        voice = _tensors(told, studio)
        spoken = Speech(
            model="xtts-v2", input=told.text, voice="", language=told.language,
            response_format="wav" if told.add_wav_header else "pcm", **told.options(),
        )  # fmt: skip
        return await speak(request, studio, metrics, spoken, voice)

    @routes.get("/speakers")
    async def speakers() -> Response:
        """Every voice by name."""
        items = [{"name": name, "voice_id": name, "preview_url": ""} for name in studio.voices()]
        return json_response(items)

    @routes.get("/speakers_list")
    async def speakers_list() -> Response:
        """The names alone."""
        return json_response(studio.voices())

    @routes.get("/tts_stream")
    @routes.get("/tts_stream/", include_in_schema=False)
    async def get_stream(
        request: Request,
        text: str,
        speaker_wav: Annotated[str, Query(max_length=256)],
        language: Annotated[str, Query(max_length=64)] = "en",
    ) -> Response:
        """Say a text in a voice that is kept, by its name."""
        return await say(request, text, speaker_wav, language)

    @routes.post("/tts_to_audio")
    @routes.post("/tts_to_audio/", include_in_schema=False)
    async def tts_to_audio(request: Request, asked: Asked) -> Response:
        """The same."""
        return await say(request, asked.text, asked.speaker_wav, asked.language)

    @routes.post("/set_tts_settings")
    async def set_settings(tuned: Tuned) -> Response:
        """Answered, and no more."""
        return json_response({"message": "settings are those of each request here"})

    return routes


def _numbers(voice: dict[str, Tensor]) -> dict[str, Any]:
    latents, embedding = voice["gpt_cond_latent"], voice["speaker_embedding"]
    return {
        "speaker_embedding": embedding.cpu().squeeze().half().tolist(),
        "gpt_cond_latent": latents.cpu().squeeze(0).half().tolist(),
    }


def _tensors(told: Told, studio: Studio) -> dict[str, Tensor]:
    xtts: Any = find_xtts(studio.model)
    args = xtts.args
    channels, width = args.gpt_n_model_channels, args.d_vector_dim
    rows = told.gpt_cond_latent
    if not rows or any(len(row) != channels for row in rows) or len(rows) * channels > _NUMBERS:
        raise ApiError(400, f"gpt_cond_latent: expected rows of {channels} numbers", param="gpt_cond_latent")
    if len(told.speaker_embedding) != width:
        raise ApiError(400, f"speaker_embedding: expected {width} numbers", param="speaker_embedding")
    latents, embedding = torch.tensor([rows]), torch.tensor(told.speaker_embedding)[None, :, None]
    if not (latents.isfinite().all() and embedding.isfinite().all()):
        raise ApiError(400, "a voice with numbers that are too large", param="gpt_cond_latent")
    return {"gpt_cond_latent": latents, "speaker_embedding": embedding}
