"""The command ``neuron-xtts serve``: a server of one model, for OpenAI's clients and others."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_xtts.coqui.models import check_checkpoint
from neuron_xtts.errors import ExtraMissingError
from neuron_xtts.options import PatchOptions
from neuron_xtts.tools import commands
from neuron_xtts.tools.arguments import positive, whole

if TYPE_CHECKING:
    from neuron_xtts.serving.start import Start

logger = logging.getLogger(__name__)

#: Keys that requests must have one of, separated by commas: what is on a command line, everybody on a machine can read.
KEYS_VARIABLE = "NEURON_XTTS_API_KEYS"


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    _check_installed("serve", "fastapi", "uvicorn", "multipart", "websockets", "prometheus_client", "av")
    if arguments.ray:
        _check_installed("ray", "ray")
        if arguments.root_path:
            raise ValueError("--root-path and --ray cannot be both: Ray's own server has no path of its own here")
    logging.getLogger("neuron_xtts").setLevel(logging.INFO)
    commands.quieten()
    start = _start(arguments, commands.patch_options(arguments))
    return _on_ray(arguments, start) if arguments.ray else _here(arguments, start)


def _here(arguments: argparse.Namespace, start: Start) -> int:
    import uvicorn

    from neuron_xtts.serving.app import UVICORN
    from neuron_xtts.serving.middleware import PAGE

    with _bound(arguments.host, arguments.port) as listening:  # before minutes are spent on a model
        server = uvicorn.Server(uvicorn.Config(
            start.make(), host=arguments.host, port=arguments.port, log_level="info", server_header=False,
            root_path=arguments.root_path, timeout_graceful_shutdown=arguments.grace, **UVICORN,
        ))  # fmt: skip
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        page = f", where people have a page at {arguments.root_path}{PAGE}" if start.page else ""
        proxied = f" for a proxy's {arguments.root_path}" if arguments.root_path else ""
        logger.info("listening at http://%s:%d%s%s", host, arguments.port, proxied, page)
        with contextlib.suppress(KeyboardInterrupt):  # as servers are stopped
            server.run([listening])
    return 0 if server.started else 1


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens to nobody yet. Raises OSError if it can be none."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        what = f"{host}:{port} cannot be listened at: {error.strerror}"
        raise OSError(f"{what}; take another --host or --port") from error
    return found


def _on_ray(arguments: argparse.Namespace, start: Start) -> int:
    import ray
    from ray import serve

    from neuron_xtts.serving.ray import Cluster, deploy

    if start.checkpoint is not None:  # before a cluster is started
        check_checkpoint(start.checkpoint)
    cluster = Cluster(
        replicas=arguments.replicas, most_replicas=arguments.max_replicas, requests=arguments.requests,
        cpus=arguments.cpus or max((os.cpu_count() or 1) // arguments.replicas, 1),
        neuron_cores=arguments.neuron_cores,
    )  # fmt: skip
    ray.init(address=arguments.address, ignore_reinit_error=True)
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    serve.run(deploy(start, cluster), blocking=True)
    return 0


def _start(arguments: argparse.Namespace, options: PatchOptions) -> Start:
    from neuron_xtts.serving.start import Start
    from neuron_xtts.serving.studio import Settings

    if arguments.voices and arguments.voices.exists() and not arguments.voices.is_dir():
        raise NotADirectoryError(f"{arguments.voices} is no folder of voices; name another one with --voices")
    settings = Settings(
        language=arguments.language,
        aliases=dict(arguments.alias),
        keys=_keys(arguments.api_key_file),
        origins=tuple(arguments.allow_origin),
        requests=arguments.requests,
        uploads=not arguments.no_uploads,
    )
    page = not arguments.no_page and find_spec("gradio") is not None
    if not (page or arguments.no_page):
        logger.info('no page for people: pip install "neuron-xtts[webui]"')
    return Start(
        checkpoint=arguments.checkpoint, small=arguments.small, voices=arguments.voices, page=page, settings=settings,
        options={**options, "queue": arguments.queue, "guard": not arguments.no_guard},
    )  # fmt: skip


def _keys(file: Path | None) -> tuple[str, ...]:
    variable = os.environ.get(KEYS_VARIABLE, "")
    given = file.read_text(encoding="utf-8-sig").splitlines() if file else variable.split(",")
    keys = tuple(key.strip() for key in given if key.strip())
    if file and not keys:
        raise ValueError(f"{file} has no API key; expected one a line")
    if variable and not keys:
        raise ValueError(f"{KEYS_VARIABLE} is {variable!r}, which has no API key; expected some, separated by commas")
    return keys


def _check_installed(extra: str, *names: str) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ExtraMissingError(
            f'neuron-xtts serve needs {", ".join(missing)}, not installed here: pip install "neuron-xtts[{extra}]"'
        )


def add_arguments(serving: argparse.ArgumentParser) -> None:
    """The arguments of the command, but for those that others have, too."""
    serving.add_argument(
        "--host", default="127.0.0.1", help="to listen at; 0.0.0.0 is every one (default: %(default)s)"
    )
    serving.add_argument("--port", type=whole(1, 65535), default=8000, help="(default: %(default)s)")
    serving.add_argument(
        "--root-path", default="", type=_root_path, metavar="PATH",
        help="at which a proxy has it, such as /tts, and which it takes off before it passes a request on",
    )  # fmt: skip
    serving.add_argument("--language", default="en", help="of text that says none (default: %(default)s)")
    serving.add_argument("--voices", type=Path, metavar="DIR", help="the folder of voices (default: the user's)")
    serving.add_argument(
        "--alias", action="append", default=[], metavar="NAME=VOICE", type=_alias,
        help="what a name stands for, such as alloy=ann; OpenAI's names that have none get a voice in turn",
    )  # fmt: skip
    serving.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"keys that requests need, one a line (or {KEYS_VARIABLE})"
    )
    serving.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        type=_origin,
        help="of web pages elsewhere that may call, such as http://127.0.0.1:3000; * is any",
    )
    serving.add_argument("--no-uploads", action="store_true", help="clients may not add voices")
    serving.add_argument(
        "--requests", type=positive, default=128, help="answered at once, at most (default: %(default)s)"
    )
    serving.add_argument("--no-guard", action="store_true", help="without the one against hallucinated tails")
    serving.add_argument("--no-page", action="store_true", help="without the page at /ui, for which Gradio is needed")
    serving.add_argument("--queue", type=whole(0), default=64, help="calls that may wait (default: %(default)s)")
    serving.add_argument(
        "--grace",
        type=whole(0),
        default=30,
        metavar="SECONDS",
        help="for what is spoken when it is stopped (default: 30)",
    )
    cluster = serving.add_argument_group("on a cluster, by Ray Serve")
    cluster.add_argument("--ray", action="store_true", help="a replica of the model for each share of the cluster")
    cluster.add_argument("--address", help="of a cluster that runs (default: one that begins on this machine)")
    cluster.add_argument("--replicas", type=positive, default=1, help="at least (default: %(default)s)")
    cluster.add_argument("--max-replicas", type=positive, help="at most, as many as are busy (default: no more)")
    cluster.add_argument("--cpus", type=positive, help="of one replica (default: this machine's, shared among them)")
    cluster.add_argument("--neuron-cores", type=whole(0), default=0, help="of one replica (default: none)")


def _root_path(value: str) -> str:
    if value and (not value.startswith("/") or value.endswith("/")):
        raise argparse.ArgumentTypeError(f"{value!r} does not begin with / or ends with it")
    return value


def _origin(value: str) -> str:
    if value != "*" and not re.fullmatch(r"https?://[^/\s]+/?", value.lower()):
        raise argparse.ArgumentTypeError(f"{value!r} is not http://HOST, with :PORT if it has one")
    return value.lower().rstrip("/")


def _alias(value: str) -> tuple[str, Any]:
    name, equals, voice = value.partition("=")
    if not (equals and name and voice):
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=VOICE")
    return name, voice
