"""The host that the double believes to run on: driver, devices, cores, and what goes wrong with them."""

from __future__ import annotations

import fcntl
import os
import re
import time
from pathlib import Path

# The real package reads it when it is imported; setting it later has no effect.
TARGET_OVERRIDE = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "")

# Items of NEURON_DOUBLE_FAULT, separated by commas: ``name`` or ``name:argument``. The tag of a program is the last
# component of its compiler_workdir; the argument is a part of the tag, and without one all programs are meant.
FAULTS = {
    # while compiling
    "crash": "the process dies",
    "fail": "the compiler fails",
    "islpy": "the compiler fails as with an islpy that it does not go with",
    "killed": "the compiler runs out of memory",
    "hang": "the compiler takes an hour",
    "alone": "while another process compiles, the runtime says that it has the cores",
    "miscompile": "products and convolutions come out slightly wrong",
    # while executing; busy and oom when a program is first loaded
    "nan": "all floating-point outputs, aliased ones included, are NaN",
    "busy": "another process has the cores",
    "oom": "the device has no memory left",
    "frozen": "what is written into states after they were loaded reaches nothing",
    "once": "only the first write into a state is seen, and none after it",
    "unaliased": "all outputs come to the host, those that are states too",
    "exec": "exec@K: the K-th execution, from 0, of all programs with that tag in this process fails",
}

# Cores as the runtime counts them: on trn2 two physical ones make a logical one.
_CORES = {"inf2": 2, "trn1": 2, "trn1n": 2, "trn2": 4}


def faults(tag: str) -> dict[str, list[tuple[int, str]]]:
    """Faults that strike a program, by name; each with its number K and its argument."""
    found: dict[str, list[tuple[int, str]]] = {}
    for item in filter(None, os.environ.get("NEURON_DOUBLE_FAULT", "").split(",")):
        head, _, argument = item.strip().partition(":")
        name, _, number = head.partition("@")
        if name not in FAULTS or (name == "exec") != number.isdecimal():
            raise ValueError(f"NEURON_DOUBLE_FAULT: no such fault: {item!r}")
        if argument in tag:
            found.setdefault(name, []).append((int(number or 0), argument))
    return found


def driver() -> bool:
    """Whether the driver is loaded."""
    devices = _read("proc/devices")
    return any(line.split()[1:] == ["neuron"] for line in devices.splitlines())


def target() -> str:
    """The compiler's name for this machine."""
    return _read("sys/devices/virtual/dmi/id/product_name").strip().partition(".")[0]


def _read(path: str) -> str:
    file = Path(_root() or os.devnull, path)
    return file.read_text() if _root() and file.exists() else ""


def _root() -> str:
    return os.environ.get("NEURON_DOUBLE_ROOT", "")


def _devices() -> list[Path]:
    found = Path(_root(), "dev").glob("neuron*") if _root() else []
    return sorted(path for path in found if re.fullmatch(r"neuron\d+", path.name))


class Runtime:
    """The Neuron runtime of this process.

    It starts with the first use and takes its cores from all other processes until it stops. The variables that
    choose the cores are read then, and only then.
    """

    def __init__(self) -> None:
        self._root = ""
        self._pid = 0
        self._cores: list[int] = []
        self._files: dict[Path, int] = {}

    def start(self) -> list[int]:
        """Start unless started.

        Returns:
            the cores of this process.

        Raises:
            RuntimeError: there is no driver or device, cores are taken, or the process was forked from one that runs.
        """
        if self._cores and self._pid != os.getpid():
            raise RuntimeError("Incompatible runtime state: NRT_STATE_CHILD")
        if self._cores and self._root == _root():
            return self._cores
        self.stop()
        if not driver() or not _devices():
            raise RuntimeError(
                "The PyTorch Neuron Runtime could not be initialized. Neuron Driver issues are logged to your system "
                "logs. See the Neuron Runtime's troubleshooting guide for help on this topic"
            )
        self._cores, self._pid, self._root = self._allocate(), os.getpid(), _root()
        return self._cores

    def alone(self) -> None:
        """Raise RuntimeError unless no other process compiles; from now on this one does, until it ends."""
        file = os.open(Path(os.environ["NEURON_DOUBLE_ALONE"]), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise not_available("1", 0) from None
        time.sleep(1)  # long enough to be met

    def stop(self) -> None:
        """Give the cores back."""
        for file in self._files.values():
            os.close(file)
        self._cores, self._files = [], {}

    def _allocate(self) -> list[int]:
        total = len(_devices()) * _CORES.get(target(), 2)
        wanted = os.environ.get("NEURON_RT_VISIBLE_CORES", "")
        if wanted:
            cores = _parse_cores(wanted)
            taken = [core for core in cores if core < total and self._take(core)]
            requested = f"nc{cores[0]}-nc{cores[-1]}"
        else:
            number = int(os.environ.get("NEURON_RT_NUM_CORES", "0")) or total
            taken = []
            for core in range(total):
                if len(taken) < number and self._take(core):
                    taken.append(core)
            cores, requested = list(range(number)), str(number)
        if len(taken) < len(cores):
            self.stop()
            raise not_available(requested, len(taken))
        return taken

    def _take(self, core: int) -> bool:
        """Lock a core's byte in the file of its device: for one process at a time, and until that process ends."""
        device, byte = divmod(core, _CORES.get(target(), 2))
        path = _devices()[device]
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDWR)
        try:
            fcntl.lockf(self._files[path], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError:
            return False
        return True


def not_available(requested: str, available: int) -> RuntimeError:
    """What the runtime says when the cores belong to another process."""
    return RuntimeError(
        "The PyTorch Neuron Runtime could not be initialized. NRT:nrt_allocate_neuron_cores Logical Neuron Core(s) "
        f"not available - NeuronCore(s) not available - Requested:{requested} Available:{available}"
    )


def _parse_cores(text: str) -> list[int]:
    """Of a number, or a range such as 0-1."""
    if not re.fullmatch(r"\d+(-\d+)?", text):
        raise RuntimeError(f"NEURON_RT_VISIBLE_CORES={text} is neither a NeuronCore nor a range of them")
    first, _, last = text.partition("-")
    cores = list(range(int(first), int(last or first) + 1))
    if not cores:
        raise RuntimeError(f"NEURON_RT_VISIBLE_CORES={text} is an empty range")
    return cores


runtime = Runtime()
