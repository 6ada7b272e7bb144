"""Text as it is said: sentences that are short enough for XTTS, and the pauses between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from neuron_xtts.coqui.find import find_xtts
from neuron_xtts.errors import describe

#: Seconds of silence after a sentence and after a paragraph, choices of ours. coqui-tts has 0.42 s after a sentence.
SENTENCE_PAUSE = 0.25
PARAGRAPH_PAUSE = 0.6
#: Seconds that a ``[pause:...]`` may be long, and several without words between them.
LONGEST_PAUSE = 30.0

# Languages of XTTS that pysbd has no rules for, each with one whose punctuation is the same.
_SEGMENTED_AS = {"pt": "es", "cs": "sk", "tr": "en", "hu": "en", "ko": "en"}
_PARAGRAPH = re.compile(r"\s*\n\s*\n\s*")
_PAUSE = re.compile(r"\[\s*pause\b([^\]]*)\]", re.IGNORECASE)
_BLANKS = re.compile(r"[^\S\n]+")
_SECONDS = re.compile(r"\s*:\s*(\d+(?:\.\d+)?)\s*s?\s*")
_UNSEEN = re.compile("[\u00ad\u200b\u2060\ufeff]")  # soft hyphens and spaces without width: no tokens, or wrong ones
_ENDS = re.compile(r"(?<=[.!?…。！？])\s+")  # noqa: RUF001 - of sentences, where pysbd gives up
# A name follows, though pysbd does not know it of every language.
_TITLES = re.compile(
    r"(?:^|\W)(?:drs?|dra|prof|mrs?|ms|mmes?|mlles?|srs?|sras?|srta|sig|dott|dhr|mevr)\.$", re.IGNORECASE
)
_CLAUSES = re.compile(r"[;:,–—][\s\"'”’)]|[；：，、]")  # noqa: RUF001


@dataclass(frozen=True)
class Sentence:
    """What is said at once.

    Attributes:
        text: that XTTS is given.
        before: seconds of silence before it.
        after: seconds of silence after it; where another sentence follows, that has it before it.
    """

    text: str
    before: float = 0.0
    after: float = 0.0


class Reader:
    """Reads text for one model in one language.

    Args:
        model: a ``TTS.api.TTS``, a ``Synthesizer`` or an ``Xtts``.
        language: of the text, as the checkpoint names it; a region is left out if it knows the language without.

    Raises:
        ValueError: the checkpoint does not speak it, or coqui-tts lacks what it needs for it.
    """

    def __init__(self, model: object, language: str) -> None:
        xtts: Any = find_xtts(model)
        self.language = known_language(xtts, language)
        self._tokenizer = xtts.tokenizer
        self._most_tokens: int = xtts.args.gpt_max_text_tokens
        self._base = self.language.split("-")[0]
        self._most: int = xtts.tokenizer.char_limits.get(self._base, 250)
        try:
            self.tokens("a")
        except Exception as error:  # whatever a transliterator of a language raises where it is missing
            raise ValueError(
                f"coqui-tts cannot read text in {self.language!r} here: {describe(error)}. Its languages have extras: "
                f'pip install "coqui-tts[{self._base}]"'
            ) from error

    def read(self, text: str) -> list[Sentence]:
        """The sentences of a text, in order. Nothing but what cannot be said is left out, such as a row of asterisks.

        Args:
            text: of any length. An empty line ends a paragraph; ``[pause:0.5]`` is half a second of silence.

        Raises:
            ValueError: there is nothing to say, or a pause is none.
        """
        incoming = Incoming(self)
        sentences = [*incoming.more(text), *incoming.rest()]
        if not sentences:
            raise ValueError(f"There is nothing to say in {text[:40]!r}; expected words or numbers")
        return [*sentences[:-1], replace(sentences[-1], after=incoming.silence)]

    def pieces(self, text: str) -> Iterator[str]:
        """What XTTS can say at once, of a stretch of one paragraph."""
        for segment in self.segments(" ".join(_UNSEEN.sub("", text).split())):
            if sayable(segment):
                yield from cut(segment.strip(), self._fits)

    def segments(self, text: str) -> list[str]:
        """The sentences of a stretch of one paragraph, however long, which together are all of it."""
        import pysbd

        try:
            found = pysbd.Segmenter(language=_SEGMENTED_AS.get(self._base, self._base), clean=False).segment(text)
        except Exception:  # pysbd makes regular expressions of what it reads
            found = []
        if _letters("".join(found)) != _letters(text):
            found = _ENDS.split(text)
        segments: list[str] = []
        for segment in found:
            if segments and _TITLES.search(segments[-1].rstrip()):
                segments[-1] = f"{segments[-1].rstrip()} {segment}"
            elif segment.strip():
                segments.append(segment)
        return segments

    def tokens(self, text: str) -> int:
        """How many text tokens a sentence has."""
        return len(self._tokenizer.encode(text.strip().lower(), lang=self.language))

    def _fits(self, text: str) -> bool:
        try:
            return len(text) <= self._most and self.tokens(text) < self._most_tokens
        except Exception:  # such as of numbers that have no name, being too large
            return False


class Incoming:
    """Text that arrives bit by bit, such as from a language model, sentence by sentence.

    Args:
        reader: that reads it.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._open = ""  # that was not said yet
        self._asked: float | None = None  # seconds of silence, by pauses, before whatever comes next
        self._implied = 0.0  # the same, without such

    def more(self, text: str) -> list[Sentence]:
        """The sentences that are over with what comes now."""
        self._open = _BLANKS.sub(" ", self._open + text)
        size = self._over(self._open)
        ready, self._open = self._open[:size], self._open[size:]
        return list(self._read(ready))

    def rest(self) -> list[Sentence]:
        """The sentences that are left where nothing more will come."""
        ready, self._open = self._open, ""
        return list(self._read(ready))

    @property
    def open(self) -> int:
        """Characters of which it is not known yet where their sentence ends."""
        return len(self._open)

    @property
    def silence(self) -> float:
        """Seconds of the pauses behind the last sentence."""
        return self._asked or 0.0

    def _read(self, text: str) -> Iterator[Sentence]:
        for stretch, pause, over in _stretches(text):
            for piece in self._reader.pieces(stretch):
                yield Sentence(piece, self._implied if self._asked is None else self._asked)
                self._asked, self._implied = None, SENTENCE_PAUSE
            if pause is not None:
                self._asked = (self._asked or 0.0) + pause
                if self._asked > LONGEST_PAUSE:
                    found = f"Pauses of {self._asked:g} s, one after another"
                    raise ValueError(f"{found}; expected at most {LONGEST_PAUSE:g} s together")
            if over and self._implied:
                self._implied = PARAGRAPH_PAUSE

    def _over(self, text: str) -> int:
        """Characters up to the end of the last sentence that is over for certain."""
        start = max((found.end() for marks in (_PARAGRAPH, _PAUSE) for found in marks.finditer(text)), default=0)
        bracket = text.rfind("[")
        if bracket >= start and "]" not in text[bracket:]:  # a pause, perhaps
            text = text[:bracket]
        rest = text[start:]
        if not rest.strip():
            return start
        # A word shows whether what looks like an end is one: "5 p.m. And", "5 p.m. and". Without a space, the word that
        # is there may itself go on: "3." "5".
        probes = ("",) if rest == rest.rstrip() else (" And", " and")
        rest = rest.rstrip()  # what is behind may be half of an empty line
        segments = [self._reader.segments(" ".join(rest.split()) + probe)[-1] for probe in probes]
        still = max(len(_letters(last)) - len(probe.strip()) for last, probe in zip(segments, probes, strict=True))
        return start + _index_of_last(rest, still)


