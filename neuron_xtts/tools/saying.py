"""What ``neuron-xtts say`` does once a model is there: sentences into a file, a pipe or a player."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np

import neuron_xtts
from neuron_xtts.coqui.constants import OUTPUT_RATE
from neuron_xtts.coqui.voices import encoders_digest
from neuron_xtts.coqui.weights import Digester, tensor_digest
from neuron_xtts.narration.encoding import Encoder, Pcm, Samples, to_int16
from neuron_xtts.narration.narrator import Narration, Span, silence
from neuron_xtts.narration.parts import Parts, spans_of, write_whole
from neuron_xtts.narration.text import Sentence
from neuron_xtts.version import __version__
from neuron_xtts.voice import Voice

_UNHEARD = "audio open failed"  # which ffplay says where there is no loudspeaker, and exits as if there were one

# By which name the voice is among the model's speakers.
_SPEAKER = "neuron-xtts say"

_PLAYERS = {
    "ffplay": "-loglevel error -nodisp -autoexit -f s16le -sample_rate {rate} -i -",  # mono unless told otherwise
    "aplay": "-q -t raw -f S16_LE -r {rate} -c 1 -",
    "paplay": "--raw --format=s16le --rate={rate} --channels=1",
}


@dataclass(frozen=True)
class Speech:
    """What is said, and how.

    Attributes:
        xtts: the patched ``Xtts``.
        sentences: of the text.
        language: of them.
        voice: that says them.
        precision: by its name.
        backend: by its name.
        speed: 1 is the voice's own.
        seed: of the first sentence; None: none was asked for.
        weights: what tells this model from others.
        guarded: whether the model is guarded against tails.
    """

    xtts: Any
    sentences: Sequence[Sentence]
    language: str
    voice: Voice
    precision: str
    backend: str
    speed: float
    seed: int | None
    weights: str
    guarded: bool

    def manifest(self) -> dict[str, Any]:
        """All that decides how it sounds."""
        latents, embedding = tensor_digest(self.voice.latents), tensor_digest(self.voice.embedding)
        return {
            "sentences": [asdict(sentence) for sentence in self.sentences],
            "language": self.language,
            "voice": hashlib.sha256(f"{latents} {embedding}".encode()).hexdigest(),
            "encoders": encoders_digest(self.xtts),
            "weights": self.weights,
            "precision": self.precision,
            "backend": self.backend,
            "guard": self.guarded,
            "speed": self.speed,
            "seed": self.seed,
            "versions": {name: version(name) for name in ("coqui-tts", "torch")} | {"neuron-xtts": __version__},
        }

    def begun(self) -> Said:
        """What is said, with nothing of it said yet, and a seed that is drawn if none was asked for."""
        return Said(secrets.randbits(32) if self.seed is None else self.seed)

    def said(self, seed: int, begin: int = 0) -> Generator[Samples, None, None]:
        """The samples of each sentence, many of which are said at once, without the silence around it.

        Args:
            seed: of the first of all sentences.
            begin: how many of them to leave out, from the first on.
        """
        self.voice.add_to(self.xtts, _SPEAKER)
        texts = [sentence.text for sentence in self.sentences[begin:]]
        said = neuron_xtts.speak_many(
            self.xtts, texts, seed=seed + begin, speaker=_SPEAKER, language=self.language, speed=self.speed
        )
        for wav in said:
            yield np.asarray(wav, np.float32)


@dataclass
class Said:
    """What was said.

    Attributes:
        seed: of the first sentence.
        spans: when each sentence is said.
        samples: in all.
        made: samples that were made now, and not found.
        took: seconds, without loading the model.
    """

    seed: int
    spans: list[Span] = field(default_factory=list)
    samples: int = 0
    made: int = 0
    took: float = 0.0

    @property
    def seconds(self) -> float:
        """Of audio."""
        return self.samples / OUTPUT_RATE

    @property
    def rtf(self) -> float | None:
        """Seconds that a second of what was made now took; None if nothing was."""
        return self.took * OUTPUT_RATE / self.made if self.made else None


class Sink:
    """Takes samples, and writes them encoded as soon as it has them.

    Args:
        file: that is written.
        name: of the format.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.samples = 0
        self._file = file
        # Where it can be written again, its header says in the end how long it is.
        whole = file.seekable() and Path(f"/dev/fd/{file.fileno()}").is_file()
        self._encoder = Encoder(name, OUTPUT_RATE, file if whole else None)

    def take(self, samples: Samples | Pcm) -> None:
        """Write what comes next."""
        self.samples += len(samples)
        self._write(self._encoder.encode(samples))

    def finish(self) -> None:
        """Write the end."""
        self._write(self._encoder.finish())

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()


