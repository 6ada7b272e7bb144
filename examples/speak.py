"""Speak a text with a cloned voice: ``python speak.py me.wav "Hello there." --out hello.wav``."""

import argparse
from typing import Any

from TTS.api import TTS

import neuron_xtts


def load(checkpoint: str | None) -> Any:
    """Load XTTS v2 from a folder with config.json, vocab.json and model.pth; without one, coqui-tts downloads it."""
    if checkpoint is None:
        return TTS("tts_models/multilingual/multi-dataset/xtts_v2")
    tts = TTS(model_path=checkpoint, config_path=f"{checkpoint}/config.json")
    tts.synthesizer.output_sample_rate = 24000  # files of such a model get 22050 from coqui-tts before 0.28
    return tts


def main() -> None:
    """Patch, speak, and show what ran in a graph."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("voice", metavar="VOICE.wav", help="a recording of the voice, some seconds long")
    parser.add_argument("text", help="what to say")
    parser.add_argument("--checkpoint", metavar="DIR", help="folder of XTTS v2 (default: coqui-tts downloads it)")
    parser.add_argument("--language", default="en", help="of the text (default: en)")
    parser.add_argument("--precision", default="fp32", help="fp32: the same audio; int8: faster (default: fp32)")
    parser.add_argument("--out", default="speech.wav", metavar="FILE", help="(default: speech.wav)")
    args = parser.parse_args()

    tts = load(args.checkpoint)
    neuron_xtts.patch(tts, precision=args.precision)  # the same object, now routed to graphs
    tts.tts_to_file(args.text, speaker_wav=args.voice, language=args.language, file_path=args.out)
    print(neuron_xtts.report(tts))


if __name__ == "__main__":
    main()
