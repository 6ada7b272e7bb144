"""The demo: an XTTS v2, with random weights or real ones, speaks through plain and through patched coqui-tts."""

from __future__ import annotations

import math
import wave
from pathlib import Path
from typing import Any

import torch

# Facts of the XTTS v2 checkpoint that coqui-tts's XttsArgs does not default to.
XTTS_V2 = {
    "gpt_use_perceiver_resampler": True,
    "gpt_num_audio_tokens": 1026,
    "gpt_start_audio_token": 1024,
    "gpt_stop_audio_token": 1025,
    "gpt_max_audio_tokens": 605,
}
# Choices of ours for a quick look and for tests. The vocoder's width is no argument of XttsArgs.
SMALL = {"gpt_layers": 2, "gpt_n_model_channels": 64, "gpt_n_heads": 2, "decoder_input_dim": 64}
SMALL_VOCODER_CHANNELS = 64

SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the band plays an old song.",
    "Every sentence that is spoken here was written by a machine that never sleeps.",
    "Patch the model once, and the same voice will say the same words a little sooner.",
)


def random_tts(folder: Path, *, small: bool = False, seed: int = 0, **args: Any) -> Any:
    """Make an XTTS v2 of coqui-tts's own classes with random weights and load it as users load theirs.

    Args:
        folder: where its checkpoint is written: config.json, vocab.json and model.pth.
        small: two layers of 64 channels and a narrow vocoder instead of the full size (1.9 GB).
        seed: of the weights.
        args: of coqui-tts's ``XttsArgs``, to override what this makes of them.

    Returns:
        a ``TTS.api.TTS``.
    """
    from TTS.tts.configs.xtts_config import XttsConfig
    from TTS.tts.layers.xtts.hifigan_decoder import HifiDecoder
    from TTS.tts.layers.xtts.tokenizer import VoiceBpeTokenizer
    from TTS.tts.models.xtts import Xtts

    folder.mkdir(parents=True, exist_ok=True)
    config = XttsConfig()
    for name, value in (XTTS_V2 | (SMALL if small else {}) | args).items():
        setattr(config.model_args, name, value)
    write_vocabulary(folder / "vocab.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Xtts(config)
        model.tokenizer = VoiceBpeTokenizer(vocab_file=str(folder / "vocab.json"))
        model.init_models()
        narrow = HifiDecoder(
            decoder_input_dim=config.model_args.decoder_input_dim,
            upsample_initial_channel_decoder=SMALL_VOCODER_CHANNELS,
        )
    config.save_json(str(folder / "config.json"))
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    del model
    tts = load_tts(folder)
    if small:
        tts.synthesizer.tts_model.hifigan_decoder = narrow.eval()
    return tts


def load_tts(folder: Path) -> Any:
    """Load the XTTS checkpoint in ``folder`` (config.json, vocab.json, model.pth) as a ``TTS.api.TTS``."""
    from TTS.api import TTS

    return TTS(model_path=str(folder), config_path=str(folder / "config.json"), progress_bar=False)


def write_vocabulary(path: Path) -> None:
    """Write a small BPE vocabulary in the format of XTTS: its special tokens, letters and some merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    languages = (
        "en",
        "es",
        "fr",
        "de",
        "it",
        "pt",
        "pl",
        "tr",
        "ru",
        "nl",
        "cs",
        "ar",
        "zh-cn",
        "hu",
        "ko",
        "ja",
        "hi",
    )
    trainer = trainers.BpeTrainer(
        vocab_size=256,
        special_tokens=["[STOP]", "[UNK]", "[SPACE]", *(f"[{language}]" for language in languages), "[START]"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz'.,!?-"),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence.lower() for sentence in SENTENCES], trainer)
    tokenizer.save(str(path))


def write_reference(path: Path, seconds: float = 6.0) -> None:
    """Write a reference recording: a gliding, vibrating tone with harmonics, 16-bit mono at 22.05 kHz."""
    rate = 22050
    time = torch.arange(int(seconds * rate)) / rate
    pitch = 140 + 30 * torch.sin(2 * math.pi * 0.7 * time) + 4 * torch.sin(2 * math.pi * 5.5 * time)
    phase = torch.cumsum(2 * math.pi * pitch / rate, 0)
    voice = sum(torch.sin(phase * n) / n for n in range(1, 12)) * (0.6 + 0.4 * torch.sin(2 * math.pi * 2.3 * time))
    write_wav(path, 0.3 * voice / voice.abs().max(), rate)


def write_wav(path: Path, samples: Any, rate: int) -> None:
    """Write mono ``samples`` in [-1, 1] as a 16-bit WAV file."""
    data = (torch.as_tensor(samples).clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(data)
