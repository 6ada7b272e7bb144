"""Make a folder look like a site-packages with the Neuron SDK, and another like a machine with or without devices.

The packages are test doubles, see ``double/torch_neuronx``. To use them, put the folder on ``sys.path`` or PYTHONPATH
and name the machine in NEURON_DOUBLE_ROOT; `environment` does both for a new process.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuron_xtts.backends.neuron import device

_DOUBLES = Path(__file__).parent / "double"
_IMPORTED = ("torch_neuronx", "neuronxcc", "libneuronxla")


def install(
    site: Path,
    *,
    torch_neuronx: str | None = "2.9.0.2.15.32035",
    neuronx_cc: str | None = "2.26.6360.0",
    libneuronxla: str | None = "2.2.17544.0",
    islpy: str | None = None,
) -> None:
    """Install the doubles.

    Args:
        site: the folder, made if need be. What was installed there before is replaced.
        torch_neuronx: version; None leaves the package out, and 1.0 makes the empty stub of PyPI. So do the others.
            From 2.10 on it is native TorchNeuron, without ``trace``.
        neuronx_cc: version of the compiler, which the double of ``torch_neuronx`` goes by.
        libneuronxla: version of the PJRT plugin, without which the double cannot be imported.
        islpy: version of the compiler's solver.
    """
    site.mkdir(parents=True, exist_ok=True)
    _install(site, "torch-neuronx", "torch_neuronx", torch_neuronx)
    _install(site, "neuronx-cc", "neuronxcc", neuronx_cc)
    _install(site, "libneuronxla", "libneuronxla", libneuronxla)
    _install(site, "islpy", "islpy", islpy)
    importlib.invalidate_caches()


def _install(site: Path, distribution: str, package: str, version: str | None) -> None:
    _remove(site, distribution, package)
    if version is None:
        return
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "RECORD").write_text("")
    stub = version.split(".")[:2] == ["1", "0"]
    native = package == "torch_neuronx" and tuple(map(int, version.split(".")[:2])) >= (2, 10)
    if not stub and not native and (_DOUBLES / package).exists():
        (site / package).symlink_to(_DOUBLES / package, target_is_directory=True)
        return
    (site / package).mkdir()
    (site / package / "__init__.py").write_text("" if stub else f"__version__ = {version!r}\n")


def _remove(site: Path, distribution: str, package: str) -> None:
    """Only what `_install` makes: a link, or a folder of plain files."""
    if (site / package).is_symlink():
        (site / package).unlink()
    folders = [*site.glob(f"{distribution.replace('-', '_')}-*.dist-info"), site / package]
    for folder in filter(Path.is_dir, folders):
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()


def spoil_frontend(site: Path) -> None:
    """Have processes die that import torch_xla to lower on the host: its import would start Neuron's runtime."""
    (site / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch_xla':\n"
        "            os.abort()\n"
        "if os.environ.get('PJRT_DEVICE') == 'CPU':\n"
        "    sys.meta_path.insert(0, Finder())\n"
    )


def machine(root: Path, *, instance: str = "inf2.xlarge", devices: int = 1, driver: bool = True) -> None:
    """Make the parts of a file system in which a program looks for Neuron devices.

    Args:
        root: its root, made if need be. Devices of an earlier call disappear.
        instance: type of the EC2 instance.
        devices: number of Neuron devices.
        driver: whether the driver is loaded; without it, there are no devices either.
    """
    for folder in ("proc", "dev", "sys/devices/virtual/dmi/id"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    lines = ["Character devices:", "  1 mem", *(["239 neuron"] if driver else []), "", "Block devices:", "259 blkext"]
    (root / "proc/devices").write_text("\n".join(lines) + "\n")
    (root / "sys/devices/virtual/dmi/id/product_name").write_text(f"{instance}\n")
    for file in (root / "dev").glob("neuron*"):
        file.unlink()
    for number in range(devices if driver else 0):
        (root / f"dev/neuron{number}").touch()


def environment(site: Path, root: Path | None = None, **variables: str) -> dict[str, str]:
    """Of a new process in which the doubles are installed.

    Args:
        site: folder of `install`.
        root: folder of `machine`; None is a host without a driver.
        variables: others to set. Those of this process that concern Neuron are left out.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NEURON_")}
    path = os.pathsep.join(filter(None, [str(site), inherited.get("PYTHONPATH", "")]))
    machine = {"NEURON_DOUBLE_ROOT": str(root)} if root else {}
    return {**inherited, "PYTHONPATH": path, **machine, **variables}


def forget() -> None:
    """Let the next import of the doubles start afresh, as it does in a new process."""
    if runtime := sys.modules.get("torch_neuronx._machine"):
        runtime.runtime.stop()  # or this process would keep the cores
    for name in list(sys.modules):
        if name.partition(".")[0] in _IMPORTED:
            del sys.modules[name]
    importlib.invalidate_caches()


def on_neuron(folder: Path, monkeypatch: Any) -> Iterator[Path]:
    """Have this process be on a machine: the packages in ``site``, its file system in ``root``, until it is resumed."""
    for name in [name for name in os.environ if name.startswith("NEURON_")]:
        monkeypatch.delenv(name)
    monkeypatch.syspath_prepend(folder / "site")
    monkeypatch.setenv("NEURON_DOUBLE_ROOT", str(folder / "root"))
    monkeypatch.setattr(device, "ROOT", folder / "root")
    yield folder
    forget()
