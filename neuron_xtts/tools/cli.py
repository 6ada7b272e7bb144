"""The command ``neuron-xtts``: its arguments."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from neuron_xtts.coqui.constants import STREAM_CHUNK
from neuron_xtts.errors import NeuronXttsError
from neuron_xtts.tools import commands, say, serve, voices
from neuron_xtts.tools.arguments import (
    add_backend,
    add_model,
    add_plan,
    add_precision,
    add_speaker,
    add_target,
    positive,
    seed,
)
from neuron_xtts.tools.bench import PLAIN
from neuron_xtts.tools.bench.batch import RATE, SCENES
from neuron_xtts.version import __version__

Subparsers: TypeAlias = "argparse._SubParsersAction[_Parser]"

#: What `bench` measures, by the names that it had before.
_FORMER_NAMES = {"graphs": "methods"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(given, argparse.Namespace(given=given))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        status: int = arguments.run(arguments)
        return status
    except (NeuronXttsError, OSError, ValueError) as error:
        print(f"neuron-xtts: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"neuron-xtts: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Knows options by their whole names: ``--api-key`` would be ``--api-key-file``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="neuron-xtts", description="coqui-tts's XTTS v2 on AWS Neuron and on the host")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for add in (
        _add_say,
        _add_serve,
        _add_demo,
        _add_voices,
        _add_judge,
        _add_compile,
        _add_bench,
        _add_graphs,
        _add_doctor,
    ):
        add(subparsers)
    return parser


def _add_say(subparsers: Subparsers) -> None:
    saying = subparsers.add_parser(
        "say",
        help="say a text: into a file, a pipe, or aloud",
        description="Say a text of any length, sentence by sentence. What is said into a file goes on where it was "
        "stopped, if the same command is given again.",
        epilog=say.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    saying.set_defaults(run=say.run_say)
    say.add_arguments(saying)
    saying.add_argument("--seed", type=seed, help="of the first sentence; each further one has one more (default: any)")
    add_plan(saying)
    add_precision(saying)
    add_backend(saying)


def _add_serve(subparsers: Subparsers) -> None:
    serving = subparsers.add_parser(
        "serve",
        help="serve a model to OpenAI's clients and others",
        description="Serve one model over HTTP: OpenAI's API, text as it is written, voices, figures, a page.",
        epilog="examples:\n  neuron-xtts serve\n  neuron-xtts serve --precision int8 --alias alloy=ann",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serving.set_defaults(run=serve.run_serve)
    serve.add_arguments(serving)
    add_model(serving)
    add_plan(serving)
    add_precision(serving)
    add_backend(serving)


def _add_demo(subparsers: Subparsers) -> None:
    demo = subparsers.add_parser(
        "demo",
        help="speak one sentence with plain coqui-tts and patched, and compare",
        description="Speak one sentence with plain coqui-tts and patched, with the same seed; compare time and audio. "
        "Without --checkpoint the miniature speaks, if there is one, as in a checkout of the repository, and then a "
        "model of full size with random weights: its time is real, its audio is noise.",
    )
    demo.set_defaults(run=commands.run_demo)
    add_model(demo)
    add_plan(demo)
    add_precision(demo)
    add_speaker(demo)
    demo.add_argument("--text", help="the sentence")
    demo.add_argument("--language", default="en", help="of the sentence (default: %(default)s)")
    demo.add_argument("--codes", type=positive, default=100, help="with random weights (default: %(default)s)")
    demo.add_argument("--seed", type=seed, default=1, help="(default: %(default)s)")
    add_backend(demo)
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="(default: %(default)s)")


def _add_voices(subparsers: Subparsers) -> None:
    keeping = subparsers.add_parser(
        "voices",
        help="keep voices as files: add, list, remove",
        description="Keep voices as files. A voice is made of recordings once, and is spoken with from then on: it "
        "holds the conditioning latents, the speaker embedding, what made them, and the recordings, of which other "
        "weights make it again.",
        epilog="examples:\n  neuron-xtts voices add ann ann.wav --checkpoint DIR\n  neuron-xtts voices list\n"
        "  neuron-xtts voices remove ann",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = keeping.add_subparsers(required=True, metavar="action")
    adding = actions.add_parser("add", help="make a voice of recordings, and keep it")
    adding.set_defaults(run=voices.run_add)
    adding.add_argument("name", help="of the voice")
    adding.add_argument("recordings", type=Path, nargs="*", metavar="FILE", help="of one voice")
    adding.add_argument("--speaker", metavar="NAME", help="one of the checkpoint's own, in place of recordings")
    adding.add_argument("--replace", action="store_true", help="a voice of that name that is there")
    adding.add_argument("--forget", action="store_true", help="do not keep the recordings in the file")
    adding.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="that makes it (default: XTTS v2, as coqui-tts downloads it)"
    )
    listing = actions.add_parser("list", help="name the voices that there are")
    listing.set_defaults(run=voices.run_list)
    listing.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="say which of them it can speak with, and its own speakers, too"
    )
    removing = actions.add_parser("remove", help="delete a voice")
    removing.set_defaults(run=voices.run_remove)
    removing.add_argument("name", help="of the voice")
    for parser in (adding, listing, removing):
        parser.add_argument(
            "--voices", type=Path, metavar="DIR", help="the folder (default: NEURON_XTTS_VOICES, or the user's data)"
        )
        parser.add_argument("--json", action="store_true", help="objects instead of text")


def _add_compile(subparsers: Subparsers) -> None:
    compiling = subparsers.add_parser(
        "compile",
        help="compile the graphs for Neuron",
        description="Compile the graphs of a model for Neuron and put them into the store, from which patch() loads "
        "them. It takes minutes a graph, and needs Neuron's packages but no device. A graph of two small layers, the "
        "canary, comes first: if it fails, nothing else is tried. Exits with 1 if a graph failed.",
    )
    compiling.set_defaults(run=commands.run_compile)
    add_plan(compiling)
    add_precision(compiling)
    which = compiling.add_mutually_exclusive_group(required=True)
    add_model(which, small="a small model with random weights")
    which.add_argument("--random", action="store_true", help="a full-size model with random weights")
    add_target(compiling)
    compiling.add_argument("--jobs", type=positive, help="graphs at a time (default: what memory allows)")
    compiling.add_argument("--timeout", type=float, metavar="SECONDS", help="for one graph (default: an hour)")


def _add_bench(subparsers: Subparsers) -> None:
    bench = subparsers.add_parser(
        "bench",
        help="measure, patched against unpatched",
        description="Measure patched against unpatched coqui-tts, in turns, in one process, with a known voice. "
        "sentence: seconds by stage in every precision, first audio, accuracy, memory. stream: time to first audio and "
        "time per chunk. methods: GPT.forward, vocoder and generation by themselves, mean and deviation. batch: many "
        "callers at once, together and one by one. serve: the server beside the library. Full size takes half an hour "
        "on two cores, batch several hours. "
        "device: on a Neuron device, all that a report of it needs: doctor, canary, compilation, verification, every "
        "graph by itself, sentences and streams.",
    )
    bench.set_defaults(run=commands.run_bench)
    add_model(bench)
    add_plan(bench)
    add_precision(bench)
    add_speaker(bench)
    bench.add_argument(
        "what",
        type=lambda name: _FORMER_NAMES.get(name, name),
        choices=("sentence", "stream", "methods", "batch", "serve", "device"),
        nargs="?",
        default="sentence",
        help="(default: sentence)",
    )
    bench.add_argument(
        "--codes",
        type=positive,
        nargs="+",
        help="of each sentence or stream (default: 50 100 200 400; 100 300 600; of batch one number: 100)",
    )
    bench.add_argument("--callers", type=positive, nargs="+", help="of batch (default: 1 2 4 8 16), of serve (1 8)")
    bench.add_argument(
        "--scenes",
        nargs="+",
        choices=tuple(SCENES),
        default=tuple(SCENES),
        metavar="NAME",
        help="of batch: " + "; ".join(f"{name!r}, {what}" for name, what in SCENES.items()) + " (default: all)",
    )
    bench.add_argument(
        "--rate", type=float, default=RATE, help="of batch: calls a second that arrive at random (default: %(default)s)"
    )
    bench.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="sentences, one a line, to speak until they end by themselves, in place of --codes: for trained weights",
    )
    bench.add_argument(
        "--chunk", type=positive, default=STREAM_CHUNK, help="codes per chunk of a stream (default: %(default)s)"
    )
    bench.add_argument(
        "--precisions", nargs="+", metavar="NAME", help="of all but streams (default: all that the backend has)"
    )
    bench.add_argument("--rounds", type=positive, default=3, help="of all but methods (default: %(default)s)")
    bench.add_argument(
        "--iterations", type=positive, default=100, help="of methods; a tenth of generation (default: %(default)s)"
    )
    bench.add_argument("--warm-up", type=positive, default=10, help="iterations not counted (default: %(default)s)")
    add_backend(bench)
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all samples and the figures made of them")
    bench.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    bench.add_argument(
        "--png",
        type=Path,
        metavar="FILE",
        help="draw the RTF, the time per chunk, or the means; and beside it, for each precision, what utterances were "
        "at, and when: FILE-timeline-int8.png",
    )


def _add_judge(subparsers: Subparsers) -> None:
    judge = subparsers.add_parser(
        "judge",
        help="judge speech: word error rate, similarity of speakers, length",
        description="Speak sentences with plain coqui-tts and patched in every precision, with the same seeds, and "
        "judge them: words by offline recognizers, similarity to the recorded voice, length, whether they stop by "
        "themselves, and how near a precision is to coqui-tts. espeak-ng's own audio and shuffled texts are the "
        "controls. Needs the extra eval. Exits with 1 if a gate failed.",
    )
    judge.set_defaults(run=commands.run_judge, precision="fp32", compiler_args=[])
    judge.add_argument("--checkpoint", type=Path, metavar="DIR", required=True, help="an XTTS v2 checkpoint")
    judge.add_argument(
        "--speaker-wav", type=Path, metavar="FILE", nargs="+", required=True, help="one recording of each voice"
    )
    judge.add_argument(
        "--in-turn", action="store_true", help="one voice for a sentence, the next for the next (default: all for each)"
    )
    judge.add_argument("--texts", type=Path, metavar="FILE", required=True, help="English, one sentence a line")
    judge.add_argument("--limit", type=positive, metavar="N", help="only the first sentences")
    judge.add_argument("--seeds", type=seed, nargs="+", default=[1], help="of each sentence (default: 1)")
    judge.add_argument("--precisions", nargs="+", metavar="NAME", help="(default: all that the backend has)")
    add_backend(judge)
    add_plan(judge)
    judge.add_argument(
        "--recognizers",
        nargs="+",
        metavar="NAME",
        default=["moonshine"],
        help="moonshine, whisper (default: moonshine)",
    )
    judge.add_argument(
        "--baseline",
        default=PLAIN,
        metavar="VARIANT",
        help="what the others are compared with: coqui-tts, espeak-ng or a precision (default: %(default)s)",
    )
    judge.add_argument(
        "--espeak-voice",
        nargs="+",
        default=["en-us"],
        metavar="NAME",
        help="of the control, one for all voices or one for each (default: en-us)",
    )
    judge.add_argument(
        "--espeak-speed", type=positive, default=175, metavar="N", help="words per minute (default: %(default)s)"
    )
    judge.add_argument(
        "--espeak-range",
        type=positive,
        default=100,
        metavar="PERCENT",
        help="of the pitch that a voice has (default: %(default)s)",
    )
    judge.add_argument(
        "--gate",
        action="append",
        default=[],
        metavar="LIMIT",
        help="exit with 1 unless it holds: [VARIANT] FIGURE [- BASELINE] <= NUMBER, or >=, such as 'wer <= 0.2' or "
        "'wer - espeak-ng <= 0.03'",
    )
    judge.add_argument(
        "--gate-interval",
        action="append",
        default=[],
        metavar="LIMIT",
        help="the same, for the whole 95 %% interval, such as 'int8 wer - fp32 <= 0.02'",
    )
    judge.add_argument("--json", type=Path, metavar="FILE", help="write all samples and the figures made of them")
    judge.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    judge.add_argument("--audio", type=Path, metavar="DIR", help="keep what is spoken there")


def _add_graphs(subparsers: Subparsers) -> None:
    graphs = subparsers.add_parser(
        "graphs",
        help="list, verify and prune compiled graphs; lower them",
        description="Without options, list the store. --lower shows what the installed XLA frontend (torch-xla, or "
        "torch-neuronx's) makes of every graph of the static bucket plan, and whatever stands against compiling it.",
    )
    graphs.set_defaults(run=commands.run_graphs)
    add_model(graphs)
    add_plan(graphs)
    add_precision(graphs)
    what = graphs.add_mutually_exclusive_group()
    what.add_argument("--lower", action="store_true", help="lower the graphs; exit with 1 if anything is against them")
    what.add_argument(
        "--verify", action="store_true", help="check all checksums, set aside what is corrupt; exit with 1 if any is"
    )
    what.add_argument(
        "--prune",
        choices=("broken", "stale"),
        nargs="?",
        const="broken",
        help="remove what cannot be used (broken, the default), or also what other versions made (stale)",
    )
    graphs.add_argument("--json", action="store_true", help="a list of objects instead of a table")


def _add_doctor(subparsers: Subparsers) -> None:
    doctor = subparsers.add_parser(
        "doctor",
        help="say whether graphs compile and run here, and print everything a bug report needs",
        description="Print versions, hardware and store, with --checkpoint also which of its graphs are ready; "
        "problems with their remedy; and a verdict. Exits with 1 if there are problems.",
    )
    doctor.set_defaults(run=commands.run_doctor)
    doctor.add_argument(
        "--canary",
        action="store_true",
        help="try it: compile a graph of two small layers, and run it where there is a device",
    )
    add_model(doctor)
    add_plan(doctor)
    add_precision(doctor)
    add_target(doctor)
