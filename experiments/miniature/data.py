"""Sentences of the miniature's world, spoken by espeak-ng in its voices: texts, audio and code book's spectrograms.

    python experiments/miniature/data.py WORK [--sentences 24000]

Writes WORK/texts.json (a list of [text, voice]), WORK/audio.npy (int16 at 22.05 kHz, one after another) and
WORK/lengths.npy (samples of each).
"""

from __future__ import annotations

import argparse
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
from tqdm import tqdm
from world import sentence

RATE = 22050
#: espeak-ng's voices by the name that they have here: far apart for a speaker encoder, clear for a recognizer.
VOICES = {"klatt": "en-us+klatt", "f5": "en-us+f5"}
SHORTEST, LONGEST = 0.3, 6.0  # seconds
HELD_OUT = 240  # of the last sentences, to follow the training


def espeak(text: str, voice: str) -> np.ndarray:
    """What espeak-ng says, without the silence around it: int16 samples at 22.05 kHz.

    Args:
        text: a sentence.
        voice: a name in `VOICES`.
    """
    # A narrower pitch range has less to learn.
    ssml = f'<speak><prosody range="60%">{text}</prosody></speak>'
    command = ["espeak-ng", "-v", VOICES[voice], "-s", "150", "-m", "--stdout", ssml]
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    samples = np.frombuffer(wav[44:], np.int16)  # a RIFF header whose length espeak-ng does not know
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > 250)
    pad = int(0.03 * RATE)
    return samples[max(0, loud[0] - pad) : loud[-1] + pad] if len(loud) else samples[:0]


def make(work: Path, sentences: int, seed: int = 7) -> None:
    """Make the data set."""
    work.mkdir(parents=True, exist_ok=True)
    random = Random(seed)
    texts: dict[str, str] = {}
    while len(texts) < sentences:
        texts.setdefault(sentence(random), random.choice(list(VOICES)))
    with ThreadPoolExecutor(2) as pool:
        spoken = list(tqdm(pool.map(espeak, texts, texts.values(), chunksize=64), total=len(texts), mininterval=10))
    kept = [
        (item, audio)
        for item, audio in zip(texts.items(), spoken, strict=True)
        if SHORTEST * RATE < len(audio) < LONGEST * RATE
    ]
    lengths = np.array([len(audio) for _, audio in kept])
    np.save(work / "audio.npy", np.concatenate([audio for _, audio in kept]))
    np.save(work / "lengths.npy", lengths)
    (work / "texts.json").write_text(json.dumps([item for item, _ in kept]))
    print(f"{len(kept)} sentences, {lengths.sum() / RATE / 3600:.1f} h, mean {lengths.mean() / RATE:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sentences", type=int, default=20000)
    arguments = parser.parse_args()
    make(arguments.work, arguments.sentences)
