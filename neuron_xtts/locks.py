"""Locks that a forked child finds open: whoever held them at the fork is not there."""

from __future__ import annotations

import os
import threading
import weakref


class Lock:
    """A lock that its holder may take again, as whatever Python collects in the midst of it does."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _every.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Open it, whoever held it."""
        self._lock = threading.RLock()


_every: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_every):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
