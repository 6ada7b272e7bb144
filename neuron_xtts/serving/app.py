"""The application: every route of a server around one patched model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from neuron_xtts.serving import catalogue, errors, legacy, socket, speech
from neuron_xtts.serving.metrics import Metrics
from neuron_xtts.serving.middleware import PAGE, Gate
from neuron_xtts.serving.page import mount
from neuron_xtts.serving.studio import Settings, Studio
from neuron_xtts.speaking import patch_of
from neuron_xtts.version import __version__
from neuron_xtts.voice import VoiceFolder

#: What uvicorn is told. A client that plays what it reads answers a ping only once all that came before is played.
UVICORN: dict[str, Any] = {"ws_max_size": 2**18, "ws_ping_timeout": None}

_BODY = 2**20  # bytes of a request, but for recordings
_FORM = 2**16  # bytes that a form adds to a recording
_BODY_OF_NUMBERS = 8 * 2**20  # a voice written as numbers


def create_app(
    model: object, *, voices: VoiceFolder | None = None, settings: Settings | None = None, page: bool = False
) -> FastAPI:
    """An application that serves a patched model, for uvicorn or any other server of ASGI.

    Args:
        model: a patched ``TTS.api.TTS``, ``Synthesizer`` or ``Xtts``.
        voices: the folder of voices; by default the user's own.
        settings: how it is served.
        page: with the page for people, at ``/ui``.

    Raises:
        ExtraMissingError: the page was asked for, and Gradio is not installed.
        ValueError: the model is not patched, or does not speak the language of the settings.
    """
    patch_of(model)
    settings = settings or Settings()
    studio = Studio(model, voices or VoiceFolder(), settings)
    metrics = Metrics(studio)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(studio.warm_up())
        try:
            yield
        finally:
            warming.cancel()
            await asyncio.wait([warming])
            studio.close()

    app = FastAPI(title="neuron_xtts", version=__version__, lifespan=lifespan, redirect_slashes=False)
    errors.install(app)
    app.include_router(catalogue.router(studio, metrics, PAGE if page else None))
    for part in (speech, legacy, socket):
        app.include_router(part.router(studio, metrics))
    if page:
        mount(app, studio)
    app.state.studio = studio
    # The last one is met first.
    app.add_middleware(
        Gate, keys=settings.keys, origins=settings.origins, most=_BODY,
        most_of={"/v1/audio/voices": settings.recording + _FORM, "/tts_stream": _BODY_OF_NUMBERS},
    )  # fmt: skip
    if settings.origins:  # before the gate: a browser asks without a key whether it may call with one
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    app.add_middleware(metrics.counting)
    return app
