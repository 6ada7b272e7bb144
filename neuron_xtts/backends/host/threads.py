"""How many threads the host's share of a call runs on, and what becomes of them afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


def usable_cpus(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may keep busy: those it may run on, and no more than a container's quota.

    Args:
        cgroups: where Linux mounts control groups, of version 2 or 1.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # no such file, or no quota ("max")
            quota, period = (int(word) for name in files for word in (cgroups / name).read_text().split())
            if quota > 0:
                return max(min(allowed, math.ceil(quota / period)), 1)
    return allowed


@contextlib.contextmanager
def at_most(cpus: int) -> Iterator[None]:
    """Run torch on at most ``cpus`` threads, in this thread; then on as many as before.

    torch counts the CPUs of the machine, not those of a container's quota. Threads that outnumber their CPUs wait for
    each other: 3 on 2 CPUs took 1.3 (fp32) to 1.8 times (int8) as long for a code.
    """
    before = torch.get_num_threads()
    if before <= cpus:
        yield
        return
    torch.set_num_threads(cpus)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def end_team() -> None:
    """End the team of OpenMP threads that this thread's operators ran on; the next one makes another.

    An idle team counts among the threads of a process. With more of them than processors, libgomp's threads do not wait
    for each other awake, and a decode step of another thread took 1.8 times as long. A new team costs 0.13 ms.
    """
    if torch.get_num_threads() > 1:
        _pause()(1)  # omp_pause_soft


@functools.cache
def _pause() -> Callable[[int], object]:
    """``omp_pause_resource_all`` of the libgomp that torch brings; where it brings none, nothing."""
    for path in Path(torch.__file__).parent.glob("lib/libgomp*"):
        with contextlib.suppress(OSError, AttributeError):
            pause: Callable[[int], object] = ctypes.CDLL(str(path)).omp_pause_resource_all
            return pause
    return lambda kind: None
