"""The store: a folder of artifacts, each one compiled graph with a manifest. It holds no pickles.

An artifact's folder is made elsewhere and renamed into place, so that it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from neuron_xtts.buckets import Bucket, bucket_name
from neuron_xtts.coqui.weights import file_digest
from neuron_xtts.errors import ArtifactError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "NEURON_XTTS_CACHE"
#: Rises when artifacts that this version makes could not be used by the one before, or the reverse.
SCHEMA = 1

MODEL = "model.pt"
MANIFEST = "manifest.json"
LOG = "compiler.log"
_BROKEN = ".broken"  # ends the name of an artifact that was set aside


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a compiled graph computes. Two recipes are equal exactly if their keys are.

    Attributes:
        graph: its name.
        bucket: its sizes.
        room: the size of its state, or the steps of a call, where the bucket does not say it.
        source: digest of the code that the graph is made by.
        inputs: name, dtype and shape of each.
        states: how many of its outputs are kept on the device as its state.
        weights: digest of the weights, which are part of the program.
        precision: by name.
        arguments: of the compiler.
        target: of the compiler.
        versions: of torch, torch-neuronx and neuronx-cc.
    """

    graph: str
    bucket: Bucket
    room: Bucket
    source: str
    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    states: int
    weights: str
    precision: str
    arguments: tuple[str, ...]
    target: str
    versions: dict[str, str]

    @property
    def key(self) -> str:
        """SHA-256 of all of it and of the schema's version."""
        return hashlib.sha256(json.dumps([SCHEMA, asdict(self)], sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The artifact's folder."""
        return f"{self.graph}-{bucket_name(self.bucket)}-{self.key[:20]}"

    @property
    def sizes(self) -> Bucket:
        """All that `Graph.in_bucket` takes."""
        return (*self.bucket, *self.room)

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Recipe:
        """The reverse of `plain`."""
        inputs = tuple((name, dtype, tuple(shape)) for name, dtype, shape in data["inputs"])
        sequences = {name: tuple(data[name]) for name in ("bucket", "room", "arguments")}
        return cls(**{**data, **sequences, "inputs": inputs})

    def plain(self) -> dict[str, Any]:
        """The recipe as JSON would return it."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data


@dataclass
class Artifact:
    """One compiled graph in the store.

    Attributes:
        folder: where it is.
        manifest: what it says of itself: ``recipe``, ``checksum``, ``bytes``, ``created``, ``seconds``,
            ``verification`` (None until it has run on a device) and ``quarantined`` (None or the reason).
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def model(self) -> Path:
        """The file that ``torch.jit.load`` takes."""
        return self.folder / MODEL

    @property
    def quarantined(self) -> str | None:
        """Why it must not be used, if so."""
        reason: str | None = self.manifest["quarantined"]
        return reason

    def check(self) -> None:
        """Raise `ArtifactError` unless the file is the one that was compiled; one that is not is set aside."""
        try:
            found = file_digest(self.model)
        except FileNotFoundError:
            found = "none"
        except OSError as error:
            raise ArtifactError(f"artifact {self.folder.name} cannot be read: {error}") from error
        if found != self.manifest["checksum"]:
            self.set_aside()
            raise ArtifactError(f"artifact {self.folder.name} is corrupt: its checksum is not that of its manifest")

    def record(self, **changes: object) -> None:
        """Change the manifest, at once or not at all; a store that cannot be written stays as it is."""
        self.manifest |= changes
        try:
            write_json(self.folder / MANIFEST, self.manifest)
        except OSError as error:
            logger.warning("%s could not be updated: %s", self.folder / MANIFEST, error)

    def set_aside(self) -> None:
        """Rename the folder, so that the next `compile` makes the artifact again."""
        with suppress(OSError):
            shutil.rmtree(self.folder.with_name(self.folder.name + _BROKEN), ignore_errors=True)
            self.folder.rename(self.folder.with_name(self.folder.name + _BROKEN))


class Store:
    """A folder of artifacts.

    Args:
        root: the folder; by default what NEURON_XTTS_CACHE names, else the user's cache folder.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        root = root or os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_path("neuron_xtts", False)
        self.root = Path(root).expanduser().absolute()

    def find(self, recipe: Recipe) -> Artifact | None:
        """The artifact of a recipe, quarantined or not; None if there is none, or none that can be read."""
        artifact = _read(self.root / recipe.name)
        # The folder's name holds a part of the key; the manifest holds the recipe.
        return artifact if artifact and artifact.manifest["recipe"] == recipe.plain() else None

    def explain(self, recipe: Recipe) -> str:
        """Why there is no artifact of a recipe: in what the most similar one that is there differs."""
        wanted = recipe.plain()
        differences = []
        for artifact in self:
            found = artifact.manifest["recipe"]
            if (found["graph"], found["bucket"]) == (wanted["graph"], wanted["bucket"]):
                differences.append([name for name in wanted if found.get(name) != wanted[name]])
        if not differences:
            return "not compiled"
        names = {
            "weights": "weights changed",
            "source": "another version of neuron_xtts",
            "versions": "other versions",
            "room": "decode buckets of other sizes, or other steps",
        }
        nearest = min(differences, key=len)
        return "compiled for something else: " + ", ".join(names.get(name, f"another {name}") for name in nearest)

    def publish(self, folder: Path, recipe: Recipe, **facts: object) -> Artifact:
        """Make an artifact of a folder that holds its `MODEL`, and put it in place.

        Args:
            folder: made in `scratch`. It is moved.
            recipe: what it was made by.
            facts: for the manifest.
        """
        model = folder / MODEL
        manifest = {
            "schema": SCHEMA,
            "recipe": recipe.plain(),
            "checksum": file_digest(model),
            "bytes": model.stat().st_size,
            "verification": None,
            "quarantined": None,
            **facts,
        }
        write_json(folder / MANIFEST, manifest)
        place = self.root / recipe.name
        if place.exists():  # one that cannot be read: `find` did not know it
            Artifact(place, {}).set_aside()
        folder.rename(place)
        return Artifact(place, manifest)

    def lock(self, recipe: Recipe) -> FileLock:
        """Held while an artifact is made. The operating system releases it if the process dies."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{recipe.key[:20]}.lock")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for half-made things, on the store's own file system, removed at the end."""
        parent = self.root / "scratch"
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent))
        try:
            with FileLock(folder / "lock"):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def __iter__(self) -> Iterator[Artifact]:
        """Every artifact whose manifest can be read, by name."""
        for folder in self._folders():
            if not folder.name.endswith(_BROKEN) and (artifact := _read(folder)):
                yield artifact

    def leftovers(self) -> Iterator[Path]:
        """Folders that nothing will ever read: set aside, without a manifest, or of a process that is gone."""
        for folder in self._folders():
            if folder.name.endswith(_BROKEN) or _read(folder) is None:
                yield folder
        for folder in sorted((self.root / "scratch").glob("*")):
            try:
                FileLock(folder / "lock", timeout=0).acquire().lock.release()
            except Timeout:
                continue
            yield folder

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.root.glob("*-*-*") if path.is_dir())


def write_json(path: Path, data: object) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(data, file, indent=2)
    os.chmod(file.name, 0o644)  # a store may be shared; temporary files are their owner's alone
    os.replace(file.name, path)


def _read(folder: Path) -> Artifact | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["schema"] != SCHEMA:
            return None
        known = {"recipe", "checksum", "bytes", "verification", "quarantined"} <= manifest.keys()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Artifact(folder, manifest) if known else None
