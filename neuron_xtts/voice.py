"""A voice as a file: what XTTS speaks with, by which weights it was made, and the recordings to make it of again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock
from torch import Tensor

from neuron_xtts.coqui.find import find_xtts
from neuron_xtts.coqui.voices import conditioning_of, encoders_digest, voice_of
from neuron_xtts.errors import VoiceError, describe
from neuron_xtts.version import __version__

Recordings = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

FOLDER_VARIABLE = "NEURON_XTTS_VOICES"
SUFFIX = ".safetensors"
#: Rises when files that this version writes could not be read by the one before, or the reverse.
SCHEMA = 1

_MANIFEST = "neuron_xtts"  # key of the file's metadata
_RECORDING = "recording."  # begins the name of a tensor with the bytes of a recording
_LOCK = ".lock"
_NAME = re.compile(r"\w(?:[\w .'-]{0,62}\w)?")


@dataclass(frozen=True, eq=False)
class Voice:
    """What XTTS speaks with, and where it comes from.

    Attributes:
        latents: (1, 32, D) conditioning latents, in fp32.
        embedding: (1, G, 1) speaker embedding, in fp32.
        weights: digest of the encoders that made it; with others the same tensors are another voice, or none.
        recordings: contents of the files it was made of, by their names; none if they were not kept.
        made: what else is known of it: settings, versions, when, and the ``speaker`` of a checkpoint that it was.
    """

    latents: Tensor
    embedding: Tensor
    weights: str
    recordings: Mapping[str, bytes] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: object, recordings: Recordings | None = None, *, speaker: str | None = None, keep: bool = True
    ) -> Voice:
        """Make a voice as ``tts.tts`` makes it of its ``speaker_wav``.

        Args:
            model: as for `patch`, patched or not.
            recordings: a file, or several of one voice.
            speaker: in place of recordings, one of the checkpoint's own speakers.
            keep: the recordings, so that another model can make the voice again.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: neither is given, or both; or there is no such speaker.
            VoiceError: what comes out is not finite.
        """
        xtts = find_xtts(model)
        if (recordings is None) == (speaker is None):
            raise ValueError("A voice is made of recordings or is a speaker of the checkpoint; expected one of both")
        paths = [Path(path) for path in _several(recordings)]
        contents = [path.read_bytes() for path in paths]
        latents, embedding = voice_of(xtts, speaker=speaker, speaker_wav=[str(path) for path in paths] or None)
        made: dict[str, Any] = {
            "settings": conditioning_of(xtts),
            "recordings": {
                name: hashlib.sha256(content).hexdigest() for name, content in zip(_names(paths), contents, strict=True)
            },
            "speaker": speaker,
            "coqui-tts": version("coqui-tts"),
            "neuron-xtts": __version__,
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        kept = dict(zip(_names(paths), contents, strict=True)) if keep else {}
        voice = cls(_own(latents), _own(embedding), encoders_digest(xtts), kept, made)
        voice._check(speaker or ", ".join(map(str, paths)))
        return voice

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Voice:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            VoiceError: it holds no voice, or one of another version of this library.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no voice {path}")
        try:
            with safe_open(str(path), "pt") as file:
                manifest = json.loads((file.metadata() or {})[_MANIFEST])
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
            if manifest["schema"] != SCHEMA:
                raise VoiceError(
                    f"{path} is a voice of schema {manifest['schema']}; this version of neuron_xtts reads {SCHEMA}: "
                    "make it again, with neuron-xtts voices add, or use the version that made it"
                )
            for name in manifest["kept"]:
                if Path(name).name != name:
                    raise VoiceError(f"{path} has a recording {name!r}, which is no name of a file")
            recordings = {
                name: tensors[f"{_RECORDING}{number}"].numpy().tobytes() for number, name in enumerate(manifest["kept"])
            }
            voice = cls(
                tensors["gpt_cond_latent"],
                tensors["speaker_embedding"],
                manifest["weights"],
                recordings,
                manifest["made"],
            )
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, VoiceError):
                raise
            raise VoiceError(
                f"{path} is no voice ({describe(error)}); expected a file of Voice.save or of neuron-xtts voices add"
            ) from error
        voice._check(str(path))
        return voice

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a file, at once or not at all, in place of what is there.

        Args:
            path: of the file; safetensors is its format, whatever the name ends with.

        Returns:
            the path.
        """
        from safetensors.torch import save

        path = Path(path)
        tensors = {"gpt_cond_latent": self.latents.contiguous(), "speaker_embedding": self.embedding.contiguous()}
        for number, content in enumerate(self.recordings.values()):
            tensors[f"{_RECORDING}{number}"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        manifest = {
            "schema": SCHEMA,
            "weights": self.weights,
            "kept": list(self.recordings),
            "made": dict(self.made),
        }
        data = save(tensors, {_MANIFEST: json.dumps(manifest)})
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            half.write_bytes(data)
            os.replace(half, path)
        finally:
            half.unlink(missing_ok=True)
        return path

    def fits(self, model: object) -> bool:
        """Whether a model has the encoders that made it."""
        return self.weights == encoders_digest(find_xtts(model))

    def on(self, model: object) -> Voice:
        """This voice for a model: itself if it fits, else made again of its recordings.

        Raises:
            VoiceError: it does not fit, and has no recordings.
        """
        if self.fits(model):
            return self
        if not self.recordings:
            raise VoiceError(
                f"The voice was made by other weights (encoders {self.weights[:12]}, the model has "
                f"{encoders_digest(find_xtts(model))[:12]}) and has no recordings to make it of again: make it with "
                "this model, by Voice.of(model, recordings) or neuron-xtts voices add"
            )
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for number, (name, content) in enumerate(self.recordings.items()):
                paths.append(Path(folder) / str(number) / name)
                paths[-1].parent.mkdir()
                paths[-1].write_bytes(content)
            return Voice.of(model, paths)

    @property
    def arguments(self) -> dict[str, Tensor]:
        """What ``Xtts.inference``, ``Xtts.inference_stream`` and ``aio.stream`` take for it."""
        return {"gpt_cond_latent": self.latents, "speaker_embedding": self.embedding}

    def add_to(self, model: object, name: str) -> None:
        """Put it among a model's own speakers, for ``tts.tts(text, speaker=name, language=...)``.

        Args:
            model: as for `patch`, patched or not.
            name: of the speaker; one that is there gives way.

        Raises:
            VoiceError: as `on` does.
        """
        from TTS.tts.layers.xtts.xtts_manager import SpeakerManager

        xtts: Any = find_xtts(model)
        voice = self.on(model)
        if xtts.speaker_manager is None:
            xtts.speaker_manager = SpeakerManager.__new__(SpeakerManager)  # its constructor reads a file
            xtts.speaker_manager.speakers = {}
        # In this order: coqui-tts takes their values.
        speaker = {"gpt_cond_latent": voice.latents, "speaker_embedding": voice.embedding}
        xtts.speaker_manager.speakers[name] = speaker

    def _check(self, source: str) -> None:
        """Raise `VoiceError` unless it can be spoken with."""
        for name, tensor, expected in (
            ("conditioning latents", self.latents, "(1, 32, D)"),
            ("speaker embedding", self.embedding, "(1, G, 1)"),
        ):
            if tensor.dim() != 3 or tensor.shape[0] != 1 or tensor.dtype is not torch.float32:
                raise VoiceError(f"{source} has {name} of {tuple(tensor.shape)} in {tensor.dtype}; expected {expected}")
            if not tensor.isfinite().all():
                raise VoiceError(f"{source} gives {name} that are not finite; take another recording")


class VoiceFolder:
    """A folder of voices, by name.

    Args:
        root: the folder; by default what NEURON_XTTS_VOICES names, else ``voices`` in the user's data folder.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        root = root or os.environ.get(FOLDER_VARIABLE) or platformdirs.user_data_path("neuron_xtts", False) / "voices"
        self.root = Path(root).expanduser().absolute()

    def __iter__(self) -> Iterator[str]:
        """The names, in alphabetical order."""
        paths = self.root.glob(f"*{SUFFIX}") if self.root.is_dir() else ()
        names = (path.name.removesuffix(SUFFIX) for path in paths)
        return iter(sorted(filter(_is_name, names)))  # a file that is named otherwise is nobody's voice

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _is_name(name) and self.path(name).is_file()

    def path(self, name: str) -> Path:
        """The file of a voice, there or not. Raises ValueError if the name can be none."""
        if not _is_name(name):
            raise ValueError(
                f"{name!r} cannot be the name of a voice; expected at most 64 letters (192 bytes), digits, spaces, "
                "dots, dashes, underscores and apostrophes, the first and the last of them a letter or digit"
            )
        return self.root / f"{name}{SUFFIX}"

    def load(self, name: str) -> Voice:
        """A voice of the folder.

        Raises:
            ValueError: there is none of that name; those that there are are named.
            VoiceError: as `Voice.load` does.
        """
        return Voice.load(self._existing(name))

    def add(self, name: str, voice: Voice, *, replace: bool = False) -> Path:
        """Keep a voice; returns its file.

        Raises:
            FileExistsError: there is one of that name.
        """
        path = self.path(name)
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / _LOCK):  # several may add one of the same name
            if path.exists() and not replace:
                raise FileExistsError(f"there is a voice {name!r} already, {path}; remove it, or replace it")
            return voice.save(path)

    def remove(self, name: str) -> Path:
        """Delete a voice; returns the file that was.

        Raises:
            ValueError: there is none of that name.
        """
        path = self._existing(name)
        path.unlink()
        return path

    def _existing(self, name: str) -> Path:
        """The file of a voice. Raises ValueError if there is none."""
        if name not in self:
            raise ValueError(f"there is no voice {name!r} in {self.root}; there are: {', '.join(self) or 'none'}")
        return self.path(name)


def _is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and len(name.encode()) <= 192  # file systems count bytes


def _several(recordings: Recordings | None) -> Sequence[str | os.PathLike[str]]:
    if recordings is None:
        return ()
    return (recordings,) if isinstance(recordings, (str, os.PathLike)) else recordings


def _names(paths: Sequence[Path]) -> list[str]:
    """Of files, made different where they are the same."""
    names = [path.name for path in paths]
    return [f"{number}-{name}" if names.count(name) > 1 else name for number, name in enumerate(names)]


def _own(tensor: Tensor) -> Tensor:
    """A copy that belongs to nobody else, nor to inference mode."""
    with torch.inference_mode(False):
        return tensor.detach().cpu().float().clone()
