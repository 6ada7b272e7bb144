"""What the server speaks with: the patched model, its voices, and who may speak when."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from neuron_xtts.coqui.find import find_xtts
from neuron_xtts.coqui.recordings import check_recording, write_reference
from neuron_xtts.decoding.caller import Caller
from neuron_xtts.errors import NeuronXttsError, VoiceError, describe
from neuron_xtts.narration.narrator import Narration
from neuron_xtts.narration.text import Reader, Sentence, known_language
from neuron_xtts.serving.errors import ApiError
from neuron_xtts.serving.recordings import as_wav
from neuron_xtts.speaking import patch_of
from neuron_xtts.voice import Voice, VoiceFolder

logger = logging.getLogger(__name__)

#: The voices that OpenAI's clients know; many apps offer no other.
ALIASES = (
    "alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer", "verse",
)  # fmt: skip

T = TypeVar("T")

_KEPT = 64  # voices in memory
_TRIAL = "One, two, three."


@dataclass(frozen=True)
class Settings:
    """How a model is served; the numbers are choices of ours, but for OpenAI's 4096.

    Attributes:
        language: of text that says none.
        aliases: names of voices for the names of others, such as OpenAI's; those that are not named get one in turn.
        keys: of which a request must have one; none: every request is answered.
        origins: of web pages that may call from elsewhere.
        characters: of one request.
        requests: that may be answered at once, those that wait included.
        uploads: whether clients may add voices.
        recording: bytes of a recording.
        voices: that may be kept, at most.
    """

    language: str = "en"
    aliases: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    characters: int = 4096
    requests: int = 128
    uploads: bool = True
    recording: int = 32 * 2**20
    voices: int = 1000


class Studio:
    """A patched model and the voices that it speaks in.

    Args:
        model: a patched ``TTS.api.TTS``, ``Synthesizer`` or ``Xtts``.
        folder: of voices that are kept.
        settings: how it is served.

    Attributes:
        model: likewise.
        folder: likewise.
        settings: likewise.
        ready: whether it has spoken.
        active: requests that are answered now.
    """

    def __init__(self, model: object, folder: VoiceFolder, settings: Settings) -> None:
        self.model = model
        self.folder = folder
        self.settings = settings
        self.ready = False
        self.active = 0
        self._xtts: Any = find_xtts(model)
        self._loaded: OrderedDict[str, tuple[object, dict[str, Tensor]]] = OrderedDict()
        self._reading = _reading_room()
        self._adding = asyncio.Semaphore(2)  # recordings that are decoded at once
        for name, meant in settings.aliases.items():
            if meant not in self.voices():
                logger.warning("%r stands for %r, which is no voice yet", name, meant)
        reader = Reader(model, settings.language)  # fails before anything is served
        self._readers = {reader.language: reader}

    @property
    def own(self) -> list[str]:
        """The checkpoint's own speakers."""
        return list(getattr(self._xtts.speaker_manager, "speakers", {}))

    def voices(self) -> list[str]:
        """Every voice that there is, those that people keep first."""
        kept = list(self.folder)
        return kept + [name for name in self.own if name not in kept]

    @cached_property
    def languages(self) -> list[str]:
        """That the checkpoint speaks."""
        return [str(name) for name in self._xtts.config.languages]

    def reader(self, language: str | None) -> Reader:
        """Of text in a language; None: the server's own.

        Raises:
            ApiError: the checkpoint does not speak it.
        """
        try:
            name = known_language(self.model, language or self.settings.language)
            if name not in self._readers:
                self._readers[name] = Reader(self.model, name)
        except ValueError as error:
            raise ApiError(400, str(error), param="language") from error
        return self._readers[name]

    async def read(self, text: str, language: str | None) -> tuple[Reader, list[Sentence]]:
        """The sentences of a text, and what read them.

        Raises:
            ApiError: there is nothing to say, or too much, or a language or pause that is none.
        """
        most = self.settings.characters
        if len(text) > most:
            raise ApiError(400, f"input has {len(text)} characters; expected at most {most}", param="input")
        reader = self.reader(language)
        try:
            return reader, await self.in_reading_room(partial(reader.read, text))
        except ValueError as error:
            raise ApiError(400, str(error), param="input") from error

    async def in_reading_room(self, call: Callable[[], T]) -> T:
        """What a call gives that reads text, which may take seconds of what is no language: few of them at once."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, call)

    def close(self) -> None:
        """Let go of its threads; it may be used again."""
        reading, self._reading = self._reading, _reading_room()
        reading.shutdown(wait=False, cancel_futures=True)

    def resolve(self, name: str) -> str:
        """The voice that is meant by a name: itself, or what it stands for.

        Raises:
            ApiError: there is no such voice.
        """
        there = self.voices()
        if name in there:
            return name
        meant = self.settings.aliases.get(name)
        if meant in there:
            return str(meant)
        if name in ALIASES and there:
            return there[ALIASES.index(name) % len(there)]
        known = ", ".join(map(repr, there[:20])) or "none yet: POST /v1/audio/voices, or neuron-xtts voices add"
        raise ApiError(400, f"There is no voice {name!r}; there are {known}", param="voice", code="voice_not_found")

    async def voice(self, name: str) -> dict[str, Tensor]:
        """What ``aio.stream`` takes for a voice, by its name.

        Raises:
            ApiError: there is no such voice, or this model cannot speak with it.
        """
        found = self.resolve(name)
        try:
            return await asyncio.to_thread(self._load, found)
        except VoiceError as error:
            logger.warning("voice %r: %s", found, error)
            message = f"The voice {name!r} cannot be spoken with by this model; make it again"
            raise ApiError(400, message, param="voice") from error
        except (ValueError, OSError, AttributeError, KeyError) as error:  # somebody removed it a moment ago
            raise ApiError(
                400, f"There is no voice {name!r} any more", param="voice", code="voice_not_found"
            ) from error

    def _load(self, name: str) -> dict[str, Tensor]:
        if name not in self.folder:
            latents, embedding = self._xtts.speaker_manager.speakers[name].values()
            return {"gpt_cond_latent": latents, "speaker_embedding": embedding}
        stat = self.folder.path(name).stat()
        stamp = stat.st_mtime_ns, stat.st_size, stat.st_ino
        known = self._loaded.get(name)
        if known is None or known[0] != stamp:
            known = self._loaded[name] = stamp, self.folder.load(name).on(self.model).arguments
        self._loaded.move_to_end(name)
        while len(self._loaded) > _KEPT:
            self._loaded.popitem(last=False)
        return known[1]

    def narrate(
        self,
        sentences: Iterable[Sentence] | AsyncIterable[Sentence],
        reader: Reader,
        voice: Mapping[str, Tensor],
        *,
        hurry: bool = False,
        **options: Any,
    ) -> Narration:
        """Say sentences; with ``hurry`` the first chunk is short where nobody else speaks."""
        given = {name: value for name, value in {**options, **voice}.items() if value is not None}
        first = 10 if hurry and self.idle else None
        return Narration(self.model, sentences, language=reader.language, first=first, **given)

    @property
    def idle(self) -> bool:
        """Whether nothing decodes or waits."""
        counts = patch_of(self.model).dispatcher.engines.counts()
        return not counts.decoding and not counts.waiting

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """For the length of a ``with`` block, one of the requests that are answered at once.

        Raises:
            ApiError: there are as many as may be.
        """
        if self.active >= self.settings.requests:
            raise ApiError(429, f"{self.active} requests are answered, as many as may be; call again later")
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    async def warm_up(self) -> None:
        """Speak, so that whatever happens once has happened before somebody waits for it; then it is `ready`."""
        if self.ready:
            return
        start = time.monotonic()
        try:
            voice = await self._any_voice()
            narration = self.narrate([Sentence(_TRIAL)], self.reader(None), voice, seed=0, max_new_tokens=60)
            async with contextlib.aclosing(narration.chunks()) as chunks:
                async for _ in chunks:
                    pass
        except Exception as error:  # a server that cannot speak is not ready, and says so
            logger.error("the warm-up failed: %s", describe(error), exc_info=error)
            return
        self.ready = True
        logger.info("ready after %.1f s", time.monotonic() - start)

    async def _any_voice(self) -> dict[str, Tensor]:
        for name in self.voices():
            with contextlib.suppress(ApiError):
                return await self.voice(name)
        return await asyncio.to_thread(self._voice_of_tone)

    def _voice_of_tone(self) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tone.wav"
            write_reference(path, seconds=3)
            return Voice.of(self.model, path, keep=False).arguments

    async def add(self, name: str, recording: bytes) -> None:
        """Keep a voice that is made of a recording.

        Raises:
            ApiError: its name or the recording is none, or there are too many voices.
        """
        if not self.settings.uploads:
            raise ApiError(403, "This server adds no voices for clients")
        if len(list(self.folder)) >= self.settings.voices:
            raise ApiError(400, f"There are {self.settings.voices} voices, as many as may be", param="name")
        async with self._adding:
            await asyncio.to_thread(self._add, name, recording)

    def _add(self, name: str, recording: bytes) -> None:
        try:
            if self.folder.path(name).exists():
                raise ApiError(409, f"There is a voice {name!r} already; take another name", param="name")
        except ValueError as error:
            raise ApiError(400, str(error), param="name") from error
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recording.wav"
            try:
                path.write_bytes(as_wav(recording))
                check_recording(path)
                with Caller(patient=True).calls():
                    voice = Voice.of(self.model, path)
            except (NeuronXttsError, ValueError, OSError) as error:
                logger.warning("an uploaded recording: %s", error)
                raise ApiError(
                    400, "audio_sample cannot be read as a recording of a voice; expected WAV, AIFF, FLAC, MP3, AAC, "
                    "Ogg, M4A or WebM, of 0.33 s at least", param="audio_sample",
                ) from error  # fmt: skip
        try:
            self.folder.add(name, voice)
        except FileExistsError as error:
            raise ApiError(409, f"There is a voice {name!r} already; take another name", param="name") from error


def _reading_room() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, "neuron_xtts.serving.reading")  # which has threads once it is used
