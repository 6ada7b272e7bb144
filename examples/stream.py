"""Write speech to a file while it is being made: ``python stream.py me.wav "Hello there." --out hello.wav``."""

import argparse
import time
import wave
from typing import Any

from TTS.api import TTS

import neuron_xtts

SAMPLE_RATE = 24000  # of XTTS's audio


def load(checkpoint: str | None) -> Any:
    """Load XTTS v2 from a folder with config.json, vocab.json and model.pth; without one, coqui-tts downloads it."""
    if checkpoint is None:
        return TTS("tts_models/multilingual/multi-dataset/xtts_v2")
    return TTS(model_path=checkpoint, config_path=f"{checkpoint}/config.json")


def main() -> None:
    """Patch, and write every chunk as it comes: whoever opens the file meanwhile hears the speech so far."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("voice", metavar="VOICE.wav", help="a recording of the voice, some seconds long")
    parser.add_argument("text", help="what to say")
    parser.add_argument("--checkpoint", metavar="DIR", help="folder of XTTS v2 (default: coqui-tts downloads it)")
    parser.add_argument("--language", default="en", help="of the text (default: en)")
    parser.add_argument("--out", default="speech.wav", metavar="FILE", help="(default: speech.wav)")
    args = parser.parse_args()

    xtts = neuron_xtts.patch(load(args.checkpoint)).synthesizer.tts_model
    voice = xtts.get_conditioning_latents(args.voice)  # a voice is computed once, and known from then on
    start = time.perf_counter()
    with wave.open(args.out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        for chunk in xtts.inference_stream(args.text, args.language, *voice):
            file.writeframes((chunk.clamp(-1, 1) * 32767).short().numpy().tobytes())  # corrects the header, too
            seconds, audio = time.perf_counter() - start, file.getnframes() / SAMPLE_RATE
            print(f"after {seconds:.2f} s: {audio:.2f} s of audio", flush=True)


if __name__ == "__main__":
    main()
