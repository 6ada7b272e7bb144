"""The demo: an XTTS v2, with random weights or real ones, speaks through plain and through patched coqui-tts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

import neuron_xtts
from neuron_xtts.coqui.constants import OUTPUT_RATE
from neuron_xtts.coqui.models import SENTENCES, find_miniature, load_or_make, load_tts
from neuron_xtts.coqui.recordings import check_recording, write_reference, write_wav
from neuron_xtts.options import Options, PatchOptions
from neuron_xtts.tables import table
from neuron_xtts.tools.stopwatch import Stopwatch, each_code

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11


# A sentence that the miniature says clearly, and the file of a voice in its folder.
MINIATURE_TEXT = "She has two brothers and one sister."
MINIATURE_VOICE = "f5.wav"


@dataclass
class Spoken:
    """One sentence, and what it took.

    Attributes:
        audio: (N,) samples at 24 kHz.
        seconds: time from the call to the audio.
        stages: seconds by stage of the `Stopwatch`.
    """

    audio: Tensor
    seconds: float
    stages: dict[str, float]

    @property
    def length(self) -> float:
        """Seconds of audio, without the silence that coqui-tts appends to a sentence."""
        from TTS.utils.synthesizer import PAD_SILENCE_SAMPLES

        return (len(self.audio) - int(PAD_SILENCE_SAMPLES)) / OUTPUT_RATE


def speak(tts: Any, text: str, *, seed: int, label: str, codes: int | None, **options: object) -> Spoken:
    """Say ``text`` with ``tts.tts`` and a progress bar over its codes.

    Args:
        tts: a ``TTS.api.TTS``, patched or not.
        text: one sentence.
        seed: the seed of torch's generator.
        label: what stands before the progress bar.
        codes: how many there will be; None if that is not known.
        options: keyword arguments of ``tts.tts``.
    """
    xtts = tts.synthesizer.tts_model
    with tqdm(total=codes, desc=label, unit="code") as bar, Stopwatch(xtts) as stopwatch:

        def advance(*_: object) -> None:
            # In the end coqui-tts embeds them all again for the latents.
            bar.update(bar.n != codes)

        with each_code(xtts, advance):
            torch.manual_seed(seed)
            start = time.perf_counter()
            audio = tts.tts(text, **options)
            seconds = time.perf_counter() - start
        bar.update((codes or bar.n) - bar.n)
    return Spoken(torch.tensor(audio), seconds, stopwatch.seconds)


def run(
    out: Path,
    *,
    small: bool = False,
    checkpoint: Path | None = None,
    speaker_wav: Path | None = None,
    text: str | None = None,
    language: str = "en",
    codes: int = 100,
    seed: int = 1,
    **options: Unpack[PatchOptions],
) -> Iterator[str]:
    """Speak a sentence with plain coqui-tts and patched, write both to files, and compare them.

    By default the miniature speaks if the package is used from a checkout that has one, and then a model of full size
    with random weights, whose times are those of XTTS v2.

    Args:
        out: the folder for what is written: plain.wav, patched.wav and, unless a recording is given, reference.wav; of
            what speaks after the miniature full-plain.wav and full-patched.wav.
        small: the miniature alone, or without one a small model with random weights.
        checkpoint: the folder of an XTTS v2 checkpoint, to hear that one alone.
        speaker_wav: a recording of the voice to clone.
        text: one sentence.
        language: the language of the sentence, as coqui-tts abbreviates it.
        codes: audio codes to speak with random weights, which hardly ever stop by themselves.
        seed: what codes are drawn with, the same for both.
        options: keyword arguments of `neuron_xtts.patch`.

    Yields:
        for each model a side-by-side table and the report, once it has spoken, and before it, without ``checkpoint``,
        which model it is.

    Raises:
        FileNotFoundError: ``checkpoint`` lacks a file of those that coqui-tts downloads, or there is no such recording.
        ValueError: checkpoint or recording cannot be read, there is no text, or the model has no such language, or the
            backend no such precision.
        NeuronMissingError: ``options`` ask for Neuron, which is not there.
    """
    # Now, since plain coqui-tts speaks before `neuron_xtts.patch` would see them.
    checked: PatchOptions = {"backend": "auto", "precision": "fp32", "buckets": None, "store": None, **options}
    Options.make(**checked, to_run=True)
    if text is not None and not text.strip():
        raise ValueError("there is no text to speak")
    if speaker_wav is not None:
        check_recording(speaker_wav)
    out.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"language": language, "seed": seed, "options": options}
    files = out / "plain.wav", out / "patched.wav"
    if checkpoint:
        tts, voice = load_or_make(checkpoint, small=False), speaker_wav or _tone(out)
        yield compare(tts, text or SENTENCES[0], speaker_wav=voice, files=files, **settings)
        return
    miniature = find_miniature()
    if miniature:
        tts, voice = load_tts(miniature), speaker_wav or miniature / MINIATURE_VOICE
        yield f"The miniature ({miniature})"
        yield compare(tts, text or MINIATURE_TEXT, speaker_wav=voice, files=files, **settings)
        files = out / "full-plain.wav", out / "full-patched.wav"
    if not miniature or not small:
        tts, voice = load_or_make(None, small), speaker_wav or _tone(out)
        yield f"{'Small' if small else 'Full size'}, random weights: real times, noise instead of words"
        yield compare(tts, text or SENTENCES[0], speaker_wav=voice, files=files, codes=codes, **settings)


def _tone(out: Path) -> Path:
    write_reference(out / "reference.wav")
    return out / "reference.wav"


def compare(
    tts: Any,
    text: str,
    *,
    speaker_wav: Path,
    files: tuple[Path, Path],
    codes: int | None = None,
    language: str = "en",
    seed: int = 1,
    options: PatchOptions,
) -> str:
    """Speak a sentence with one model, plain and then patched; it is left unpatched.

    Args:
        tts: a ``TTS.api.TTS``.
        text: one sentence.
        speaker_wav: a recording of the voice to clone.
        files: what is written, plain and patched.
        codes: exactly as many, for weights that do not stop by themselves; None for as many as it takes.
        language: of the sentence.
        seed: what codes are drawn with, the same for both.
        options: keyword arguments of `neuron_xtts.patch`.

    Returns:
        a side-by-side table and the report.
    """
    languages = tts.synthesizer.tts_model.config.languages
    if language not in languages:
        raise ValueError(f"the model has no language {language!r}; choose one of {', '.join(languages)}")
    voice: dict[str, object] = {"speaker_wav": str(speaker_wav), "language": language, "split_sentences": False}
    length = {} if codes is None else {"min_new_tokens": codes, "max_new_tokens": codes}

    def say(label: str) -> Spoken:
        # The first sentence pays for what torch and coqui-tts set up once.
        speak(tts, "hello", seed=seed, label=f"{label}, warm-up", codes=2, max_new_tokens=2, **voice)
        return speak(tts, text, seed=seed, label=label, codes=codes, **voice, **length)

    plain = say("coqui-tts")
    neuron_xtts.patch(tts, **options)
    patched = say("neuron_xtts")
    report = neuron_xtts.report(tts)
    neuron_xtts.unpatch(tts)
    for path, spoken in zip(files, (plain, patched), strict=True):
        write_wav(path, spoken.audio, OUTPUT_RATE)
    said = f"\N{LEFT DOUBLE QUOTATION MARK}{text}\N{RIGHT DOUBLE QUOTATION MARK}"
    return f"{said}, {comparison(plain, patched)}\n\nwritten: {files[0]} and {files[1]}\n\n{report}"


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
