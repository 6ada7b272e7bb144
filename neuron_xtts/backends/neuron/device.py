"""What there is of AWS Neuron on this machine: packages, driver, devices. Nothing of Neuron is imported to find out.

And how to import it, once it is wanted.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

#: Where the operating system's own files are looked for.
ROOT = Path("/")

#: Families of instances that the compiler has a target for (``neuronx-cc --target``).
TARGETS = ("inf2", "trn1", "trn1n", "trn2")
CORES_PER_DEVICE = {
    "inf2": 2,
    "trn1": 2,
    "trn1n": 2,
    "trn2": 4,
}  # trn2: logical cores of two physical ones, the default

PACKAGES = ("torch-neuronx", "neuronx-cc", "libneuronxla")
INDEX = "https://pip.repos.neuron.amazonaws.com"
#: Versions that go together. Never without them: torch-neuronx asks for no version of neuronx-cc, and the newest
#: torch-neuronx is `NATIVE`. pyproject.toml and constraints/neuron.txt say the same.
VERSIONS = {"torch-neuronx": "2.9.0.2.15.32035", "neuronx-cc": "2.26.6360.0"}
INSTALL = f"pip install --extra-index-url {INDEX} " + " ".join(f"{name}=={v}" for name, v in VERSIONS.items())
#: The oldest versions that are supported.
OLDEST = {"torch-neuronx": Version("2.8"), "neuronx-cc": Version("2.21")}
#: From this version on torch-neuronx is native TorchNeuron: another program, without ``torch_neuronx.trace``.
NATIVE = Version("2.10")
# What PyPI has under the names of the Neuron packages is empty, and of version 1.0.
_STUB = Version("2")
# neuronx-cc from the former on asks for islpy "~=2026.1", but fails with what is newer than the latter: [NCC_ISMP902],
# for nearly every program (github.com/aws-neuron/aws-neuron-sdk/issues/1391).
_NEEDS_ISLPY_SINCE, _ISLPY = Version("2.27"), "2026.1"
#: What helps against it.
ISLPY_REMEDY = f"pip install islpy=={_ISLPY}"

TARGET_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"


@dataclass(frozen=True)
class Neuron:
    """What was found.

    Attributes:
        versions: of the Neuron packages that are installed.
        islpy: version of the compiler's solver; None if it is not installed.
        driver: whether the kernel has Neuron's driver.
        devices: Neuron devices (chips).
        instance: type of the instance, such as ``inf2.xlarge``; None if the machine does not say.
        target: the compiler's name for it; None if there is none.
    """

    versions: dict[str, str]
    islpy: str | None
    driver: bool
    devices: int
    instance: str | None
    target: str | None

    def package_problems(self) -> Iterator[str]:
        """What keeps the packages from compiling or running anything, with the remedy."""
        for package, oldest in OLDEST.items():
            found = self.versions.get(package)
            if found is None:
                yield f"{package} is not installed: {INSTALL}"
            elif Version(found) < _STUB:
                yield (
                    f"{package} {found} is the empty package of that name on PyPI, not AWS's: "
                    f"pip uninstall {package}, then {INSTALL}"
                )
            elif Version(found) < oldest:
                yield f"{package} {found} is too old, {oldest} is needed: {INSTALL}"
            elif package == "torch-neuronx" and Version(found).release >= NATIVE.release:
                yield (
                    f"torch-neuronx {found} is native TorchNeuron, which has no torch_neuronx.trace and runs on "
                    f"Trainium2 and later alone; this library needs the one of PyTorch/XLA: {INSTALL}"
                )

    def compiler_problems(self) -> Iterator[str]:
        """What keeps the compiler that is installed from compiling anything, with the remedy."""
        compiler = Version(self.versions.get("neuronx-cc", "0"))
        needs_old = compiler.release >= _NEEDS_ISLPY_SINCE.release
        if needs_old and self.islpy and Version(self.islpy) >= Version(f"{_ISLPY}.1"):
            yield (
                f"neuronx-cc {compiler} fails with islpy {self.islpy} ([NCC_ISMP902], aws-neuron-sdk#1391): "
                + ISLPY_REMEDY
            )

    def target_problems(self) -> Iterator[str]:
        """What keeps the compiler from knowing what to compile for, with the remedy."""
        if self.target is None:
            yield (
                f"this machine ({self.instance or 'of unknown type'}) is no Neuron instance that is known, so the "
                "compiler needs the name of one: compile(model, target='inf2'), neuron-xtts compile --target inf2, or "
                f"{TARGET_VARIABLE}=inf2"
            )

    def device_problems(self) -> Iterator[str]:
        """What keeps graphs from running here, with the remedy; empty where there is a usable device."""
        if not self.driver:
            yield (
                "Neuron's driver is not loaded (no `neuron` in /proc/devices). On an inf2 or trn instance install "
                "aws-neuronx-dkms; elsewhere graphs can be compiled, not run"
            )
        elif not self.devices:
            yield "Neuron's driver is loaded, but there is no /dev/neuron*: is the device passed to this container?"

    @property
    def there(self) -> bool:
        """Whether there is anything of Neuron at all."""
        return bool(self.versions) or self.driver or self.devices > 0 or self.target is not None

    @property
    def family(self) -> str:
        """Family of the instance, such as ``inf2``; empty if the machine does not say."""
        return (self.instance or "").partition(".")[0]

    @property
    def cores(self) -> int:
        """NeuronCores that this process may use, as NEURON_RT_VISIBLE_CORES and NEURON_RT_NUM_CORES say."""
        there = self.devices * CORES_PER_DEVICE.get(self.target or "", 2)
        if visible := os.environ.get("NEURON_RT_VISIBLE_CORES"):
            return len(_indices(visible))
        return min(there, int(os.environ.get("NEURON_RT_NUM_CORES") or 0) or there)


def find_neuron() -> Neuron:
    """Look for Neuron on this machine."""
    versions = {package: found for package in PACKAGES if (found := installed(package))}
    instance = _read("sys/devices/virtual/dmi/id/product_name").strip() or None
    target = os.environ.get(TARGET_VARIABLE) or (instance or "").partition(".")[0]
    return Neuron(
        versions=versions,
        islpy=installed("islpy"),
        driver=re.search(r"^\s*\d+ neuron$", _read("proc/devices"), re.MULTILINE) is not None,
        devices=sum(re.fullmatch(r"neuron\d+", path.name) is not None for path in ROOT.glob("dev/neuron*")),
        instance=instance,
        target=target if target in TARGETS else None,
    )


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def scripts_on_path() -> str:
    """PATH, with the folder in front where pip puts programs beside the interpreter: neuronx-cc, libneuronpjrt-path."""
    path = os.environ.get("PATH", os.defpath)
    if not sys.executable:  # Python is part of another program
        return path
    scripts = str(Path(sys.executable).parent)
    return os.pathsep.join([scripts, *(folder for folder in path.split(os.pathsep) if folder != scripts)])


def import_module(name: str) -> Any:
    """Import a module that torch-neuronx brings or takes part in, such as ``torch_neuronx`` or ``torch_xla``.

    It runs a program of its environment, which a service or a container that starts the environment's Python by its
    path does not have on PATH.
    """
    os.environ["PATH"] = scripts_on_path()
    return importlib.import_module(name)


def _read(path: str) -> str:
    try:
        return (ROOT / path).read_text()
    except OSError:
        return ""


def _indices(text: str) -> list[int]:
    """The numbers that ``0``, ``0-3`` or ``0,2`` stand for."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
