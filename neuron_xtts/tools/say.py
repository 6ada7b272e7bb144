"""The command ``neuron-xtts say``: text as a file, into a pipe, or heard."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import neuron_xtts
from neuron_xtts.coqui.models import load_or_download
from neuron_xtts.coqui.recordings import check_recording
from neuron_xtts.narration.encoding import FORMATS, check_format
from neuron_xtts.narration.text import Reader
from neuron_xtts.options import PatchOptions
from neuron_xtts.tools import commands, saying
from neuron_xtts.voice import Voice, VoiceFolder

_STDOUT = Path("-")
_ENDINGS = {"ogg": "opus"}  # of names, for formats that are named otherwise

EPILOG = """examples:
  neuron-xtts say "Hello." --speaker-wav me.wav -o hello.wav
  neuron-xtts say -f book.txt --voice ann -o book.mp3      # the same command goes on where it was stopped
  neuron-xtts say "Hello." --voice ann --stream            # is heard as it is made
  fortune | neuron-xtts say --voice ann -o - --format opus | ssh host mpv -"""


def run_say(arguments: argparse.Namespace) -> int:
    """Say a text."""
    commands.quieten()
    name = _check(arguments)
    text = _text(arguments)
    if arguments.verbose:
        logging.getLogger("neuron_xtts").setLevel(logging.INFO)
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # where coqui-tts asks for its licence
        tts = load_or_download(arguments.checkpoint)
        speech = _speech(tts, text, arguments, commands.patch_options(arguments))
        said = _say(speech, name, arguments, out)
        if arguments.verbose:
            print(neuron_xtts.report(tts))
    if arguments.json:
        print(json.dumps(_described(said, name, arguments), indent=2, ensure_ascii=False), file=out)
    return 0


def _check(arguments: argparse.Namespace) -> str:
    """Refuse, before a model is loaded, what cannot be; returns the name of the format."""
    out: Path | None = arguments.out
    if out is None and not arguments.stream:
        raise ValueError("nowhere to say it: name a file with -o, or hear it with --stream")
    if arguments.json and out == _STDOUT:
        raise ValueError("--json and -o - cannot be both: each writes to standard output")
    for path in arguments.speaker_wav or ():
        if not path.is_file() and not arguments.text:
            raise ValueError(
                f"there is no recording {path}; if that is the text, it goes before --speaker-wav, or after --"
            )
        check_recording(path)
    for path in (*(arguments.speaker_wav or ()), arguments.file):
        if path and out and _STDOUT not in (path, out) and path.resolve() == out.resolve():
            raise ValueError(f"{out} is read, and would be overwritten; name another file with -o")
    if out is None:
        saying.find_player()
        return "pcm"
    ending = "" if out == _STDOUT else out.suffix.lstrip(".").lower()
    name: str = arguments.format or _ENDINGS.get(ending, ending) or "wav"
    check_format(name)
    if _is_file(out):
        commands.check_files(out)
    return name


def _is_file(out: Path) -> bool:
    """Whether it is a file, there or not, and neither a pipe nor a device."""
    return out != _STDOUT and (not out.exists() or out.is_file() or out.is_dir())


def _text(arguments: argparse.Namespace) -> str:
    given: list[str] = arguments.text
    if given and arguments.file:
        raise ValueError(f"a text and -f {arguments.file}: expected one of both")
    if arguments.file and arguments.file != _STDOUT:
        return _decoded(arguments.file.read_bytes(), str(arguments.file))
    if given and given != ["-"]:
        return " ".join(given)
    if not given and not arguments.file and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("there is nothing to say: give a text, -f FILE, or a pipe")
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is no text in UTF-8: {error}; convert it, such as by iconv -f latin1 -t utf-8"
        ) from error


def _speech(tts: Any, text: str, arguments: argparse.Namespace, options: PatchOptions) -> saying.Speech:
    """What is said: all that can be refused is, before the model is patched."""
    reader = Reader(tts, arguments.language)
    sentences = reader.read(text)
    if arguments.seed is not None and not arguments.seed + len(sentences) - 1 < 2**64:
        raise ValueError(f"--seed {arguments.seed} is too large for {len(sentences)} sentences, each with one more")
    folder = VoiceFolder(arguments.voices)
    own = getattr(tts.synthesizer.tts_model.speaker_manager, "speakers", {})
    if arguments.voice is not None and arguments.voice not in folder and arguments.voice not in own:
        there = ", ".join([*folder, *own]) or "none"
        raise ValueError(
            f"there is no voice {arguments.voice!r} in {folder.root}, nor of the checkpoint: there are {there}"
        )
    xtts = tts.synthesizer.tts_model
    weights = saying.weights_digest(xtts) if len(sentences) > 1 and not arguments.stream else ""
    voice = _voice(tts, arguments, folder)  # as it is without a patch: to the last digit
    neuron_xtts.patch(tts, guard=not arguments.no_guard, **options)
    return saying.Speech(
        xtts=xtts,
        sentences=sentences,
        language=reader.language,
        voice=voice,
        precision=arguments.precision,
        backend=neuron_xtts.report(tts).backend or arguments.backend,
        speed=arguments.speed,
        seed=arguments.seed,
        weights=weights,
        guarded=not arguments.no_guard,
    )


def _voice(tts: Any, arguments: argparse.Namespace, folder: VoiceFolder) -> Voice:
    if arguments.speaker_wav:
        return Voice.of(tts, arguments.speaker_wav, keep=False)
    if arguments.voice in folder:
        return folder.load(arguments.voice).on(tts)
    return Voice.of(tts, speaker=arguments.voice, keep=False)


def _say(speech: saying.Speech, name: str, arguments: argparse.Namespace, stdout: Any) -> saying.Said:
    out: Path | None = arguments.out
    if out is None:
        return saying.play(speech, saying.find_player())
    if _is_file(out) and not arguments.stream:
        return saying.into_file(speech, out.resolve(), name, restart=arguments.restart)
    say = saying.as_it_is_made if arguments.stream else saying.into_pipe
    with _opened(out, stdout) as file:
        return say(speech, file, name)


@contextlib.contextmanager
def _opened(out: Path, stdout: Any) -> Iterator[IO[bytes]]:
    if out == _STDOUT:
        yield stdout.buffer
    else:
        with out.open("wb") as file:
            yield file


def _described(said: saying.Said, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "file": str(arguments.out) if arguments.out else None,
        "format": name,
        "seconds": said.seconds,
        "took": said.took,
        "rtf": said.rtf,
        "seed": said.seed,
        "voice": arguments.voice or [str(path) for path in arguments.speaker_wav],
        "sentences": [asdict(span) for span in said.spans],
    }


def add_arguments(saying: argparse.ArgumentParser) -> None:
    """The arguments of the command, but for those that others have, too."""
    saying.add_argument("text", nargs="*", help="that is said; - is standard input, as is none where there is a pipe")
    saying.add_argument("-f", "--file", type=Path, metavar="FILE", help="with the text, in UTF-8")
    saying.add_argument("--language", default="en", help="of the text (default: %(default)s)")
    voice = saying.add_mutually_exclusive_group(required=True)
    voice.add_argument("--voice", metavar="NAME", help="that is kept, or one of the checkpoint's own")
    voice.add_argument(
        "--speaker-wav", type=Path, nargs="+", action="extend", metavar="FILE", help="recordings of the voice to clone"
    )
    saying.add_argument("--voices", type=Path, metavar="DIR", help="the folder of voices (default: the user's)")
    saying.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="an XTTS v2 (default: as coqui-tts downloads it)"
    )
    saying.add_argument("-o", "--out", type=Path, metavar="FILE", help="that is written; - is standard output")
    saying.add_argument(
        "--format", metavar="NAME", help=f"{', '.join(FORMATS)} (default: by the name of the file, else wav)"
    )
    saying.add_argument("--stream", action="store_true", help="write it as it is made; without -o, play it")
    saying.add_argument("--speed", type=_speed, default=1.0, help="0.25 to 4 (default: the voice's own, 1)")
    saying.add_argument("--restart", action="store_true", help="discard the sentences of a run that was stopped")
    saying.add_argument("--no-guard", action="store_true", help="without the one against hallucinated tails")
    saying.add_argument("--json", action="store_true", help="say on standard output what was made, and when")
    saying.add_argument("-v", "--verbose", action="store_true", help="say what runs where")


def _speed(value: str) -> float:
    try:
        speed = float(value)
    except ValueError:
        speed = 0.0
    if not 0.25 <= speed <= 4:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number from 0.25 to 4")
    return speed
