"""The demo: an XTTS v2, with random weights or real ones, speaks through plain and through patched coqui-tts."""

from __future__ import annotations

import math
import tempfile
import time
import wave
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import neuron_xtts
from neuron_xtts.patching.proxy import Installation
from neuron_xtts.report import table

SAMPLE_RATE = 24000  # of XTTS's audio

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


def random_tts(folder: Path, *, small: bool = False, seed: int = 0, progress: bool = False, **args: Any) -> Any:
    """Make an XTTS v2 of coqui-tts's own classes with random weights and load it as users load theirs.

    Args:
        folder: where its checkpoint is written: config.json, vocab.json and model.pth.
        small: two layers of 64 channels and a narrow vocoder instead of the full size (1.9 GB).
        seed: of the weights.
        progress: show a bar.
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
    bar = tqdm(total=3, desc="making a model with random weights", disable=not progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Xtts(config)
        model.tokenizer = VoiceBpeTokenizer(vocab_file=str(folder / "vocab.json"))
        model.init_models()
        narrow = HifiDecoder(
            decoder_input_dim=config.model_args.decoder_input_dim,
            upsample_initial_channel_decoder=SMALL_VOCODER_CHANNELS,
        )
        for block in model.gpt.conditioning_encoder.attn:
            nn.init.normal_(block.proj_out.weight, std=0.02)  # coqui-tts starts with zeros: no attention at all
    bar.update()
    config.save_json(str(folder / "config.json"))
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    del model
    bar.update()
    tts = load_tts(folder)
    if small:
        tts.synthesizer.tts_model.hifigan_decoder = narrow.eval()
    bar.update()
    bar.close()
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
    t = torch.arange(int(seconds * rate)) / rate
    pitch = 140 + 30 * torch.sin(2 * math.pi * 0.7 * t) + 4 * torch.sin(2 * math.pi * 5.5 * t)
    phase = torch.cumsum(2 * math.pi * pitch / rate, 0)
    voice = sum(torch.sin(phase * n) / n for n in range(1, 12)) * (0.6 + 0.4 * torch.sin(2 * math.pi * 2.3 * t))
    write_wav(path, 0.3 * voice / voice.abs().max(), rate)


def write_wav(path: Path, samples: Any, rate: int) -> None:
    """Write mono ``samples`` in [-1, 1] as a 16-bit WAV file."""
    data = (torch.as_tensor(samples).clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(data)


class Stopwatch:
    """Seconds that ``Xtts`` spends in each stage of a sentence, patched or not.

    A context manager: it wraps the stages' methods, on top of a patch if there is one, and unwraps them at the end.
    """

    STAGES = ("voice", "codes", "latents", "vocoder")

    def __init__(self, xtts: Any) -> None:
        self.seconds = dict.fromkeys(self.STAGES, 0.0)
        self._methods = {
            "voice": (xtts, "get_conditioning_latents"),
            "codes": (xtts.gpt, "generate"),
            "latents": (xtts.gpt, "forward"),
            "vocoder": (xtts.hifigan_decoder, "forward"),
        }

    def __enter__(self) -> Stopwatch:
        self._installations = [
            Installation(module, method, partial(self._time, stage))
            for stage, (module, method) in self._methods.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for installation in self._installations:
            installation.remove()

    def _time(self, stage: str, wrapped: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        start = time.perf_counter()
        try:
            return wrapped(*args, **kwargs)
        finally:
            self.seconds[stage] += time.perf_counter() - start


@dataclass
class Spoken:
    """One sentence, and what it took.

    Attributes:
        audio: samples at 24 kHz.
        seconds: from the call to the audio.
        stages: seconds by stage.
    """

    audio: Any
    seconds: float
    stages: dict[str, float]

    @property
    def length(self) -> float:
        """Seconds of audio, without the silence that coqui-tts appends to a sentence."""
        from TTS.utils.synthesizer import PAD_SILENCE_SAMPLES

        return (len(self.audio) - int(PAD_SILENCE_SAMPLES)) / SAMPLE_RATE


def speak(tts: Any, text: str, *, seed: int, label: str, codes: int | None, **options: Any) -> Spoken:
    """Say ``text`` with ``tts.tts`` and a progress bar over its codes.

    Args:
        tts: a ``TTS.api.TTS``, patched or not.
        text: one sentence.
        seed: of torch's generator.
        label: of the progress bar.
        codes: how many there will be, if that is known.
        options: of ``tts.tts``.
    """
    xtts = tts.synthesizer.tts_model
    with tqdm(total=codes, desc=label, unit="code") as bar, Stopwatch(xtts) as stopwatch:

        def advance(*_: object) -> None:
            # Every code is embedded once, patched or not; then coqui-tts embeds them all again for the latents.
            bar.update(bar.n != codes)

        hook = xtts.gpt.mel_embedding.register_forward_hook(advance)
        try:
            torch.manual_seed(seed)
            start = time.perf_counter()
            audio = tts.tts(text, **options)
            seconds = time.perf_counter() - start
        finally:
            hook.remove()
    return Spoken(torch.tensor(audio), seconds, stopwatch.seconds)


def run(
    out: Path,
    *,
    small: bool = False,
    checkpoint: Path | None = None,
    speaker_wav: Path | None = None,
    text: str = SENTENCES[0],
    language: str = "en",
    codes: int = 100,
    seed: int = 1,
    **options: Any,
) -> str:
    """The main job: one sentence with plain coqui-tts and patched, written to two files and compared.

    Args:
        out: the folder for what is written: plain.wav, patched.wav and, unless one is given, reference.wav.
        small: a small model instead of one of full size.
        checkpoint: the folder of a real XTTS v2 checkpoint; by default the weights are random.
        speaker_wav: a recording of the voice to clone.
        text: one sentence.
        language: of the sentence.
        codes: audio codes to speak with random weights, which hardly ever stop by themselves.
        seed: of the codes.
        options: of `neuron_xtts.patch`.

    Returns:
        a side-by-side table and the report.
    """
    out.mkdir(parents=True, exist_ok=True)
    tts = load_or_make(checkpoint, small)
    if speaker_wav is None:
        speaker_wav = out / "reference.wav"
        write_reference(speaker_wav)
    voice: dict[str, Any] = {"speaker_wav": str(speaker_wav), "language": language, "split_sentences": False}
    length: dict[str, Any] = {}
    if checkpoint is None:
        length = {"min_new_tokens": codes, "max_new_tokens": codes}
    total = None if checkpoint else codes

    def say(label: str) -> Spoken:
        # The first sentence pays for what torch and coqui-tts set up once.
        speak(tts, "hello", seed=seed, label=f"{label}, warm-up", codes=2, max_new_tokens=2, **voice)
        return speak(tts, text, seed=seed, label=label, codes=total, **voice, **length)

    plain = say("coqui-tts")
    neuron_xtts.patch(tts, **options)
    patched = say("neuron_xtts")
    report = neuron_xtts.report(tts)
    neuron_xtts.unpatch(tts)
    for name, spoken in {"plain": plain, "patched": patched}.items():
        write_wav(out / f"{name}.wav", spoken.audio, SAMPLE_RATE)
    weights = "real weights" if checkpoint else "random weights: noise, not speech"
    files = f"{out / 'plain.wav'} and {out / 'patched.wav'} ({weights})"
    return f"{comparison(plain, patched)}\n\nwritten: {files}\n\n{report}"


def load_or_make(checkpoint: Path | None, small: bool) -> Any:
    """A ``TTS.api.TTS`` with the weights in ``checkpoint``, or with random ones."""
    if checkpoint is not None:
        missing = [name for name in ("config.json", "vocab.json", "model.pth") if not (checkpoint / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{checkpoint} has no {', '.join(missing)}; expected the folder of an XTTS v2 checkpoint, as coqui-tts "
                "downloads it"
            )
        return load_tts(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        return random_tts(Path(folder), small=small, progress=True)


def comparison(plain: Spoken, patched: Spoken) -> str:
    """A side-by-side table of the same sentence with plain coqui-tts and patched."""

    def row(name: str, before: float, after: float, unit: str = " s") -> tuple[str, ...]:
        # A stage that takes next to nothing in one of the columns has no meaningful ratio.
        ratio = f"{before / after:.2f}x" if min(before, after) > 0.01 * plain.seconds or not unit else ""
        return name, f"{before:.3f}{unit}", f"{after:.3f}{unit}", ratio

    rows = [row(stage, plain.stages[stage], patched.stages[stage]) for stage in Stopwatch.STAGES]
    rows.append(row("whole sentence", plain.seconds, patched.seconds))
    rows.append(row("RTF", plain.seconds / plain.length, patched.seconds / patched.length, ""))
    if plain.audio.shape == patched.audio.shape:
        difference = f"{(plain.audio - patched.audio).abs().max():.1e}"
    else:
        difference = f"different lengths: {plain.length:.2f} s and {patched.length:.2f} s"
    rows.append(("largest difference of a sample", "", difference, ""))
    return f"{plain.length:.2f} s of audio\n\n" + table(("", "coqui-tts", "neuron_xtts", "faster"), rows)
