"""Subprocesses that lower, compile and verify graphs: started, limited in memory and time, and ended for certain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from neuron_xtts.backends.neuron.device import scripts_on_path
from neuron_xtts.backends.neuron.store import LOG, write_json
from neuron_xtts.backends.neuron.tracing import traceable
from neuron_xtts.backends.neuron.worker import RESULT, Job
from neuron_xtts.buckets import Bucket
from neuron_xtts.coqui.weights import tensors_of
from neuron_xtts.errors import NeuronXttsError
from neuron_xtts.graphs.catalogue import CATALOGUE
from neuron_xtts.graphs.operators import Graph

# What a job may need beside the graph's weights, and how often it holds these: in torch, in the program's text, in the
# compiler. Guesses on the safe side; neuronx-cc's own documentation gives no figures.
_BASE_BYTES = 2 << 30
_COPIES = 6

TIMEOUT = 3600.0  # seconds for one graph; the longest reported compilation of a graph of this size took ten minutes
_TAIL = 20  # lines of a log that are shown


class JobError(NeuronXttsError):
    """A job failed; the message has the last lines of its log.

    Attributes:
        log: the whole of it, as long as the job's folder is there.
        spent: whether it took more time or memory than there is.
    """

    def __init__(self, message: str, log: Path | None = None, *, spent: bool = False) -> None:
        super().__init__(message)
        self.log = log
        self.spent = spent


class Jobs:
    """Subprocesses, as many at a time as memory allows. A context manager: at its end, all of them are gone.

    Args:
        scratch: a folder for their files.
        graphs: by name, as `make_graphs` makes them.
        workers: how many at a time, whatever the memory; None for as many as processors, if memory allows.
        timeout: seconds for one.
        fill: as for `traceable`.
        rounded: as for `traceable`.

    Attributes:
        stopped: whether the end has come.
        bytes: how many the weights of each graph take.
    """

    def __init__(
        self,
        scratch: Path,
        graphs: Mapping[str, Graph],
        *,
        workers: int | None,
        timeout: float,
        fill: bool,
        rounded: Collection[str] = (),
    ) -> None:
        self.scratch = scratch
        self.timeout = timeout
        self.pool = ThreadPoolExecutor(workers or os.cpu_count())
        self.stopped = False
        self._graphs = traceable(graphs, fill=fill, rounded=rounded)
        self.bytes = {name: sum(t.nbytes for t in tensors_of(graph)) for name, graph in self._graphs.items()}
        self._memory = MemoryLimit(None if workers else available_memory())
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._number = iter(range(1 << 30))

    def __enter__(self) -> Jobs:
        try:
            # A family in one file, where the weights that its graphs share are written once.
            for file in {self.file(name) for name in self._graphs}:
                members = {name: graph for name, graph in self._graphs.items() if self.file(name) == file}
                torch.save(members, file)  # in a folder of this process alone, gone with it
        except (AttributeError, TypeError) as error:
            raise JobError(
                f"the graphs cannot be handed to another process ({error}): remove hooks and replaced layers from the "
                "model, and compile again"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.stopped = True
            for process in self._running:
                _kill(process)
        self.pool.shutdown(wait=True, cancel_futures=True)

    def file(self, graph: str) -> str:
        """The file that holds a graph, and the others of its family; one that is in no catalogue is by itself."""
        family = CATALOGUE[graph].family if graph in CATALOGUE else graph
        return str(self.scratch / f"{family}.pt")

    def run(self, mode: str, graph: str, bucket: Bucket, environment: Mapping[str, str], **options: Any) -> Result:
        """Run one job to its end, when there is memory for ``graph``.

        Raises:
            JobError: it failed, died or took too long.
        """
        folder = self.scratch / f"{next(self._number)}-{mode}"
        folder.mkdir()
        job = Job(mode, graph, list(bucket), self.file(graph), str(folder), os.getpid(), **options)
        write_json(folder / "job.json", asdict(job))
        with self._memory.taken(_BASE_BYTES + _COPIES * self.bytes[graph]):
            start = time.monotonic()
            status = self._process(folder, environment)
        try:
            data: dict[str, Any] = json.loads((folder / RESULT).read_text())
            problem = data.get("error")
        except OSError:
            data, problem = {}, _death(status, self.timeout)
        if problem:
            spent = status in (None, -signal.SIGKILL)
            raise JobError(f"{mode}: {problem}\n{tail(folder / LOG)}", folder / LOG, spent=spent)
        return Result(folder, data, time.monotonic() - start)

    def _process(self, folder: Path, environment: Mapping[str, str]) -> int | None:
        """The exit status of a worker; None if it was stopped for taking too long."""
        with (folder / LOG).open("wb") as log, self._lock:
            if self.stopped:
                raise JobError("stopped")
            process = subprocess.Popen(
                [sys.executable, "-m", "neuron_xtts.backends.neuron.worker", str(folder / "job.json")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,  # the compiler leaves folders wherever it is started
                env=_environment() | dict(environment),
                start_new_session=True,  # so that the compiler's own processes can be ended with it
            )
            self._running.add(process)
        try:
            return process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill(process)
            with self._lock:
                self._running.discard(process)


@dataclass
class Result:
    """What a job left: its folder, what it said, and the seconds it took."""

    folder: Path
    data: dict[str, Any]
    seconds: float


class MemoryLimit:
    """Lets jobs start while there is memory for them; one may always run.

    Args:
        limit: bytes; None for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._used: list[int] = []
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, needed: int) -> Iterator[None]:
        """Wait until there is room for a job, and hold it."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.limit is None or not self._used or sum(self._used) + needed <= self.limit
            )
            self._used.append(needed)
        try:
            yield
        finally:
            with self._changed:
                self._used.remove(needed)
                self._changed.notify_all()


def _environment() -> dict[str, str]:
    """This process's, with its module path, and with the folder where pip puts neuronx-cc beside Python."""
    return os.environ | {
        "PATH": scripts_on_path(),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _death(status: int | None, timeout: float) -> str:
    if status is None:
        return f"stopped after {timeout:.0f} s; a longer limit: neuron-xtts compile --timeout SECONDS"
    if status == -signal.SIGKILL:
        return "killed, probably for want of memory: fewer jobs at a time (--jobs 1), or more memory"
    if status < 0:
        return f"died of {signal.Signals(-status).name}"
    return f"exited with status {status} and left no result"


def tail(log: Path) -> str:
    """The last lines of a log, set off from what is said around them."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(f"  | {line}" for line in lines[-_TAIL:])


def available_memory() -> int | None:
    """Bytes that the operating system says can be had; None if it does not say."""
    try:
        lines: Iterable[str] = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)
