"""The command ``neuron-xtts``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from neuron_xtts.errors import NeuronXttsError
from neuron_xtts.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        status: int = arguments.run(arguments)
        return status
    except (NeuronXttsError, OSError) as error:
        print(f"neuron-xtts: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neuron-xtts", description="coqui-tts's XTTS v2 on AWS Neuron and on the host"
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--checkpoint", type=Path, metavar="DIR", help="a real XTTS v2 checkpoint")
    model.add_argument("--small", action="store_true", help="a small model, for a quick look")

    demo = commands.add_parser(
        "demo",
        parents=[model],
        help="speak one sentence with plain coqui-tts and patched, and compare",
        description="Speak one sentence with plain coqui-tts and patched, with the same seed; compare time and audio. "
        "Without --checkpoint the weights are random: the time is real, the audio is noise.",
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--speaker-wav", type=Path, metavar="FILE", help="the voice to clone (default: a tone it makes)")
    demo.add_argument("--text", help="the sentence")
    demo.add_argument("--language", default="en", help="of the sentence (default: %(default)s)")
    demo.add_argument("--codes", type=_positive, default=100, help="with random weights (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="(default: %(default)s)")

    graphs = commands.add_parser(
        "graphs",
        parents=[model],
        help="show what the XLA frontend makes of the graphs",
        description="Lower every graph of the static bucket plan with the installed XLA frontend (torch-xla, or "
        "torch-neuronx's) and show its size and whatever stands against compiling it. Exits with 1 if anything does.",
    )
    graphs.set_defaults(run=_graphs)
    graphs.add_argument("--lower", action="store_true", required=True, help="lower the graphs")
    graphs.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    return parser


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _demo(arguments: argparse.Namespace) -> int:
    import transformers

    from neuron_xtts import demo

    transformers.logging.set_verbosity_error()  # a line for every max_new_tokens would break the progress bars
    print(
        demo.run(
            arguments.out,
            small=arguments.small,
            checkpoint=arguments.checkpoint,
            speaker_wav=arguments.speaker_wav,
            text=arguments.text or demo.SENTENCES[0],
            language=arguments.language,
            codes=arguments.codes,
            seed=arguments.seed,
        )
    )
    return 0


def _graphs(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from neuron_xtts import demo
    from neuron_xtts.buckets import BucketPlan
    from neuron_xtts.engine import make_graphs
    from neuron_xtts.lowering import lower_all
    from neuron_xtts.report import table

    xtts = demo.load_or_make(arguments.checkpoint, arguments.small).synthesizer.tts_model
    graphs, missing = make_graphs(xtts.gpt, xtts.hifigan_decoder)
    lowered = list(tqdm(lower_all(graphs, BucketPlan.static()), desc="lowering", unit="graph"))
    if arguments.json:
        print(json.dumps([asdict(lowering) for lowering in lowered], indent=2))
    else:
        rows = [
            (
                lowering.graph,
                lowering.bucket,
                str(sum(lowering.operators.values())),
                f"{lowering.flops / 1e9:.2f}",
                f"{lowering.bytes / 1e6:.1f}",
                "; ".join([*lowering.unlowered, *lowering.disconnected, *lowering.rejected]) or "none",
            )
            for lowering in lowered
        ]
        print(table(("graph", "bucket", "operators", "GFLOP", "MB", "unlowered, disconnected or rejected"), rows))
    for graph, reason in missing.items():
        print(f"no {graph} graph: {reason}", file=sys.stderr)
    return 0 if lowered and not missing and all(lowering.clean for lowering in lowered) else 1


if __name__ == "__main__":
    sys.exit(main())
