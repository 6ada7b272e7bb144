"""Who draws from torch's global generator: one call at a time, so that the draws of a failed one can be undone.

Others draw from generators of their own.
"""

from __future__ import annotations

import os
import weakref

import torch
from torch import Tensor


class Claim:
    """That one call draws from torch's global generator. As a context manager it ends with the block."""

    def __init__(self) -> None:
        self._first: Tensor | None = None  # the state before its first draw

    def note(self) -> None:
        """It is about to draw."""
        if self._first is None:
            self._first = torch.get_rng_state()

    @property
    def drew(self) -> bool:
        """Whether there is something to undo."""
        return self._first is not None

    def rewind(self) -> None:
        """Undo what it drew."""
        if self._first is not None:
            torch.set_rng_state(self._first)

    def end(self) -> None:
        """Let another call have the generator."""
        DRAWS.end(self)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.end()

    def __del__(self) -> None:  # of a stream that nobody ever pulled
        self.end()


class Draws:
    """The claim that there is."""

    def __init__(self) -> None:
        # By process: what a fork had at the moment is none of a child's. A dictionary's methods are atomic.
        self._claims: dict[int, weakref.ref[Claim]] = {}

    def claim(self) -> Claim | None:
        """The global generator for a call; None if another has it."""
        claim = Claim()
        owner = self._claims.setdefault(os.getpid(), weakref.ref(claim))
        return claim if owner() is claim else None

    def note(self) -> None:
        """Whoever has the generator is about to draw."""
        owner = self._claims.get(os.getpid())
        claim = owner() if owner else None
        if claim is not None:
            claim.note()

    def end(self, claim: Claim) -> None:
        """A claim has ended."""
        owner = self._claims.get(os.getpid())
        if owner is not None and owner() in (claim, None):
            self._claims.pop(os.getpid(), None)


DRAWS = Draws()


class Waits:
    """What codes are drawn with on a device, several of a row ahead of them; what was not needed is given back.

    Args:
        source: of one call; None for one that does not draw.
        rows: of the call.
        steps: ahead, N.
        vocabulary: codes that there are, V.

    Attributes:
        waits: (rows, N, V), step for step what ``torch.multinomial`` would draw with.
    """

    def __init__(self, source: torch.Generator | None, rows: int, steps: int, vocabulary: int) -> None:
        self._source = source
        self._states = [source.get_state()] if source else []
        drawn = []
        for _ in range(steps if source else 0):
            drawn.append(torch.empty(rows, vocabulary).exponential_(generator=source))
            self._states += [source.get_state()] if source else []
        self.waits = torch.stack(drawn, dim=1) if drawn else torch.ones(rows, steps, vocabulary)

    def keep(self, steps: int) -> None:
        """Have only the first so many steps drawn; somebody else who has drawn meanwhile keeps what that gave."""
        if self._source and torch.equal(self._source.get_state(), self._states[-1]):
            self._source.set_state(self._states[steps])


def any_seed() -> int:
    """A seed that nobody chose."""
    return torch.Generator().seed()
