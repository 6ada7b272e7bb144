"""Sdist and wheel: what is in them, and what the wheel does where its source is not."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import neuron_xtts

ROOT = Path(__file__).parents[2]
_GENERATED = ("build", "demo", "dist", "site")


def run(*command, cwd):
    """Run a command as a user does, who has no PYTHONPATH; returns its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def files(folder):
    """What a folder of the checkout holds, named from the checkout on."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@dataclass
class Distribution:
    """The sdist and the wheel, and the names in them; those of the sdist without its folder."""

    sdist: Path
    wheel: Path

    @property
    def in_sdist(self):
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    @property
    def in_wheel(self):
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())


@pytest.fixture(scope="session")
def distribution(tmp_path_factory):
    """A build leaves files beside the source, so the source is a copy; the wheel is made of the sdist."""

    def generated(folder, names):
        root = Path(folder) == ROOT
        return {
            name
            for name in names
            if name.endswith((".egg-info", "__pycache__")) or (root and (name[0] == "." or name in _GENERATED))
        }

    folder = tmp_path_factory.mktemp("distribution")
    source = shutil.copytree(ROOT, folder / "source", ignore=generated)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return Distribution(sdist, wheel)


@pytest.fixture(scope="session")
def installed(distribution, tmp_path_factory):
    """A virtual environment with the wheel, where its dependencies are those of this one.

    They come from a plain path, in which Python does not look for ``.pth`` files: an editable install is not followed.
    """
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    here = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    there = [path for path in sys.path if path.endswith("site-packages")]
    (here / "dependencies.pth").write_text("\n".join(there) + "\n")
    # The metadata of an editable install is in there, too; --ignore-installed lets it be.
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", "--ignore-installed", distribution.wheel, cwd=folder)
    return folder


def test_metadata(distribution, tmp_path):
    """What a package index asks for, its readme too."""
    version = neuron_xtts.__version__
    assert distribution.sdist.name == f"neuron_xtts-{version}.tar.gz"
    assert distribution.wheel.name == f"neuron_xtts-{version}-py3-none-any.whl"
    run(sys.executable, "-m", "twine", "check", "--strict", distribution.sdist, distribution.wheel, cwd=tmp_path)


def test_the_wheel_holds_the_package_and_nothing_else(distribution):
    names = distribution.in_wheel
    info = {name for name in names if name.startswith(f"neuron_xtts-{neuron_xtts.__version__}.dist-info/")}
    package = files("neuron_xtts")
    assert {"neuron_xtts/__init__.py", "neuron_xtts/py.typed"} < package
    assert {Path(name).suffix for name in package} == {".py", ".typed", ".js"}
    assert names - info == package
    assert {Path(name).name for name in info} >= {"METADATA", "RECORD", "LICENSE", "entry_points.txt"}


def test_the_sdist_holds_what_builds_and_tests_it(distribution):
    rooms = ("neuron_xtts", "tests", "docs", "examples", "experiments", "constraints", "miniature")
    whole = set().union(*map(files, rooms))
    assert distribution.in_sdist >= whole | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "mkdocs.yml"}
    assert not [name for name in distribution.in_sdist if "__pycache__" in name]


IMPORT_ALL = """
import importlib, pkgutil, neuron_xtts
print(neuron_xtts.__file__)
for module in pkgutil.walk_packages(neuron_xtts.__path__, "neuron_xtts."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
"""


def test_every_module_of_the_wheel_imports(distribution, installed, tmp_path):
    file, *modules = run(installed / "venv/bin/python", "-c", IMPORT_ALL, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(installed / "venv")
    expected = {name.removesuffix(".py").removesuffix("/__init__") for name in files("neuron_xtts") if ".py" in name}
    expected = {name.replace("/", ".") for name in expected if not name.endswith(("__main__", "py.typed"))}
    assert {"neuron_xtts", *modules} == expected


def test_the_installed_command(installed, tmp_path):
    command = installed / "venv/bin/neuron-xtts"
    out = run(command, "doctor", "--store", tmp_path / "store", cwd=tmp_path)
    assert f"neuron_xtts {neuron_xtts.__version__}, Python " in out
    assert "no problems found" in out
