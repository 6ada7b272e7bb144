"""Word and character errors, after numbers, spelling, case and punctuation were made alike on both sides."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from neuron_xtts.tools.judge.packages import package


@lru_cache(maxsize=1)
def _normalizer() -> Any:
    return package("whisper_normalizer.english").EnglishTextNormalizer()


def normalize(text: str) -> str:
    """English text as recognizers are compared: lower case, no punctuation, numbers in digits, American spelling."""
    words = str(_normalizer()(text)).split()
    return " ".join(word for word in words if any(map(str.isalnum, word)))  # of "..." a dot would be left


def word_errors(text: str, heard: str) -> tuple[int, int]:
    """Words of ``heard`` that must be substituted, inserted or deleted to have ``text``, and words of ``text``.

    Both are normalized; ``text`` has at least one word.
    """
    return _errors(package("jiwer").process_words(text, heard))


def character_errors(text: str, heard: str) -> tuple[int, int]:
    """As `word_errors`, of characters, spaces included."""
    return _errors(package("jiwer").process_characters(text, heard))


def _errors(found: Any) -> tuple[int, int]:
    missed = found.substitutions + found.deletions
    return missed + found.insertions, missed + found.hits
