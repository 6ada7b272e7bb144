"""The command ``neuron-xtts voices``: voices that are kept as files, by name."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from neuron_xtts.coqui.models import load_or_download, load_or_make
from neuron_xtts.coqui.recordings import check_recording
from neuron_xtts.coqui.voices import encoders_digest
from neuron_xtts.errors import VoiceError
from neuron_xtts.tables import table
from neuron_xtts.voice import Voice, VoiceFolder


def run_add(arguments: argparse.Namespace) -> int:
    """Make a voice and keep it."""
    folder = VoiceFolder(arguments.voices)
    if bool(arguments.recordings) == bool(arguments.speaker):
        raise ValueError("voices add NAME takes recordings, FILE ..., or --speaker NAME")
    if folder.path(arguments.name).exists() and not arguments.replace:  # before a model is loaded
        raise FileExistsError(f"there is a voice {arguments.name!r} already: remove it, or --replace")
    for path in arguments.recordings:
        check_recording(path)
    tts = load_or_download(arguments.checkpoint)
    recordings = arguments.recordings or None
    voice = Voice.of(tts, recordings, speaker=arguments.speaker, keep=not arguments.forget)
    path = folder.add(arguments.name, voice, replace=arguments.replace)
    print(json.dumps(_described(arguments.name, folder), indent=2) if arguments.json else path)
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    """Name the voices that there are."""
    folder = VoiceFolder(arguments.voices)
    tts = load_or_make(arguments.checkpoint, False) if arguments.checkpoint else None
    encoders = encoders_digest(tts.synthesizer.tts_model) if tts else None  # once: it reads all of their weights
    voices = [_described(name, folder, encoders) for name in folder]
    if tts is not None:
        own = getattr(tts.synthesizer.tts_model.speaker_manager, "speakers", {})
        voices += [{"name": name, "speaks": "yes", "of": "the checkpoint's own", "file": None} for name in own]
    _print_voices(voices, arguments.json)
    if not voices and not arguments.json:
        print(f"there are no voices in {folder.root}: neuron-xtts voices add NAME FILE", file=sys.stderr)
    return 0


def run_remove(arguments: argparse.Namespace) -> int:
    """Delete a voice."""
    path = VoiceFolder(arguments.voices).remove(arguments.name)
    print(json.dumps({"removed": str(path)}) if arguments.json else f"removed {path}")
    return 0


def _described(name: str, folder: VoiceFolder, encoders: str | None = None) -> dict[str, Any]:
    """What is known of a voice, and, with the digest of a model's encoders, whether that can speak with it."""
    found: dict[str, Any] = {"name": name, "file": str(folder.path(name))}
    try:
        voice = folder.load(name)
    except VoiceError as error:
        return found | {"of": None, "speaks": f"no: {error}"}
    of = voice.made.get("speaker") or ", ".join(voice.made.get("recordings", {}))
    found |= {"of": of, "weights": voice.weights, "made": dict(voice.made), "recordings": list(voice.recordings)}
    if encoders is not None:
        again = "made again of its recordings" if voice.recordings else "no: made by other weights"
        found["speaks"] = "yes" if voice.weights == encoders else again
    return found


def _print_voices(voices: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(list(voices), indent=2))
        return
    columns = ("name", "of", "speaks") if any("speaks" in voice for voice in voices) else ("name", "of")
    rows = [tuple(str(voice.get(column) or "") for column in columns) for voice in voices]
    if rows:
        print(table(("name", "made of", "can be spoken with")[: len(columns)], rows))
