"""The guard against tails: what a model goes on to say, hum or breathe when all of a text has been said."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Guard:
    """Keeps what is spoken from going on when all has been said. `neuron_xtts.patch` takes one; docs/usage.md has more.

    Attributes:
        codes_per_token: codes that a sentence may have for each token of its text, besides ``spare``; None: no limit.
            XTTS makes 21.5 codes for a second of speech, and has about two for a token. A choice of ours, measured.
        spare: codes that a sentence may have besides, for pauses, however short its text is. A choice of ours.
        retry: say a sentence that reached that limit once more, with other draws; no stream, of which most was heard.
        trim: the end of speech that is so many dB quieter than its loudest part is cut off; None: nothing is.
        keep: seconds behind the last of what is louder that stay.

    Raises:
        ValueError: a value that means nothing.
    """

    codes_per_token: float | None = 8.0
    spare: int = 64
    retry: bool = True
    trim: float | None = 40.0
    keep: float = 0.25

    def __post_init__(self) -> None:
        if self.codes_per_token is not None and not _is_number(self.codes_per_token, above=0):
            found = f"codes_per_token={self.codes_per_token!r}"
            raise ValueError(f"{found}; expected a number above 0, or None for no limit")
        if type(self.spare) is not int or self.spare < 0:
            raise ValueError(f"spare={self.spare!r}; expected how many codes, or 0 for none")
        if not isinstance(self.retry, bool):
            raise ValueError(f"retry={self.retry!r}; expected True or False")
        if self.trim is not None and not _is_number(self.trim, above=0):
            raise ValueError(f"trim={self.trim!r}; expected how many dB, more than 0, or None to cut nothing off")
        if not _is_number(self.keep) or self.keep < 0:
            raise ValueError(f"keep={self.keep!r}; expected how many seconds, or 0 for none")

    @classmethod
    def of(cls, guard: bool | Guard) -> Guard | None:
        """What `neuron_xtts.patch` was given: one, ``True`` for that of the defaults, or ``False`` for none.

        Raises:
            TypeError: it is something else.
        """
        if isinstance(guard, bool):
            return cls() if guard else None
        if not isinstance(guard, Guard):
            raise TypeError(f"guard must be a neuron_xtts.Guard, True or False, got a {type(guard).__name__}")
        return guard

    def cap(self, tokens: int, asked: int, least: int) -> int | None:
        """Codes after which a sentence ends; None if it ends no later by itself.

        Args:
            tokens: of its text.
            asked: codes after which it ends anyway.
            least: codes that it must have.
        """
        if self.codes_per_token is None:
            return None
        cap = max(self.spare + math.floor(self.codes_per_token * max(tokens, 0)), least, 1)
        return cap if cap < asked else None


def _is_number(value: object, above: float = -math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > above
