"""Sentences of the miniature's world, spoken by espeak-ng in its voices.

    python experiments/miniature/data.py WORK [--sentences 20000] [--processes 2]

Writes WORK/texts.json (a list of [text, voice]), WORK/audio.npy (int16 at 22.05 kHz, one after another) and
WORK/lengths.npy (samples of each); removes WORK/mels.npy and WORK/codes.npy, which would be of other sentences.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from multiprocessing import Pool
from pathlib import Path
from random import Random
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from arguments import whole
from model import STRIDE
from tqdm import tqdm
from world import sentence

RATE = 22050
#: espeak-ng's voices by the name that they have here: far apart for a speaker encoder, clear for a recognizer.
VOICES = {"klatt": "en-us+klatt", "f5": "en-us+f5"}
WORDS_PER_MINUTE, PITCH_RANGE = 150, 20  # the latter in percent of what the voice has
SHORTEST, LONGEST = 0.3, 6.0  # seconds
_espeak: Espeak  # of a process of a pool
_RAMP = np.linspace(0, 1, 66, dtype=np.float32)  # 3 ms, so that no cut clicks
HELD_OUT = 240  # of the last sentences, to follow the training
LEAST = 800  # sentences, of which more than the held-out ones give both voices their reference recordings


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_uint64),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
# Constants of speak_lib.h: events and the callback's audio come before espeak_Synth returns; events of words; a
# parameter; how a text is encoded.
_SYNCHRONOUS, _END_OF_EVENTS, _WORD, _SPEED, _UTF8, _MARKUP = 2, 0, 1, 1, 0x01, 0x10


class Espeak:
    """espeak-ng's library: the command does not say where words begin, and takes ten times as long."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libespeak-ng.so.1")
        rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, None, 0)
        if rate != RATE:
            raise RuntimeError(f"espeak-ng speaks at {rate} Hz; expected {RATE}")
        self._audio: list[np.ndarray] = []
        self._words: list[int] = []
        self._callback = _CALLBACK(self._receive)  # it must live as long as the library may call it
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count:
            self._audio.append(np.ctypeslib.as_array(samples, (count,)).copy())
        number = 0
        while events[number].type != _END_OF_EVENTS:
            if events[number].type == _WORD:
                self._words.append(events[number].sample)
            number += 1
        return 0

    def say(self, text: str, voice: str) -> tuple[np.ndarray, list[int]]:
        """Speak a sentence.

        Args:
            text: the sentence.
            voice: a name in `VOICES`.

        Returns:
            int16 samples (N,) at 22.05 kHz, and at which of them its words begin.
        """
        self._audio.clear()
        self._words.clear()
        if self._library.espeak_SetVoiceByName(VOICES[voice].encode()):
            raise RuntimeError(f"espeak-ng has no voice {VOICES[voice]}")
        self._library.espeak_SetParameter(_SPEED, WORDS_PER_MINUTE, 0)
        # A narrower range of pitch has less to learn: a voiced sound has other codes at another pitch.
        marked = f'<speak><prosody range="{PITCH_RANGE}%">{escape(text)}</prosody></speak>'.encode() + b"\0"
        size = ctypes.c_size_t(len(marked))
        self._library.espeak_Synth(marked, size, 0, 1, 0, _UTF8 | _MARKUP, None, None)
        return np.concatenate(self._audio), list(self._words)


def on_grid(samples: np.ndarray, words: list[int]) -> np.ndarray:
    """Speech without the silence around it, in which every word begins with a code.

    After each word comes as much silence as makes it a whole number of codes, 23 ms on average. The same word then has
    nearly the same codes wherever it stands, and has not to be learned at every offset from the grid of codes.
    """
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > 250)
    pad = int(0.03 * RATE)
    starts = [max(0, loud[0] - pad), *words[1:]]
    parts = []
    for start, end in zip(starts, [*words[1:], loud[-1] + pad], strict=True):
        word = samples[start:end].astype(np.float32)
        silence = -len(word) % STRIDE
        if silence and len(word) > 2 * len(_RAMP):
            word[: len(_RAMP)] *= _RAMP
            word[-len(_RAMP) :] *= _RAMP[::-1]
        parts.append(np.pad(word, (0, silence)))
    return np.concatenate(parts).astype(np.int16)


def speak(item: tuple[str, str]) -> np.ndarray:
    """A text and its voice as speech on the grid, in a process of a pool that `begin` began."""
    return on_grid(*_espeak.say(*item))


def begin() -> None:
    """Begin a process of a pool: a library that speaks for each."""
    global _espeak
    _espeak = Espeak()


def make(work: Path, sentences: int, processes: int, seed: int = 7) -> None:
    """Make the data set."""
    work.mkdir(parents=True, exist_ok=True)
    random = Random(seed)
    texts: dict[str, str] = {}
    while len(texts) < sentences:
        texts.setdefault(sentence(random), random.choice(list(VOICES)))
    with Pool(processes, begin) as pool:
        spoken = list(tqdm(pool.imap(speak, texts.items(), 50), "speaking", len(texts), mininterval=10))
    kept = [
        (item, audio)
        for item, audio in zip(texts.items(), spoken, strict=True)
        if SHORTEST * RATE < len(audio) < LONGEST * RATE
    ]
    lengths = np.array([len(audio) for _, audio in kept])
    for name in ("mels.npy", "codes.npy"):
        (work / name).unlink(missing_ok=True)
    np.save(work / "audio.npy", np.concatenate([audio for _, audio in kept]))
    np.save(work / "lengths.npy", lengths)
    (work / "texts.json").write_text(json.dumps([item for item, _ in kept]))
    print(f"{len(kept)} sentences, {lengths.sum() / RATE / 3600:.1f} h, mean {lengths.mean() / RATE:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sentences", type=whole(LEAST), default=20000)
    parser.add_argument("--processes", type=whole(1), default=2)
    make(**vars(parser.parse_args()))
