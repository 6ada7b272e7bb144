"""XTTS v2 models of coqui-tts's own classes: with random weights, or from a checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from neuron_xtts.coqui.constants import CODES, START_CODE, STOP_CODE
from neuron_xtts.coqui.find import check_versions, find_xtts
from neuron_xtts.errors import describe

# Facts of the XTTS v2 checkpoint that coqui-tts's XttsArgs does not default to.
XTTS_V2 = {
    "gpt_use_perceiver_resampler": True,
    "gpt_num_audio_tokens": CODES,
    "gpt_start_audio_token": START_CODE,
    "gpt_stop_audio_token": STOP_CODE,
    "gpt_max_audio_tokens": 605,
}
#: By which coqui-tts downloads XTTS v2.
DOWNLOADED = "tts_models/multilingual/multi-dataset/xtts_v2"
# Choices of ours for a quick look and for tests. The vocoder's width is no argument of XttsArgs.
SMALL = {"gpt_layers": 2, "gpt_n_model_channels": 64, "gpt_n_heads": 2, "decoder_input_dim": 64}
SMALL_VOCODER_CHANNELS = 64

#: Sentences that `write_vocabulary` learns from, and that demo and benchmarks say.
SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the band plays an old song.",
    "Every sentence that is spoken here was written by a machine that never sleeps.",
    "Patch the model once, and the same voice will say the same words a little sooner.",
)
LANGUAGES = (
    "en", "es", "fr", "de", "it", "pt", "pl", "tr", "ru", "nl", "cs", "ar", "zh-cn", "hu", "ko", "ja", "hi",
)  # fmt: skip


def load_or_make(checkpoint: Path | None, small: bool) -> Any:
    """A model with the weights in ``checkpoint``, or with random ones.

    Args:
        checkpoint: the folder of a real XTTS v2 checkpoint; None for random weights.
        small: a small model instead of one of full size, if the weights are random.

    Returns:
        a ``TTS.api.TTS``.

    Raises:
        FileNotFoundError: ``checkpoint`` lacks a file of those that coqui-tts downloads.
        ValueError: coqui-tts cannot load it.
    """
    if checkpoint is not None:
        check_checkpoint(checkpoint)
        return load_tts(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        return random_tts(Path(folder), small=small, progress=True)


def check_checkpoint(folder: Path) -> None:
    """Raise FileNotFoundError if a folder lacks a file of those that coqui-tts downloads."""
    missing = [name for name in ("config.json", "vocab.json", "model.pth") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {', '.join(missing)}; expected the folder of an XTTS v2 checkpoint, as coqui-tts "
            "downloads it"
        )


def load_or_download(checkpoint: Path | None) -> Any:
    """The model in a folder, or XTTS v2 as coqui-tts downloads it, which asks for its licence.

    Args:
        checkpoint: the folder; None to download, unless that was done before.

    Returns:
        a ``TTS.api.TTS``.

    Raises:
        FileNotFoundError, ValueError: as `load_or_make` does, or it cannot be had.
    """
    if checkpoint is not None:
        return load_or_make(checkpoint, small=False)
    check_versions()
    from TTS.api import TTS

    try:
        return TTS(DOWNLOADED, progress_bar=False)
    except Exception as error:  # of networks, disks and licences that were not agreed to
        raise ValueError(
            f"{DOWNLOADED} cannot be had ({describe(error)}); expected a network and an answer to its licence "
            "(COQUI_TOS_AGREED=1 where nobody can be asked), or --checkpoint DIR"
        ) from error


def find_miniature() -> Path | None:
    """The folder of a trained miniature beside the package, ``miniature`` in its repository; None if there is none."""
    folder = Path(__file__).parents[2] / "miniature"
    return folder if (folder / "model.pth").is_file() else None


def load_tts(folder: Path) -> Any:
    """Load the XTTS checkpoint in ``folder`` (config.json, vocab.json, model.pth) as a ``TTS.api.TTS``.

    Raises:
        ValueError: it is none.
        UnsupportedVersionError: packages are of other versions, with which it may not even be imported.
    """
    check_versions()
    from TTS.api import TTS

    try:
        tts = TTS(model_path=str(folder), config_path=str(folder / "config.json"), progress_bar=False)
        find_xtts(tts)
    except Exception as error:  # coqui-tts raises whatever the reader of a file does
        raise ValueError(f"{folder} cannot be loaded as an XTTS v2 checkpoint: {describe(error)}") from error
    return tts


def random_tts(folder: Path, *, small: bool = False, seed: int = 0, progress: bool = False, **args: object) -> Any:
    """Make an XTTS v2 of coqui-tts's own classes with random weights and load it as users load theirs.

    Args:
        folder: where its checkpoint is written: config.json, vocab.json and model.pth.
        small: two layers of 64 channels and a narrow vocoder instead of the full size (1.9 GB).
        seed: the seed of the weights; torch's random state stays as it is.
        progress: show a bar.
        args: arguments of coqui-tts's ``XttsArgs``, to override what this makes of them.

    Returns:
        a ``TTS.api.TTS``.
    """
    from TTS.tts.configs.xtts_config import XttsConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = XttsConfig()
    for name, value in (XTTS_V2 | (SMALL if small else {}) | args).items():
        setattr(config.model_args, name, value)
    write_vocabulary(folder / "vocab.json")
    with tqdm(total=3, desc="making a model with random weights", disable=not progress) as bar:
        model, narrow = _random_models(config, folder / "vocab.json", seed)
        bar.update()
        config.save_json(str(folder / "config.json"))
        torch.save({"model": model.state_dict()}, folder / "model.pth")
        del model  # before it is loaded: there is memory for one of full size
        bar.update()
        tts = load_tts(folder)
        if small:
            tts.synthesizer.tts_model.hifigan_decoder = narrow.eval()
        bar.update()
    return tts


def _random_models(config: Any, vocabulary: Path, seed: int) -> tuple[Any, Any]:
    """An ``Xtts``, and a narrow vocoder, whose width a checkpoint has no argument for."""
    from TTS.tts.layers.xtts.hifigan_decoder import HifiDecoder
    from TTS.tts.layers.xtts.tokenizer import VoiceBpeTokenizer
    from TTS.tts.models.xtts import Xtts

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Xtts(config)
        model.tokenizer = VoiceBpeTokenizer(vocab_file=str(vocabulary))
        model.init_models()
        narrow = HifiDecoder(
            decoder_input_dim=config.model_args.decoder_input_dim,
            upsample_initial_channel_decoder=SMALL_VOCODER_CHANNELS,
        )
        for block in model.gpt.conditioning_encoder.attn:
            nn.init.normal_(block.proj_out.weight, std=0.02)  # coqui-tts starts with zeros: no attention at all
    return model, narrow


def write_vocabulary(path: Path) -> None:
    """Write a small BPE vocabulary in the format of XTTS: its special tokens, letters and some merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=256,
        special_tokens=["[STOP]", "[UNK]", "[SPACE]", *(f"[{language}]" for language in LANGUAGES), "[START]"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz'.,!?-"),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence.lower() for sentence in SENTENCES], trainer)
    tokenizer.save(str(path))
