"""How many threads the host's share of a call runs on."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
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
