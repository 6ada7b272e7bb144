"""Say every line of a file, many at once: ``python many.py me.wav lines.txt --out spoken``."""

import argparse
import wave
from pathlib import Path
from typing import Any

import numpy as np
from TTS.api import TTS

import neuron_xtts

SAMPLE_RATE = 24000  # of XTTS's audio


def load(checkpoint: str | None) -> Any:
    """Load XTTS v2 from a folder with config.json, vocab.json and model.pth; without one, coqui-tts downloads it."""
    if checkpoint is None:
        return TTS("tts_models/multilingual/multi-dataset/xtts_v2")
    return TTS(model_path=checkpoint, config_path=f"{checkpoint}/config.json")


def main() -> None:
    """Patch, and write a file for each line, in their order, while others are being said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("voice", metavar="VOICE.wav", help="a recording of the voice, some seconds long")
    parser.add_argument("lines", type=Path, metavar="LINES.txt", help="what to say, a text a line")
    parser.add_argument("--checkpoint", metavar="DIR", help="folder of XTTS v2 (default: coqui-tts downloads it)")
    parser.add_argument("--language", default="en", help="of the texts (default: en)")
    parser.add_argument("--precision", default="fp32", help="fp32: the same audio; int8: faster (default: fp32)")
    parser.add_argument("--seed", type=int, default=1, help="of the first line; of each further one it is one more")
    parser.add_argument("--out", type=Path, default=Path("spoken"), metavar="DIR", help="(default: spoken)")
    args = parser.parse_args()

    texts = [line for line in args.lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    tts = neuron_xtts.patch(load(args.checkpoint), precision=args.precision)
    args.out.mkdir(parents=True, exist_ok=True)
    said = neuron_xtts.speak_many(tts, texts, speaker_wav=args.voice, language=args.language, seed=args.seed)
    for number, samples in enumerate(said, start=1):
        with wave.open(str(args.out / f"{number:04}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes((np.clip(samples, -1, 1) * 32767).astype(np.int16).tobytes())


if __name__ == "__main__":
    main()
