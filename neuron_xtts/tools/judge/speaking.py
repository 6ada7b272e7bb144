"""Sentences to WAV files: by coqui-tts, patched or not, with the codes they are made of, and by espeak-ng."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from xml.sax.saxutils import escape

import numpy as np
import torch
from torch import Tensor

from neuron_xtts.backends.neuron.verification import correlation
from neuron_xtts.coqui.constants import OUTPUT_RATE
from neuron_xtts.coqui.recordings import read_wav, write_wav
from neuron_xtts.coqui.voices import settings_of, voice_of
from neuron_xtts.patching.proxy import Installation
from neuron_xtts.tools.bench import Voice

LANGUAGE = "en"  # what the recognizers know

_Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Spoken:
    """A sentence that was spoken.

    Attributes:
        audio: the WAV file, 16 bits at 24 kHz.
        codes: audio codes (T,).
        stopped: whether it ended by itself: the last code is the stop token.
        call: arguments of the ``GPT.forward`` that made the latents.
        latents: file of the latents (1, L, D), if it was asked for.
    """

    audio: Path
    codes: Tensor
    stopped: bool
    call: _Call
    latents: Path | None


def check_lengths(xtts: Any, texts: Sequence[str]) -> None:
    """Raise ValueError if coqui-tts would refuse a sentence."""
    for text in texts:
        tokens, limit = len(xtts.tokenizer.encode(text.lower(), lang=LANGUAGE)), xtts.args.gpt_max_text_tokens
        if tokens >= limit:
            raise ValueError(f"{text!r} has {tokens} tokens, and XTTS takes less than {limit}: cut it into sentences")


def make_voice(xtts: Any, recording: Path) -> Voice:
    """The voice of a recording, as ``tts.tts(..., speaker_wav=...)`` makes it."""
    return voice_of(xtts, speaker_wav=str(recording))


def speak(
    xtts: Any, text: str, voice: Voice, seed: tuple[int, int], audio: Path, latents: Path | None = None
) -> Spoken:
    """Speak a sentence as ``tts.tts`` does, by itself and without the silence that ``tts.tts`` appends.

    Args:
        xtts: the model, patched or not.
        text: the sentence, in English.
        voice: conditioning latents and speaker embedding.
        seed: a seed and the number of the sentence; torch is seeded with what numpy makes of both.
        audio: the WAV file to write.
        latents: the file to write the latents to.
    """
    noted: dict[str, Any] = {}

    def generate(wrapped: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        noted["codes"] = wrapped(*args, **kwargs)
        return noted["codes"]  # type: ignore[no-any-return]

    def forward(wrapped: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        noted["call"] = args, dict(kwargs)
        noted["latents"] = wrapped(*args, **kwargs)
        return noted["latents"]  # type: ignore[no-any-return]

    installations = [
        Installation(xtts.gpt, "generate").install(generate),
        Installation(xtts.gpt, "forward").install(forward),
    ]
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    try:
        spoken = xtts.inference(text, LANGUAGE, *voice, **settings_of(xtts))
    finally:
        for installation in reversed(installations):
            installation.remove()
    write_wav(audio, torch.as_tensor(spoken["wav"]), OUTPUT_RATE)
    if latents is not None:
        torch.save(noted["latents"].clone(), latents)
    codes = noted["codes"][0]
    return Spoken(audio, codes, int(codes[-1]) == xtts.gpt.stop_audio_token, noted["call"], latents)


@dataclass(frozen=True)
class Forced:
    """What a patched model makes of the codes that coqui-tts spoke.

    Attributes:
        correlation: Pearson correlation of its latents with coqui-tts's.
        agreeing: codes for which the most probable next code is the same.
        codes: how many there are.
    """

    correlation: float
    agreeing: int
    codes: int


@torch.inference_mode()
def force(xtts: Any, plain: Spoken) -> Forced:
    """Compare ``GPT.forward`` of a patched model with coqui-tts's, on the same codes.

    Args:
        xtts: the patched model.
        plain: what the model spoke unpatched, with its latents in a file.
    """
    assert plain.latents is not None
    args, kwargs = plain.call
    ours, theirs = xtts.gpt(*args, **kwargs), torch.load(plain.latents)
    choices = [xtts.gpt.mel_head(latents).argmax(-1) for latents in (ours, theirs)]
    return Forced(correlation(ours, theirs), int((choices[0] == choices[1]).sum()), choices[0].numel())


def sounds_the_same(ours: Path, theirs: Path) -> bool:
    """Whether two WAV files differ by no more than rounding to 16 bits, in any sample."""
    a, b = (read_wav(path).int() for path in (ours, theirs))
    return a.shape == b.shape and not bool(((a - b).abs() > 1).any())


def has_espeak() -> bool:
    """Whether espeak-ng is installed."""
    return shutil.which("espeak-ng") is not None


def espeak(text: str, voice: str, words_per_minute: int, audio: Path, pitch_range: int = 100) -> None:
    """Let espeak-ng speak a sentence into a WAV file.

    Args:
        text: the sentence.
        voice: a voice of espeak-ng.
        words_per_minute: how fast.
        audio: the file.
        pitch_range: how far the pitch moves, in percent of what the voice has.

    Raises:
        ValueError: it cannot.
    """
    # The range of the pitch is no option of the command, but one of the markup that it reads.
    marked = f'<speak><prosody range="{pitch_range}%">{escape(text)}</prosody></speak>'
    command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-m", "-b", "1", "--stdin", "-w", str(audio)]
    done = subprocess.run(command, input=marked, text=True, capture_output=True, encoding="utf-8")
    if done.returncode or not audio.is_file():
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise ValueError(
            f"espeak-ng cannot speak in the voice {voice!r} (`espeak-ng --voices=en` lists voices): {said}"
        )
