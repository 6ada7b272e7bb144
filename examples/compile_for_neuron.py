"""Compile XTTS v2 for Neuron, once: ``python compile_for_neuron.py --target inf2``.

Needs Neuron's packages as docs/neuron.md installs them, and minutes for each graph, but no device. Where there is one,
``neuron_xtts.patch(tts)`` then loads the graphs in every process.
"""

import argparse
import sys
from dataclasses import replace
from typing import Any

from TTS.api import TTS

import neuron_xtts
from neuron_xtts import BucketPlan


def load(checkpoint: str | None) -> Any:
    """Load XTTS v2 from a folder with config.json, vocab.json and model.pth; without one, coqui-tts downloads it."""
    if checkpoint is None:
        return TTS("tts_models/multilingual/multi-dataset/xtts_v2")
    return TTS(model_path=checkpoint, config_path=f"{checkpoint}/config.json")


def main() -> None:
    """Compile what the store does not hold yet, and say what became of each graph."""
    graphs = ("prefill", "decode", "latents", "vocoder", "conditioning")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="DIR", help="folder of XTTS v2 (default: coqui-tts downloads it)")
    parser.add_argument("--target", help="inf2, trn1, trn1n or trn2 (default: what this machine is)")
    parser.add_argument("--store", metavar="DIR", help="for the compiled graphs (default: the user's cache folder)")
    parser.add_argument("--only", choices=graphs, help="compile this graph alone, to try the compiler first")
    args = parser.parse_args()
    plan = BucketPlan.static()
    if args.only:
        others: dict[str, Any] = {graph: () for graph in graphs if graph not in (args.only, "decode")}
        # Prefill's cache is as large as decoding wants it, so its sizes stay, and without slots nothing decodes.
        plan = replace(plan, slots=plan.slots if args.only == "decode" else (), **others)
    try:
        tts = load(args.checkpoint)
        summary = neuron_xtts.compile(tts, backend="neuron", target=args.target, store=args.store, buckets=plan)
    except neuron_xtts.NeuronMissingError as error:
        sys.exit(str(error))
    print(summary)
    sys.exit(not summary.ok)


if __name__ == "__main__":
    main()
