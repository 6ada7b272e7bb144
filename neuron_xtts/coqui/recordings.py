"""WAV files: what was spoken, and a reference recording to clone."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neuron_xtts.coqui.constants import CODE_RATE
from neuron_xtts.errors import describe

_SHORTEST = 0.33  # seconds; coqui-tts has no conditioning latents of less


def check_recording(path: Path) -> None:
    """Raise unless coqui-tts can read a recording.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no audio, none that this machine can decode, or too short for a voice.
    """
    from TTS.tts.models.xtts import load_audio

    if not path.is_file():
        raise FileNotFoundError(f"there is no recording {path}")
    try:
        samples = load_audio(str(path), CODE_RATE)
    except Exception as error:  # what decoders raise is not documented
        raise ValueError(f"{path} cannot be read as a recording: {describe(error)}") from error
    if samples.shape[-1] < _SHORTEST * CODE_RATE:
        seconds = samples.shape[-1] / CODE_RATE
        raise ValueError(f"{path} is {seconds:.2f} s long; expected at least {_SHORTEST} s, and better six or more")


def write_reference(path: Path, seconds: float = 6.0) -> None:
    """Write a reference recording: a gliding, vibrating tone with harmonics, 16-bit mono at 22.05 kHz."""
    t = torch.arange(int(seconds * CODE_RATE)) / CODE_RATE  # seconds, of each sample
    pitch = 140 + 30 * torch.sin(2 * math.pi * 0.7 * t) + 4 * torch.sin(2 * math.pi * 5.5 * t)
    phase = torch.cumsum(2 * math.pi * pitch / CODE_RATE, 0)
    harmonics = sum((torch.sin(phase * n) / n for n in range(1, 12)), torch.zeros(()))
    voice = harmonics * (0.6 + 0.4 * torch.sin(2 * math.pi * 2.3 * t))
    write_wav(path, 0.3 * voice / voice.abs().max(), CODE_RATE)


def write_wav(path: Path, samples: Tensor, rate: int) -> None:
    """Write a 16-bit mono WAV file.

    Args:
        path: the file.
        samples: (N,) samples of audio; what is beyond [-1, 1] is clipped.
        rate: samples per second.
    """
    data = (samples.clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(data)


def read_wav(path: Path) -> Tensor:
    """The samples (N,) of a 16-bit mono WAV file, as int16."""
    with wave.open(str(path)) as file:
        return torch.from_numpy(np.frombuffer(file.readframes(file.getnframes()), np.int16).copy())