def known_language(model: object, language: str) -> str:
    """A language as a checkpoint names it.

    Raises:
        ValueError: it does not speak it.
    """
    xtts: Any = find_xtts(model)
    names = {str(name).lower(): str(name) for name in xtts.config.languages}
    asked = str(language).strip().lower().replace("_", "-")
    for name in (asked, asked.split("-")[0], "zh-cn" if asked.split("-")[0] == "zh" else ""):
        if name in names:
            return names[name]
    raise ValueError(f"language {language!r} is not known; expected one of {', '.join(names.values())}")


def cut(text: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """Cut a sentence that is too long, where it can be heard least: after a clause, else between words, else anywhere.

    Args:
        text: without spaces at its ends.
        fits: whether a piece is short enough. A single character is, whatever it says.
    """
    while text:
        size = len(text)
        while size > 1 and not fits(text[:size].strip()):
            size = max(size // 2, 1) if size > 600 else max(size * 4 // 5, 1)
        if size < len(text):
            head = text[:size]
            clauses = [match.end() for match in _CLAUSES.finditer(head)]
            if clauses and clauses[-1] >= size // 3:
                size = clauses[-1]
            elif not text[size].isspace() and not head[-1].isspace() and " " in head.strip():
                size = head.rstrip().rindex(" ") + 1
        piece, text = text[:size].strip(), text[size:].strip()
        if sayable(piece):
            yield piece


def sayable(text: str) -> bool:
    """Whether there is a letter or a digit in a text: without, XTTS makes up something."""
    return any(character.isalnum() for character in text)


def _stretches(text: str) -> Iterator[tuple[str, float | None, bool]]:
    """Stretches of text, the seconds of the pause behind each, if there is one, and whether a paragraph is over."""
    paragraphs = _PARAGRAPH.split(text)
    for number, paragraph in enumerate(paragraphs, start=1):
        start = 0
        for match in _PAUSE.finditer(paragraph):
            yield paragraph[start : match.start()], _seconds(match), False
            start = match.end()
        yield paragraph[start:], None, number < len(paragraphs)


def _seconds(match: re.Match[str]) -> float:
    found = _SECONDS.fullmatch(match[1])
    if not found or float(found[1]) > LONGEST_PAUSE:
        raise ValueError(f"{match[0]!r} is no pause; expected seconds, such as [pause:0.5], at most {LONGEST_PAUSE:g}")
    return float(found[1])


def _letters(text: str) -> str:
    return "".join(text.split())


def _index_of_last(text: str, letters: int) -> int:
    """Where the last so many characters that are no spaces begin."""
    index = len(text)
    while letters > 0:
        index -= 1
        letters -= not text[index].isspace()
    return index