def into_file(speech: Speech, path: Path, name: str, *, restart: bool = False) -> Said:
    """Say sentences into a file, which is there once it is whole. What was said before is not said again.

    Raises:
        ValueError: sentences of another speech are there.
        KeyboardInterrupt: somebody interrupted it; what it says is how to go on.
    """
    if len(speech.sentences) == 1:
        said = speech.begun()
        with _timed(said):
            parts = [to_int16(samples) for samples in speech.said(said.seed)]
            said.made = len(parts[0])
            _finish(said, speech, path, name, parts, [len(parts[0])])
        return said
    with Parts(path) as kept:
        try:
            return _into_parts(speech, kept, path, name, restart)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped after {len(kept)} of {len(speech.sentences)} sentences; the same command goes on from there"
            ) from None


def _into_parts(speech: Speech, kept: Parts, path: Path, name: str, restart: bool) -> Said:
    said = Said(kept.begin(speech.manifest(), restart=restart)["seed"])
    with _timed(said):
        if len(kept) < len(speech.sentences):
            with contextlib.closing(speech.said(said.seed, len(kept))) as rest:
                for samples in rest:
                    kept.add(to_int16(samples))
                    said.made += len(samples)
        _finish(said, speech, path, name, kept, kept.lengths())
    kept.remove()
    return said


def _finish(said: Said, speech: Speech, path: Path, name: str, parts: Any, lengths: Sequence[int]) -> None:
    said.spans = write_whole(path, name, speech.sentences, parts, lengths)
    said.samples = spans_of(speech.sentences, lengths)[1]


def into_pipe(speech: Speech, file: IO[bytes], name: str) -> Said:
    """Say sentences into what cannot be named again, each as soon as it is said."""
    said, sink = speech.begun(), Sink(file, name)
    lengths = []
    with _timed(said):
        for sentence, samples in zip(speech.sentences, speech.said(said.seed), strict=True):
            for piece in (silence(sentence.before), samples, silence(sentence.after)):
                sink.take(piece)
            lengths.append(len(samples))
            said.made += len(samples)
        sink.finish()
    said.spans, said.samples = spans_of(speech.sentences, lengths)
    return said


def as_it_is_made(speech: Speech, file: IO[bytes], name: str) -> Said:
    """Say sentences chunk by chunk, each written as soon as it is made."""
    said, sink = speech.begun(), Sink(file, name)
    options: dict[str, Any] = {"language": speech.language, "speed": speech.speed, **speech.voice.arguments}
    narration = Narration(speech.xtts, speech.sentences, seed=said.seed, **options)
    with _timed(said):
        asyncio.run(_narrate(narration, sink))
        sink.finish()
    said.spans, said.samples, said.made = narration.spans, sink.samples, sink.samples
    return said


async def _narrate(narration: Narration, sink: Sink) -> None:
    async with contextlib.aclosing(narration.chunks()) as chunks:
        async for chunk in chunks:
            await asyncio.to_thread(sink.take, chunk.samples)


def find_player() -> list[str]:
    """The command of a player that is installed here, which plays raw samples from its standard input.

    Raises:
        FileNotFoundError: there is none.
    """
    for name, arguments in _PLAYERS.items():
        if found := shutil.which(name):
            return [found, *arguments.format(rate=OUTPUT_RATE).split()]
    raise FileNotFoundError(f"there is no player here: install one of {', '.join(_PLAYERS)}, or write a file with -o")


def play(speech: Speech, command: Sequence[str]) -> Said:
    """Say sentences to a player, as they are made.

    Raises:
        OSError: it fails, or is closed.
    """
    said = None
    with tempfile.TemporaryFile() as told:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=told) as player:
            assert player.stdin is not None
            try:
                said = as_it_is_made(speech, player.stdin, "pcm")
                player.stdin.close()
            except BrokenPipeError:
                with contextlib.suppress(BrokenPipeError):
                    player.stdin.close()
            except BaseException:
                player.kill()
                raise
        told.seek(0)
        lines = told.read().decode(errors="replace").split("\n")
    if said is None or player.returncode or _UNHEARD in " ".join(lines):
        why = next(filter(None, map(str.strip, reversed(lines))), f"exit status {player.returncode}")
        raise OSError(f"{Path(command[0]).name} could not play it: {why[:200]}; write a file with -o")
    return said


def weights_digest(xtts: Any) -> str:
    """SHA-256 of what speaks with a voice, of a model that is not patched: then its weights may be elsewhere."""
    digester = Digester()
    found = [digester.digest(module) for module in (xtts.gpt, xtts.hifigan_decoder)]
    return hashlib.sha256(" ".join(found).encode()).hexdigest()


@contextlib.contextmanager
def _timed(said: Said) -> Iterator[None]:
    start = time.perf_counter()
    yield
    said.took = time.perf_counter() - start
