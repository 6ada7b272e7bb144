"""A server from nothing: load a model, patch it, make the application. What it is made of can be sent elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI

import neuron_xtts
from neuron_xtts.coqui.models import load_or_download, load_or_make
from neuron_xtts.serving.app import create_app
from neuron_xtts.serving.studio import Settings
from neuron_xtts.voice import VoiceFolder


@dataclass(frozen=True)
class Start:
    """What a server is made of.

    Attributes:
        checkpoint: folder of an XTTS v2; None for the one that coqui-tts downloads.
        small: a small model with random weights instead, for a quick look.
        voices: the folder of voices; None for the user's.
        page: with the page for people.
        settings: how it is served.
        options: of `neuron_xtts.patch`.
    """

    checkpoint: Path | None = None
    small: bool = False
    voices: Path | None = None
    page: bool = False
    settings: Settings = field(default_factory=Settings)
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> FastAPI:
        """Load the model, patch it, and make the application."""
        tts = load_or_make(None, True) if self.small else load_or_download(self.checkpoint)
        neuron_xtts.patch(tts, **self.options)
        return create_app(tts, voices=VoiceFolder(self.voices), settings=self.settings, page=self.page)
