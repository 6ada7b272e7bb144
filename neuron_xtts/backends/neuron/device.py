"""What there is of AWS Neuron on this machine: packages, driver, devices. Nothing of Neuron is imported to find out."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
INSTALL = f"pip install --extra-index-url {INDEX} torch-neuronx neuronx-cc"
#: The oldest versions that are supported. pyproject.toml says the same.
OLDEST = {"torch-neuronx": Version("2.8"), "neuronx-cc": Version("2.21")}
# What PyPI has under the names of the Neuron packages is empty, and of version 1.0.
_STUB = Version("2")

TARGET_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"


@dataclass(frozen=True)
class Neuron:
    """What was found.

    Attributes:
        versions: of the Neuron packages that are installed.
        driver: whether the kernel has Neuron's driver.
        devices: Neuron devices (chips).
        instance: type of the instance, such as ``inf2.xlarge``; None if the machine does not say.
        target: the compiler's name for it; None if there is none.
    """

    versions: dict[str, str]
    driver: bool
    devices: int
    instance: str | None
    target: str | None

    def package_problems(self) -> Iterator[str]:
        """What keeps the packages from compiling or running anything, with the remedy."""
        for package, oldest in OLDEST.items():
            installed = self.versions.get(package)
            if installed is None:
                yield f"{package} is not installed: {INSTALL}"
            elif Version(installed) < _STUB:
                yield (
                    f"{package} {installed} is the empty package of that name on PyPI, not AWS's: "
                    f"pip uninstall {package}, then {INSTALL}"
                )
            elif Version(installed) < oldest:
                yield f"{package} {installed} is too old, {oldest} is needed: {INSTALL}"

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
    def cores(self) -> int:
        """NeuronCores that this process may use, as NEURON_RT_VISIBLE_CORES and NEURON_RT_NUM_CORES say."""
        there = self.devices * CORES_PER_DEVICE.get(self.target or "", 2)
        if visible := os.environ.get("NEURON_RT_VISIBLE_CORES"):
            return len(_indices(visible))
        return min(there, int(os.environ.get("NEURON_RT_NUM_CORES") or 0) or there)


def find_neuron() -> Neuron:
    """Look for Neuron on this machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    instance = _read("sys/devices/virtual/dmi/id/product_name").strip() or None
    target = os.environ.get(TARGET_VARIABLE) or (instance or "").partition(".")[0]
    return Neuron(
        versions=versions,
        driver=re.search(r"^\s*\d+ neuron$", _read("proc/devices"), re.MULTILINE) is not None,
        devices=sum(re.fullmatch(r"neuron\d+", path.name) is not None for path in ROOT.glob("dev/neuron*")),
        instance=instance,
        target=target if target in TARGETS else None,
    )


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
