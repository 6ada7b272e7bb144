"""Compile XTTS v2 for Neuron, once: ``python compile_for_neuron.py --target inf2``.

It needs Neuron's packages, from AWS's index (``pip install --extra-index-url https://pip.repos.neuron.amazonaws.com
torch-neuronx neuronx-cc``), memory and minutes for each graph, but no Neuron device. On an instance with one,
``neuron_xtts.patch(tts)`` then loads the graphs in every process.
"""

import argparse
import dataclasses
import sys
from typing import Any

from TTS.api import TTS

import neuron_xtts
from neuron_xtts import BucketPlan

GRAPHS = ("prefill", "decode", "latents", "vocoder", "conditioning")


def load(checkpoint: str | None) -> Any:
    """Load XTTS v2 from a folder with config.json, vocab.json and model.pth; without one, coqui-tts downloads it."""
    if checkpoint is None:
        return TTS("tts_models/multilingual/multi-dataset/xtts_v2")
    return TTS(model_path=checkpoint, config_path=f"{checkpoint}/config.json")


def main() -> None:
    """Compile what the store does not hold yet, and say what became of each graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", metavar="DIR", help="folder of XTTS v2 (default: coqui-tts downloads it)")
    parser.add_argument("--target", help="inf2, trn1, trn1n or trn2 (default: what this machine is)")
    parser.add_argument("--store", metavar="DIR", help="for the compiled graphs (default: the user's cache folder)")
    parser.add_argument("--only", choices=GRAPHS, help="compile this graph alone, to try the compiler first")
    args = parser.parse_args()
    plan = BucketPlan.static()
    if args.only:
        plan = dataclasses.replace(BucketPlan.none(), slots=plan.slots, **{args.only: getattr(plan, args.only)})
    try:
        tts = load(args.checkpoint)
        summary = neuron_xtts.compile(tts, backend="neuron", target=args.target, store=args.store, buckets=plan)
    except neuron_xtts.NeuronMissingError as error:
        sys.exit(str(error))
    print(summary)
    sys.exit(not summary.ok)


if __name__ == "__main__":
    main()
