"""What the miniature is made of: coqui-tts's classes, in small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Facts of XTTS v2 that coqui-tts's XttsArgs does not default to, and the miniature's sizes.
ARGS = {
    "gpt_use_perceiver_resampler": True,
    "gpt_num_audio_tokens": 1026,
    "gpt_start_audio_token": 1024,
    "gpt_stop_audio_token": 1025,
    "gpt_max_audio_tokens": 605,
    "gpt_layers": 6,
    "gpt_n_model_channels": 192,
    "gpt_n_heads": 4,
    "decoder_input_dim": 192,
}
STRIDE = 1024  # samples of a code at 22.05 kHz
FRAMES = 4  # of a spectrogram, in a code
# There are few sounds, and in the checkpoint several codes of each: coqui-tts's ``repetition_penalty`` keeps a sentence
# from having a code twice, and a sound comes back. What is trained knows sounds alone.
SOUNDS, COPIES = 128, 8
START, STOP = SOUNDS, SOUNDS + 1  # of what is trained
LANGUAGES = "en es fr de it pt pl tr ru nl cs ar zh-cn hu ko ja hi".split()
VOCODER_CHANNELS = 128  # of which every stage has half as many as the one before, the first 64
# Of the layer in front of the stages, which works at the rate of spectrograms, costs next to nothing, and has to make
# sounds of latents. It is what coqui-tts's default has; more could not be loaded.
VOCODER_HIDDEN = 512
TEXT_TOKENS = 1500
# Of the six blocks of attention that the conditioning encoder has, as many are trained; the others stay as coqui-tts
# makes them, which passes everything on.
CONDITIONING_BLOCKS = 2


def write_vocabulary(path: Path, texts: list[str]) -> None:
    """Write a BPE vocabulary in the format of XTTS, of which most words of ``texts`` are one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_TOKENS,
        special_tokens=["[STOP]", "[UNK]", "[SPACE]", *(f"[{language}]" for language in LANGUAGES), "[START]"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz'.,!?-"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def load_tokenizer(path: Path) -> Any:
    """coqui-tts's tokenizer with a vocabulary."""
    from TTS.tts.layers.xtts.tokenizer import VoiceBpeTokenizer

    return VoiceBpeTokenizer(vocab_file=str(path))


def make_gpt(tokenizer: Any, layers: int = ARGS["gpt_layers"]) -> Any:
    """coqui-tts's GPT with new weights, for sounds."""
    from TTS.tts.layers.xtts.gpt import GPT

    gpt = GPT(
        start_text_token=tokenizer.tokenizer.token_to_id("[START]"),
        stop_text_token=0,
        layers=layers,
        model_dim=ARGS["gpt_n_model_channels"],
        heads=ARGS["gpt_n_heads"],
        max_text_tokens=402,
        max_mel_tokens=ARGS["gpt_max_audio_tokens"],
        max_prompt_tokens=70,
        number_text_tokens=tokenizer.get_number_tokens(),
        num_audio_tokens=SOUNDS + 2,
        start_audio_token=START,
        stop_audio_token=STOP,
        use_perceiver_resampler=True,
        code_stride_len=STRIDE,
    )
    for number, block in enumerate(gpt.conditioning_encoder.attn):
        if number < CONDITIONING_BLOCKS:
            nn.init.normal_(block.proj_out.weight, std=0.02)  # coqui-tts starts with zeros: no attention at all
        else:
            block.requires_grad_(False)
    # The perceiver has no norm in front; a small gain at its end keeps it from exploding.
    nn.init.constant_(gpt.conditioning_perceiver.norm.gamma, 0.1)
    return gpt


def layers_of(saved: dict[str, Tensor]) -> int:
    """How many layers a saved GPT has."""
    return 1 + max(int(name.split(".")[2]) for name in saved if name.startswith("gpt.h."))


def make_dvae() -> Any:
    """coqui-tts's DiscreteVAE over spectrograms: one sound for `FRAMES` frames. It is no part of the checkpoint."""
    from TTS.tts.layers.xtts.dvae import DiscreteVAE

    return DiscreteVAE(
        channels=80, normalization=None, positional_dims=1, num_tokens=SOUNDS, codebook_dim=128, hidden_dim=96,
        num_resnet_blocks=1, kernel_size=3, num_layers=2, use_transposed_convs=False,
    )  # fmt: skip


def conditioning_mel(audio: Tensor, norms: Tensor) -> Tensor:
    """The spectrogram (1, 80, T) of a recording (N,) at 22.05 kHz, as ``Xtts.get_gpt_cond_latents`` makes it."""
    from TTS.tts.models.xtts import wav_to_mel_cloning

    mel: Tensor = wav_to_mel_cloning(
        audio[None], mel_norms=norms, n_fft=2048, hop_length=256, win_length=1024, power=2, normalized=False,
        sample_rate=22050, f_min=0, f_max=8000, n_mels=80,
    )  # fmt: skip
    return mel


def latents(
    gpt: Any, voices: Tensor, whose: Tensor, texts: Tensor, text_lengths: Tensor, codes: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """What coqui-tts's GPT makes of texts and codes, teacher-forced and padded.

    A voice comes first and sees nothing of what follows, so it is computed once for all that speak with it; it would be
    about a quarter of all positions.

    Args:
        gpt: coqui-tts's GPT.
        voices: (V, 32, D) conditioning latents.
        whose: (B,) which of them speaks.
        texts: (B, T) tokens between start and stop token, padded.
        text_lengths: (B,) tokens of each.
        codes: (B, M) codes after the start code, padded.
        lengths: (B,) codes of each.

    Returns:
        (B, T, D) and (B, M, D): where a position knows what comes before the next token or code.
    """

    def mask(length: Tensor, size: int) -> Tensor:
        return torch.arange(size, device=length.device) < length[:, None]

    past = gpt.gpt(inputs_embeds=voices, use_cache=True).past_key_values
    for layer in past.layers:
        layer.keys, layer.values = (tensor.index_select(0, whose) for tensor in (layer.keys, layer.values))
    embeds = [
        gpt.text_embedding(texts) + gpt.text_pos_embedding(texts),
        gpt.mel_embedding(codes) + gpt.mel_pos_embedding(codes),
    ]
    heard = torch.ones(len(whose), voices.shape[1], dtype=torch.bool, device=whose.device)
    seen = [heard, mask(text_lengths, texts.shape[1])]
    made = gpt.gpt(
        inputs_embeds=torch.cat(embeds, 1),
        attention_mask=torch.cat([*seen, mask(lengths, codes.shape[1])], 1),
        past_key_values=past,
    )
    parts: tuple[Tensor, Tensor] = gpt.final_norm(made.last_hidden_state).split([texts.shape[1], codes.shape[1]], 1)
    return parts
