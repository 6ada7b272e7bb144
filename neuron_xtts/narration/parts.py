"""Sentences of a long text that were said already, kept beside the file that they are for until it is whole."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from neuron_xtts.coqui.constants import OUTPUT_RATE
from neuron_xtts.narration.encoding import Encoder, Pcm
from neuron_xtts.narration.narrator import Span, silence
from neuron_xtts.narration.text import Sentence

_MANIFEST = "manifest.json"
_LOCK = "lock"
_SUFFIX = ".pcm"
_HALF = ".half"  # ends the name of what is not written yet
#: Rises when a version cannot go on with what the one before left.
_SCHEMA = 1


class Parts:
    """The sentences of one speech that were said so far, in a folder that one process at a time writes.

    Args:
        file: that they are for; the folder is beside it, and is named ``FILE.parts``.
    """

    def __init__(self, file: Path) -> None:
        self.folder = file.with_name(f"{file.name}.parts")
        self._lock = FileLock(self.folder / _LOCK, timeout=0)
        self._found = 0  # sentences, at least

    def __enter__(self) -> Parts:
        self.folder.mkdir(exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"{self.folder} is written by another process; wait for it, or name another file"
            ) from None
        return self

    def __exit__(self, *error: object) -> None:
        if self.folder.is_dir() and not self._path(_MANIFEST).exists():
            self.remove()  # nothing was begun
        self._lock.release()

    def begin(self, manifest: Mapping[str, Any], *, restart: bool = False) -> dict[str, Any]:
        """Begin a speech, or go on with the one that is there.

        Args:
            manifest: all that decides how it sounds, as JSON has it. A ``seed`` of None is that of the one that is
                there, else one that is drawn.
            restart: discard what is there.

        Returns:
            the manifest that is there from now on.

        Raises:
            ValueError: another speech is there.
        """
        if restart:
            self._clear()
        asked: dict[str, Any] = json.loads(json.dumps({"schema": _SCHEMA, **manifest}))
        found = self.manifest()
        if found is None:
            self._clear()  # sentences of nobody knows what
            asked["seed"] = secrets.randbits(32) if asked.get("seed") is None else asked["seed"]
            self._write(_MANIFEST, json.dumps(asked, indent=1).encode())
            return asked
        if asked.get("seed") is None:
            asked["seed"] = found.get("seed")
        if differences := _differences(found, asked):
            raise ValueError(
                f"{self.folder} has {len(self)} sentences of another speech: it differs in "
                f"{', '.join(differences)}. Say it as before, or discard them with --restart"
            )
        return found

    def manifest(self) -> dict[str, Any] | None:
        """What is written of the speech that is there; None if there is none.

        Raises:
            ValueError: it cannot be read.
        """
        try:
            found: dict[str, Any] = json.loads(self._path(_MANIFEST).read_bytes())
            return dict(found)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{self._path(_MANIFEST)} is damaged ({error}); discard it with --restart") from error

    def __len__(self) -> int:
        """How many sentences there are, from the first on."""
        while self._sentence(self._found).is_file():
            self._found += 1
        return self._found

    def __iter__(self) -> Iterator[Pcm]:
        """The samples of each, in order, one sentence in memory at a time."""
        for number in range(len(self)):
            yield np.fromfile(self._sentence(number), "<i2")

    def lengths(self) -> list[int]:
        """How many samples each has."""
        return [self._sentence(number).stat().st_size // 2 for number in range(len(self))]

    def add(self, samples: Pcm) -> None:
        """Keep the next sentence, whole or not at all."""
        self._write(self._sentence(len(self)).name, samples.astype("<i2").tobytes())

    def remove(self) -> None:
        """Delete the folder, but for what is not of it."""
        self._clear()
        self._path(_LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's files are in it
            self.folder.rmdir()

    def _clear(self) -> None:
        """Delete the speech; what says what its sentences are goes last."""
        self._found = 0
        for pattern in (f"*{_HALF}", f"*{_SUFFIX}", _MANIFEST):
            for path in self.folder.glob(pattern):
                path.unlink()

    def _write(self, name: str, data: bytes) -> None:
        half = self._path(name + _HALF)
        with half.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a machine may stop, too
        os.replace(half, self._path(name))

    def _sentence(self, number: int) -> Path:
        return self._path(f"{number:06}{_SUFFIX}")

    def _path(self, name: str) -> Path:
        return self.folder / name


def spans_of(sentences: Sequence[Sentence], lengths: Sequence[int]) -> tuple[list[Span], int]:
    """When each sentence is said, and how many samples there are in all, with the silence between them."""
    spans, samples = [], 0
    for sentence, length in zip(sentences, lengths, strict=True):
        samples += len(silence(sentence.before))
        spans.append(Span(sentence.text, samples / OUTPUT_RATE, (samples + length) / OUTPUT_RATE))
        samples += length + len(silence(sentence.after))
    return spans, samples


def write_whole(
    path: Path, name: str, sentences: Sequence[Sentence], parts: Iterable[Pcm], lengths: Sequence[int]
) -> list[Span]:
    """Write a file, whole or not at all, one sentence in memory at a time.

    Args:
        path: of the file.
        name: of the format, of `FORMATS`.
        sentences: that are in it.
        parts: the samples of each.
        lengths: how many each has.

    Returns:
        when each sentence is said.
    """
    half = path.with_name(f".{uuid.uuid4().hex}{_HALF}")  # of its own: two may write the same file
    try:
        with half.open("wb") as file, contextlib.closing(Encoder(name, OUTPUT_RATE, file)) as encoder:
            for sentence, samples in zip(sentences, parts, strict=True):
                for piece in (silence(sentence.before), samples, silence(sentence.after)):
                    encoder.encode(piece)
            encoder.finish()
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
    return spans_of(sentences, lengths)[0]


def _differences(found: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What two manifests differ in, in words."""
    names = [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
    return [_difference(name, found.get(name), asked.get(name)) for name in names]


def _difference(name: str, found: Any, asked: Any) -> str:
    if name == "sentences" and isinstance(found, list) and isinstance(asked, list):
        pairs = zip(found, asked, strict=False)
        number = next((number for number, (one, two) in enumerate(pairs) if one != two), min(len(found), len(asked)))
        return f"the text (sentence {number + 1})"
    if isinstance(found, str) and len(found) == 64:  # a digest, of which nobody wants to see the digits
        return f"the {name}"
    return f"{name} ({found!r}, now {asked!r})"
