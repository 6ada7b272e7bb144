"""What there is: ``/v1/models``, ``/v1/audio/voices``, ``/health``, ``/metrics`` and ``/``."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Request, Response, UploadFile
from fastapi.responses import RedirectResponse

import neuron_xtts
from neuron_xtts.serving.errors import ApiError, json_response
from neuron_xtts.serving.metrics import Metrics
from neuron_xtts.serving.studio import ALIASES, Studio
from neuron_xtts.version import __version__

#: The model, and the names by which OpenAI's clients ask for one.
MODELS = ("xtts-v2", "tts-1", "tts-1-hd", "gpt-4o-mini-tts")


def router(studio: Studio, metrics: Metrics, page: str | None) -> APIRouter:
    """The routes; ``page`` is the path of the one for people, if there is one."""
    routes = APIRouter()
    created = int(time.time())

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "neuron_xtts"}

    @routes.get("/")
    async def about(request: Request) -> Response:
        """What this is; browsers are led to the page, if there is one."""
        if page is not None and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(f"{request.scope.get('root_path', '')}{page}/")
        content = {"name": "neuron_xtts", "version": __version__, "ready": studio.ready, "languages": studio.languages}
        return json_response(content)

    if page is not None:

        @routes.get(page, include_in_schema=False)
        async def to_page(request: Request) -> Response:
            return RedirectResponse(f"{request.scope.get('root_path', '')}{page}/")

    @routes.get("/health")
    async def health() -> Response:
        """Whether it speaks: 200 once it has, 503 before."""
        status = "ok" if studio.ready else "starting"
        return json_response({"status": status}, 200 if studio.ready else 503)

    @routes.get("/metrics")
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/v1/status")
    async def status() -> Response:
        """What runs where, for people to look at."""
        report = neuron_xtts.report(studio.model)
        graphs = [
            {"graph": f"{graph} {bucket.replace('exactxexact', 'exact')}", "runs": counted.runs, "waste": counted.waste,
             "milliseconds": 1e3 * counted.seconds / max(counted.runs, 1)}
            for graph, buckets in report.graphs.items() for bucket, counted in buckets.items()
        ]  # fmt: skip
        fallbacks = [
            {"route": route, "reason": reason, "calls": calls}
            for route, counts in report.routes.items() for reason, calls in counts.fallbacks.items()
        ]  # fmt: skip
        batch = report.batch
        numbers = {"slots": batch.slots, "decoding": batch.decoding, "waiting": batch.waiting}
        where = {"backend": report.backend, "precision": report.precision}
        return json_response({**where, **numbers, "active": studio.active, "graphs": graphs, "fallbacks": fallbacks})

    @routes.get("/v1/models")
    async def models() -> Response:
        """The model, by all of its names."""
        return json_response({"object": "list", "data": [described(name) for name in MODELS]})

    @routes.get("/v1/audio/models")
    async def audio_models() -> Response:
        """The same, for apps that ask for models of audio."""
        return json_response({"models": [{"id": name, "name": name} for name in MODELS]})

    @routes.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        """One of them."""
        if name not in MODELS:
            raise ApiError(404, f"There is no model {name!r}; there is {MODELS[0]!r}", code="model_not_found")
        return json_response(described(name))

    @routes.get("/v1/audio/voices")
    async def voices(aliases: bool = True) -> Response:
        """Every voice that can be asked for, and the names that stand for one unless they are not wanted."""
        names = studio.voices()
        if aliases:
            named = [alias for alias, meant in studio.settings.aliases.items() if meant in names]
            names = list(dict.fromkeys([*names, *named, *(ALIASES if names else ())]))
        items = [{"id": name, "name": name, "object": "audio.voice"} for name in names]
        return json_response({"object": "list", "data": items, "voices": items})

    @routes.post("/v1/audio/voices")
    async def create_voice(
        name: Annotated[str, Form(max_length=256)],
        audio_sample: Annotated[UploadFile, File()],
        consent: Annotated[str | None, Form(max_length=4096)] = None,
    ) -> Response:
        """Make a voice of a recording, and keep it."""
        recording = await audio_sample.read()
        if len(recording) > studio.settings.recording:
            message = f"audio_sample has {len(recording)} bytes; expected at most {studio.settings.recording}"
            raise ApiError(413, message, param="audio_sample")
        await studio.add(name, recording)
        return json_response({"object": "audio.voice", "id": name, "name": name, "created_at": int(time.time())})

    return routes
