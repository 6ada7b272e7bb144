"""The command ``neuron-xtts serve``: a server of one model, for OpenAI's clients and others."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import neuron_xtts
from neuron_xtts.coqui.models import load_or_download, load_or_make
from neuron_xtts.errors import ExtraMissingError
from neuron_xtts.options import PatchOptions
from neuron_xtts.voice import VoiceFolder

if TYPE_CHECKING:
    from fastapi import FastAPI

#: Keys that requests must have one of, separated by commas: what is on a command line, everybody on a machine can read.
KEYS_VARIABLE = "NEURON_XTTS_API_KEYS"


def run_serve(arguments: argparse.Namespace, options: PatchOptions) -> int:
    """Serve until interrupted."""
    _check_installed()
    import uvicorn

    app = make_app(arguments, options)
    logging.getLogger("neuron_xtts").setLevel(logging.INFO)
    uvicorn.run(
        app, host=arguments.host, port=arguments.port, log_level="info", timeout_graceful_shutdown=arguments.grace,
        ws_max_size=2**18, server_header=False,
    )  # fmt: skip
    return 0


def make_app(arguments: argparse.Namespace, options: PatchOptions) -> FastAPI:
    """Load the model, patch it, and make the application."""
    from neuron_xtts.serving.app import create_app
    from neuron_xtts.serving.studio import Settings

    settings = Settings(
        language=arguments.language,
        aliases=dict(arguments.alias),
        keys=_keys(arguments.api_key_file),
        origins=tuple(arguments.allow_origin),
        requests=arguments.requests,
        uploads=not arguments.no_uploads,
    )
    tts = load_or_make(None, True) if arguments.small else load_or_download(arguments.checkpoint)
    neuron_xtts.patch(tts, queue=arguments.queue, **options)
    return create_app(tts, voices=VoiceFolder(arguments.voices), settings=settings)


def _keys(file: Path | None) -> tuple[str, ...]:
    given = file.read_text(encoding="utf-8").splitlines() if file else os.environ.get(KEYS_VARIABLE, "").split(",")
    keys = tuple(key.strip() for key in given if key.strip())
    if file and not keys:
        raise ValueError(f"{file} has no API key; expected one a line")
    return keys


def _check_installed() -> None:
    missing = []
    for name in ("fastapi", "uvicorn", "multipart", "websockets", "prometheus_client", "av"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ExtraMissingError(
            f'neuron-xtts serve needs {", ".join(missing)}, not installed here: pip install "neuron-xtts[serve]"'
        )


def add_arguments(serving: argparse.ArgumentParser) -> None:
    """The arguments of the command, but for those that others have, too."""
    serving.add_argument(
        "--host", default="127.0.0.1", help="to listen at; 0.0.0.0 is every one (default: %(default)s)"
    )
    serving.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
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
        "--allow-origin", action="append", default=[], metavar="URL", help="of web pages elsewhere that may call"
    )
    serving.add_argument("--no-uploads", action="store_true", help="clients may not add voices")
    serving.add_argument("--requests", type=int, default=128, help="answered at once, at most (default: %(default)s)")
    serving.add_argument("--queue", type=int, default=64, help="calls that may wait (default: %(default)s)")
    serving.add_argument(
        "--grace", type=int, default=30, metavar="SECONDS", help="for what is spoken when it is stopped (default: 30)"
    )


def _alias(value: str) -> tuple[str, Any]:
    name, equals, voice = value.partition("=")
    if not (equals and name and voice):
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=VOICE")
    return name, voice
