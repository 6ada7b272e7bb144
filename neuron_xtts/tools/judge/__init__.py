"""Judging speech: word error rate by offline recognizers, similarity of speakers, length, and how sentences end.

The same sentences are spoken with the same seeds by plain coqui-tts and by the patched model in every precision, so
that differences are paired. espeak-ng's own audio of them and the texts of other sentences are the controls: what a
recognizer makes of clear speech, and of no relation at all.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

import neuron_xtts
from neuron_xtts.coqui.models import load_or_make
from neuron_xtts.coqui.recordings import check_recording
from neuron_xtts.coqui.weights import file_digest
from neuron_xtts.options import Options, PatchOptions
from neuron_xtts.tools.bench import PLAIN, in_precision, machine
from neuron_xtts.tools.judge.gates import Gate
from neuron_xtts.tools.judge.listening import PACKAGES, RECOGNIZERS, Heard, Listener, hear_all
from neuron_xtts.tools.judge.packages import check_extra
from neuron_xtts.tools.judge.results import ESPEAK, METRICS, SHUFFLED, JudgeResults, Sample
from neuron_xtts.tools.judge.speaking import (
    Spoken,
    check_lengths,
    espeak,
    force,
    has_espeak,
    make_voice,
    sounds_the_same,
    speak,
)
from neuron_xtts.tools.judge.words import character_errors, normalize, word_errors


class _Take(NamedTuple):
    """A sentence by its number, a voice by its name, and a seed."""

    sentence: int
    voice: str
    seed: int

    @property
    def file(self) -> str:
        """The name of its WAV file; sentences are counted from 1, as lines are."""
        return f"{self.sentence + 1:04}-{self.voice}-{self.seed}.wav"


@dataclass
class _Utterance:
    """A take of one variant: the WAV file in which it is heard, and figures by numerator and denominator."""

    recording: Path
    ratios: dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What is judged, and by whom.

    Attributes:
        texts: English sentences, all different.
        recordings: of the voices, one each, by name.
        in_turn: a sentence is spoken in one voice, the next one in the next, instead of all in every voice.
        seeds: every sentence is spoken once with each.
        precisions: of the patched model.
        recognizers: names in `RECOGNIZERS`.
        baseline: the variant from which differences are taken.
        espeak_voices: of the control; one for each recording, or one for all.
        espeak_speed: of the control, in words per minute.
        espeak_range: of the control: how far its pitch moves, in percent of what the voice has.
        gates: limits that must be kept.
        options: keyword arguments of `neuron_xtts.patch`, but for the precision.

    Raises:
        ValueError: something of this cannot be judged, or a recording not be read.
        FileNotFoundError: there is no such recording.
        ExtraMissingError: a package of the extra ``eval`` is missing.
    """

    texts: Sequence[str]
    recordings: Mapping[str, Path]
    precisions: Sequence[str]
    in_turn: bool = False
    seeds: Sequence[int] = (1,)
    recognizers: Sequence[str] = ("moonshine",)
    baseline: str = PLAIN
    espeak_voices: Sequence[str] = ("en-us",)
    espeak_speed: int = 175
    espeak_range: int = 100
    gates: Sequence[Gate] = ()
    options: PatchOptions = field(default_factory=PatchOptions)

    def __post_init__(self) -> None:
        check_extra()
        _check_texts(self.texts)
        for path in self.recordings.values():
            check_recording(path)
        for name in self.recognizers:
            _check("recognizer", name, RECOGNIZERS)
        for precision in self.precisions:
            options: PatchOptions = {"backend": "auto", "buckets": None, "store": None, **self.options}
            Options.make(**in_precision(options, precision), to_run=True)
        if len(set(self.precisions)) < len(self.precisions):
            raise ValueError(f"precisions {list(self.precisions)} must be different")
        if min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} must be different, and none negative")
        if len(self.espeak_voices) not in (1, len(self.recordings)):
            raise ValueError(
                f"{len(self.espeak_voices)} voices of espeak-ng for {len(self.recordings)} recordings; "
                "name one for each, or one for all"
            )
        named = [("baseline", self.baseline)]
        for gate in self.gates:
            _check(f"gate {gate.text!r}: figure", gate.metric.partition("/")[0], METRICS)
            named += [(f"gate {gate.text!r}: variant", name) for name in (gate.variant, gate.baseline) if name]
        for what, name in named:
            _check(what, name, (ESPEAK, SHUFFLED, PLAIN, *self.precisions))
            if name == ESPEAK and not has_espeak():
                raise ValueError(f"{what} espeak-ng: it is not installed; on Debian: apt-get install espeak-ng")
        for gate in self.gates:
            self._check_gate(gate)

    def _check_gate(self, gate: Gate) -> None:
        """Raise ValueError if a gate is about nothing that there will be, or could not fail."""
        name = gate.metric.partition("/")[0]
        most = 2 if name in ("wer", "cer") else 1  # recognizers may hear more words than were said
        if METRICS[name] is None and abs(gate.limit) > most:
            raise ValueError(f"gate {gate.text!r}: {name} is a fraction; 0.2 is 20 %")
        judged = {figure for variant in gate.variants((PLAIN, *self.precisions)) for figure in self._figures(variant)}
        compared = judged.intersection(self._figures(gate.baseline)) if gate.baseline else judged
        if not any(map(gate.means, compared)):
            there = ", ".join(sorted(judged))
            raise ValueError(f"gate {gate.text!r} is about nothing that is judged; figures are {there}")

    def _figures(self, variant: str) -> list[str]:
        """Names of the figures of a variant, as far as anything is heard."""
        figures = [f"{errors}/{recognizer}" for errors in ("wer", "cer") for recognizer in self.recognizers]
        if variant == SHUFFLED:
            return figures
        voices = list(self.recordings)[: len(self.texts) if self.in_turn else None]
        if len(self.recordings) == 1:
            figures.append("similarity")
        else:
            figures += [f"{figure}/{voice}" for figure in ("similarity", "wrong-voice") for voice in voices]
        figures += ["length", *(["stopped"] if variant != ESPEAK else [])]
        return figures + (["same-codes", "agreement", "latents"] if variant not in (ESPEAK, PLAIN) else [])

    def run(self, checkpoint: Path, audio: Path | None = None) -> JudgeResults:
        """Speak, listen and compare, with progress bars.

        Args:
            checkpoint: the folder of an XTTS v2 checkpoint.
            audio: the folder to keep what is spoken in, by variant; by default it is not kept.

        Raises:
            FileNotFoundError: the checkpoint lacks a file.
            ValueError: a sentence is longer than XTTS can say at once.
        """
        listener = Listener([])
        speakers = {name: listener.speaker(path) for name, path in self.recordings.items()}
        xtts = load_or_make(checkpoint, small=False).synthesizer.tts_model
        check_lengths(xtts, self.texts)
        results = JudgeResults(
            machine=machine(), judged=self._judged(checkpoint), texts=self.texts, samples={}, baseline=self.baseline
        )
        results.machine |= {name: version(name) for name in PACKAGES}
        if has_espeak():
            spoken_so = f"{self.espeak_speed} words per minute, pitch range {self.espeak_range} %"
            results.machine["espeak-ng"] = f"{', '.join(self.espeak_voices)}; {spoken_so}"
        else:
            results.notes.append("espeak-ng is not installed: that control is missing, and lengths are by coqui-tts's")
        with tempfile.TemporaryDirectory() as scratch:
            spoken = self._speak(xtts, audio or Path(scratch), Path(scratch), results)
            recordings = [utterance.recording for utterances in spoken.values() for utterance in utterances.values()]
            heard = hear_all(recordings, self.recognizers)
        for variant, utterances in spoken.items():
            for take, utterance in utterances.items():
                reference = spoken[ESPEAK][take] if ESPEAK in spoken else spoken[PLAIN][take]
                length = heard[utterance.recording].seconds, heard[reference.recording].seconds
                utterance.ratios |= {"length": length, **_speaker(heard[utterance.recording], take.voice, speakers)}
            results.samples[variant] = [
                self._sample(take, heard[utterance.recording].words, take.sentence, utterance.ratios)
                for take, utterance in utterances.items()
            ]
        # Every sentence's speech by the text of another, half the list away.
        results.samples[SHUFFLED] = [
            self._sample(
                take, heard[utterance.recording].words, (take.sentence + len(self.texts) // 2) % len(self.texts)
            )
            for take, utterance in spoken[PLAIN].items()
        ]
        results.check(self.gates)
        return results

    def _judged(self, checkpoint: Path) -> dict[str, Any]:
        """What is judged, in plain data, so that figures can be traced to it."""
        buckets, store = self.options.get("buckets"), self.options.get("store")
        return {
            "checkpoint": str(checkpoint),
            "sha256 of model.pth": file_digest(checkpoint / "model.pth"),
            "recordings": {name: str(path) for name, path in self.recordings.items()},
            "buckets": asdict(buckets) if buckets else None,
            "store": str(store) if store else None,
        }

    def _speak(
        self, xtts: Any, folder: Path, scratch: Path, results: JudgeResults
    ) -> dict[str, dict[_Take, _Utterance]]:
        """Speak every take in every variant, into WAV files in a folder of its own."""
        takes = self._takes()
        plain: dict[_Take, Spoken] = {}
        spoken = {ESPEAK: self._control(takes, folder / ESPEAK)} if has_espeak() else {}
        with tqdm(total=len(takes) * (1 + len(self.precisions)), desc="speaking", unit="sentence") as bar:
            for variant in (PLAIN, *self.precisions):
                (folder / variant).mkdir(parents=True, exist_ok=True)
                if variant != PLAIN:
                    neuron_xtts.patch(xtts, **in_precision(self.options, variant))
                voices = {name: make_voice(xtts, path) for name, path in self.recordings.items()}
                spoken[variant] = {}
                for take in takes:
                    text, voice, path = self.texts[take.sentence], voices[take.voice], folder / variant / take.file
                    seed = take.seed, take.sentence
                    if variant == PLAIN:
                        plain[take] = speak(xtts, text, voice, seed, path, scratch / f"{len(plain)}.pt")
                        spoken[variant][take] = _Utterance(path, {"stopped": (plain[take].stopped, 1)})
                    else:
                        spoken[variant][take] = _compare(xtts, speak(xtts, text, voice, seed, path), plain[take])
                    bar.update()
                if variant != PLAIN:
                    results.judged["backend"] = neuron_xtts.report(xtts).backend
                    results.unpatch(xtts, variant)
        return spoken

    def _takes(self) -> list[_Take]:
        takes = map(_Take._make, itertools.product(range(len(self.texts)), self.recordings, self.seeds))
        voices = list(self.recordings)
        return [take for take in takes if not self.in_turn or take.voice == voices[take.sentence % len(voices)]]

    def _control(self, takes: Sequence[_Take], folder: Path) -> dict[_Take, _Utterance]:
        """The audio of espeak-ng for every take; it draws nothing, so it speaks once for all seeds."""
        folder.mkdir(parents=True, exist_ok=True)
        voices = dict(zip(self.recordings, itertools.cycle(self.espeak_voices), strict=False))
        recordings = {}
        for sentence, voice in dict.fromkeys((take.sentence, take.voice) for take in takes):
            path = recordings[sentence, voice] = folder / _Take(sentence, voice, self.seeds[0]).file
            espeak(self.texts[sentence], voices[voice], self.espeak_speed, path, self.espeak_range)
        return {take: _Utterance(recordings[take.sentence, take.voice], {}) for take in takes}

    def _sample(
        self, take: _Take, heard: dict[str, str], text: int, ratios: Mapping[str, tuple[float, float]] | None = None
    ) -> Sample:
        """A take, judged by a text, which is its own or, as a control, another."""
        reference = normalize(self.texts[text])
        words = {f"wer/{name}": word_errors(reference, normalize(said)) for name, said in heard.items()}
        characters = {f"cer/{name}": character_errors(reference, normalize(said)) for name, said in heard.items()}
        figures = {**words, **characters, **(ratios or {})}
        return Sample(*take, heard=heard, ratios={name: (float(a), float(b)) for name, (a, b) in figures.items()})


def by_name(recordings: Sequence[Path]) -> dict[str, Path]:
    """Recordings by the name of the voice, which is that of the file, with hyphens for spaces.

    Raises:
        ValueError: two have the same name.
    """
    named = {"-".join(path.stem.split()): path for path in recordings}
    if len(named) < len(recordings):
        raise ValueError(f"of {len(recordings)} recordings some have the same name: {', '.join(map(str, recordings))}")
    return named


def _compare(xtts: Any, said: Spoken, plain: Spoken) -> _Utterance:
    """What a patched model said, against what coqui-tts said in the same take."""
    forced = force(xtts, plain)
    # What differs by rounding is not heard again: any other word would be chance, and it takes as long.
    recording = plain.audio if sounds_the_same(said.audio, plain.audio) else said.audio
    return _Utterance(
        recording,
        {
            "stopped": (said.stopped, 1),
            "same-codes": (torch.equal(said.codes, plain.codes), 1),
            "agreement": (forced.agreeing, forced.codes),
            "latents": (forced.correlation, 1),
        },
    )


def _speaker(heard: Heard, voice: str, speakers: Mapping[str, NDArray[np.float32]]) -> dict[str, tuple[float, float]]:
    """How similar a speaker is to the recording, and with several voices, whether more so to another one."""
    cosines = {name: float(heard.speaker @ speaker) for name, speaker in speakers.items()}
    if len(speakers) == 1:
        return {"similarity": (cosines[voice], 1)}
    nearest = max(cosines, key=lambda name: cosines[name])
    return {f"similarity/{voice}": (cosines[voice], 1), f"wrong-voice/{voice}": (nearest != voice, 1)}


def _check(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"{what} {name!r} does not exist; choose one of {', '.join(map(repr, known))}")


def _check_texts(texts: Sequence[str]) -> None:
    if len(texts) < 2:
        raise ValueError(f"{len(texts)} sentences to judge: intervals need at least 2, and mean something from 100 on")
    first: dict[str, str] = {}
    for text in texts:
        words = normalize(text)
        if not words:
            raise ValueError(f"{text!r} has no words to recognize; leave it out")
        if words in first:
            raise ValueError(f"{text!r} has the words of {first[words]!r}; leave one of them out")
        first[words] = text
