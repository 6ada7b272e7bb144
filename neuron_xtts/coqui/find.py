"""Find the ``Xtts`` in what the user handed over, and check versions before anything is touched."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from neuron_xtts.coqui.surface import Xtts
from neuron_xtts.errors import ModelNotReadyError, UnsupportedVersionError

#: What this library was written for and is tested on. pyproject.toml says the same.
SUPPORTED = {"coqui-tts": ">=0.27.3,<0.29", "transformers": ">=4.57,<6", "torch": ">=2.8"}


def check_versions() -> None:
    """Raise `UnsupportedVersionError` unless every package that is patched is of a supported version."""
    found = {}
    for package, supported in SUPPORTED.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UnsupportedVersionError(
                f"{package} is not installed; neuron_xtts needs {package}{supported}: "
                f'pip install "{package}{supported}"'
            ) from None
        if not SpecifierSet(supported).contains(installed, prereleases=True):
            raise UnsupportedVersionError(
                f"{package} {installed} is installed; neuron_xtts supports {package}{supported}: "
                f'pip install "{package}{supported}"'
            )
        found[package] = Version(installed)
    if found["coqui-tts"] < Version("0.28.dev0") and found["transformers"] >= Version("5.dev0"):  # as pip allows
        raise UnsupportedVersionError(
            f"coqui-tts {found['coqui-tts']} cannot be imported with transformers {found['transformers']}: "
            'pip install "transformers>=4.57,<5", or "coqui-tts>=0.28,<0.29"'
        )


def find_xtts(model: object) -> Xtts:
    """Return the ``Xtts`` inside a ``TTS.api.TTS``, a ``Synthesizer`` or itself.

    Raises:
        TypeError: ``model`` is none of them, or holds a model other than XTTS.
        ModelNotReadyError: it is one of them, but no XTTS that can synthesize is loaded.
    """
    from TTS.api import TTS
    from TTS.tts.models import xtts
    from TTS.utils.synthesizer import Synthesizer

    found: Any = model
    if isinstance(found, TTS):
        found = found.synthesizer
        if found is None:
            raise ModelNotReadyError(
                "This TTS holds no text-to-speech model (its synthesizer is None). "
                'Load one first, such as TTS("tts_models/multilingual/multi-dataset/xtts_v2").'
            )
    if isinstance(found, Synthesizer):
        found = found.tts_model
        if found is None:
            raise ModelNotReadyError(
                "This Synthesizer holds no text-to-speech model (its tts_model is None). "
                "Create it with the checkpoint of an XTTS model."
            )
    if not isinstance(found, xtts.Xtts):
        inside = "" if found is model else f" holding a {type(found).__name__}"
        raise TypeError(
            f"Expected a TTS.api.TTS, a Synthesizer or an Xtts with an XTTS model, got a {type(model).__name__}{inside}"
        )
    ready: Xtts = found
    return ready


def check_ready(xtts: Xtts) -> None:
    """Raise `ModelNotReadyError` unless coqui-tts itself could synthesize with ``xtts``."""
    if getattr(xtts, "gpt", None) is None:
        raise ModelNotReadyError("This Xtts has no GPT yet. Call load_checkpoint(...) on it before patch().")
    if not hasattr(xtts.gpt, "gpt_inference"):
        raise ModelNotReadyError(
            "This Xtts was not made ready for inference. Call load_checkpoint(..., eval=True) or eval() before patch()."
        )
