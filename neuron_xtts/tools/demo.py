"""The demo: an XTTS v2, with random weights or real ones, speaks through plain and through patched coqui-tts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

import neuron_xtts
from neuron_xtts.coqui.constants import OUTPUT_RATE
from neuron_xtts.coqui.models import SENTENCES, load_or_make
from neuron_xtts.options import PatchOptions
from neuron_xtts.tables import table
from neuron_xtts.tools.recordings import write_reference, write_wav
from neuron_xtts.tools.stopwatch import Stopwatch

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing since Python 3.11


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
    **options: Unpack[PatchOptions],
) -> str:
    """Speak one sentence with plain coqui-tts and patched, write both to files, and compare them.

    Args:
        out: the folder for what is written: plain.wav, patched.wav and, unless one is given, reference.wav.
        small: a small model instead of one of full size.
        checkpoint: the folder of a real XTTS v2 checkpoint; by default the weights are random.
        speaker_wav: a recording of the voice to clone.
        text: one sentence.
        language: the language of the sentence, as coqui-tts abbreviates it.
        codes: audio codes to speak with random weights, which hardly ever stop by themselves.
        seed: what codes are drawn with, the same for both.
        options: keyword arguments of `neuron_xtts.patch`.

    Returns:
        a side-by-side table and the report.
    """
    out.mkdir(parents=True, exist_ok=True)
    tts = load_or_make(checkpoint, small)
    if speaker_wav is None:
        speaker_wav = out / "reference.wav"
        write_reference(speaker_wav)
    voice: dict[str, object] = {"speaker_wav": str(speaker_wav), "language": language, "split_sentences": False}
    length = {} if checkpoint else {"min_new_tokens": codes, "max_new_tokens": codes}
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
        write_wav(out / f"{name}.wav", spoken.audio, OUTPUT_RATE)
    weights = "real weights" if checkpoint else "random weights: noise, not speech"
    files = f"{out / 'plain.wav'} and {out / 'patched.wav'} ({weights})"
    return f"{comparison(plain, patched)}\n\nwritten: {files}\n\n{report}"


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
