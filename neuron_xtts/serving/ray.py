"""The same application on a cluster: Ray Serve around it, a replica for each model. Needs the extra ``ray``.

``serve run neuron_xtts.serving.ray:app checkpoint=/models/xtts cpus=8`` or ``neuron-xtts serve --ray``.
"""

# Without "from __future__ import annotations": Ray reads of which class the argument of `app` is.
import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neuron_xtts.serving.start import Start
from neuron_xtts.serving.studio import Settings


class Cluster(BaseModel):
    """What ``serve run`` may be told, as ``name=value``; a configuration file has the same under ``args``."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: Path | None = Field(default=None, description="folder of an XTTS v2, the same on every machine")
    small: bool = Field(default=False, description="a small model with random weights")
    voices: Path | None = Field(default=None, description="folder of voices, the same on every machine")
    precision: str = "fp32"
    language: str = "en"
    replicas: int = Field(default=1, ge=1, description="at least")
    most_replicas: int | None = Field(default=None, ge=1, description="at most, as many as are busy; None: no more")
    cpus: int = Field(default=4, ge=1, description="of one replica, and torch's threads in it")
    neuron_cores: int = Field(default=0, ge=0, description="of one replica, on instances with Neuron")
    requests: int = Field(default=128, ge=1, description="that one replica answers at once")
    waiting: int = Field(default=100, ge=1, description="requests that wait for a replica; Ray answers 503 to more")
    queue: int = Field(default=64, ge=0, description="calls that wait in one replica")
    guard: bool = Field(default=True, description="against hallucinated tails")


def app(cluster: Cluster) -> Any:
    """The application for ``serve run``, or for `deploy`."""
    start = Start(
        checkpoint=cluster.checkpoint, small=cluster.small, voices=cluster.voices,
        settings=Settings(language=cluster.language, requests=cluster.requests),
        options={"precision": cluster.precision, "queue": cluster.queue, "guard": cluster.guard},
    )  # fmt: skip
    return deploy(start, cluster)


def deploy(start: Start, cluster: Cluster) -> Any:
    """The deployment of a server.

    Args:
        start: what each replica is made of.
        cluster: where, and how many.
    """
    if start.options.get("backend", "auto") == "auto":
        start = replace(start, options={**start.options, "backend": _backend(cluster.neuron_cores)})

    def build() -> ASGIApp:
        return replica(start, cluster.cpus)

    options: dict[str, Any] = {"num_cpus": cluster.cpus}  # without, Ray gives torch a single thread
    if cluster.neuron_cores:
        options["resources"] = {"neuron_cores": cluster.neuron_cores}
    scale: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.most_replicas:
        scale = {"autoscaling_config": {
            "min_replicas": cluster.replicas, "max_replicas": max(cluster.most_replicas, cluster.replicas),
            "target_ongoing_requests": 8,
        }}  # fmt: skip
    deployment = serve.deployment(
        name="xtts", ray_actor_options=options, health_check_period_s=10,
        max_ongoing_requests=cluster.requests, max_queued_requests=cluster.waiting,
        **scale,
    )(serve.ingress(build)())  # fmt: skip
    return deployment.bind()


def _backend(cores: int) -> str:
    """On as many cores as Ray lets a replica see, counted from the first of them."""
    if not cores:
        return "cpu"
    return "neuron:0" if cores == 1 else f"neuron:0-{cores - 1}"


def replica(start: Start, cpus: int) -> ASGIApp:
    """The application in one replica, which has spoken before anybody is sent to it."""
    torch.set_num_threads(cpus)  # whatever OMP_NUM_THREADS the cluster was started with
    made = start.make()
    studio = made.state.studio
    thread = threading.Thread(target=lambda: asyncio.run(studio.warm_up()))  # this one has a loop already
    thread.start()
    thread.join()
    if not studio.ready:
        raise RuntimeError("the replica cannot speak: its log says why")
    return _Named(made, serve.get_replica_context().replica_id.unique_id)


class _Named:
    """Says which replica answers, and with how many threads, in the headers of what it answers."""

    def __init__(self, made: FastAPI, name: str) -> None:
        self._app = made
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                del headers["x-request-id"]  # Ray sends the same one
                headers["x-replica-id"] = self._name
                headers["x-replica-threads"] = str(torch.get_num_threads())
            await send(message)

        await self._app(scope, receive, named)
