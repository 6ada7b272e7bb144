"""Forks: a child's locks are open, and it forgets what its parent's threads were at, since they are not there."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forgetful(Protocol):
    """Something that knows of threads."""

    def forget(self) -> None:
        """Whoever it knows of is not there."""


class Lock:
    """A lock that its holder may take again, as whatever Python collects in the midst of it does."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        forgets(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def forget(self) -> None:
        """Open it, whoever held it."""
        self._lock = threading.RLock()


_every: weakref.WeakSet[Forgetful] = weakref.WeakSet()


def forgets(thing: Forgetful) -> None:
    """Have something forget in every forked child, for as long as it is there."""
    _every.add(thing)


def _forget_all() -> None:
    for thing in list(_every):
        thing.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
