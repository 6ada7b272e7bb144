"""What a store holds: listed, checked, and rid of what cannot be used."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_xtts.backends.neuron.device import find_neuron
from neuron_xtts.backends.neuron.source import source_digest
from neuron_xtts.backends.neuron.store import Artifact, Store
from neuron_xtts.buckets import bucket_name
from neuron_xtts.errors import ArtifactError
from neuron_xtts.graphs.catalogue import CATALOGUE
from neuron_xtts.precision import has_small_kernel_defect
from neuron_xtts.tables import table


@dataclass(frozen=True)
class Item:
    """An artifact, and what was found when it was checked.

    Attributes:
        artifact: the artifact, where it was when it was found.
        fault: what is wrong with its file; None if that was not looked for, or nothing is.
    """

    artifact: Artifact
    fault: str | None = None

    @property
    def state(self) -> str:
        """Whether it can be used, in words."""
        verified = "verified" if self.artifact.manifest["verification"] else "not verified yet"
        return self.fault or self.artifact.quarantined or verified

    def to_dict(self) -> dict[str, Any]:
        """The manifest, with ``folder`` and ``state``, fit for JSON."""
        return self.artifact.manifest | {"folder": str(self.artifact.folder), "state": self.state}

    def row(self) -> tuple[str, ...]:
        """The line of a table."""
        recipe = self.artifact.manifest["recipe"]
        return (
            recipe["graph"],
            bucket_name(recipe["bucket"]),
            recipe["precision"],
            recipe["target"],
            recipe["versions"]["neuronx-cc"],
            recipe["weights"][:8],
            f"{self.artifact.manifest['bytes'] / 1e6:.1f}",
            self.state,
        )


def take_inventory(store: Store, *, verify: bool) -> list[Item]:
    """Every artifact of a store; with ``verify`` each file is checked, and set aside if it is corrupt."""
    return [Item(artifact, _fault(artifact) if verify else None) for artifact in store]


def _fault(artifact: Artifact) -> str | None:
    try:
        artifact.check()
    except ArtifactError as error:
        return str(error)
    return None


def listing(store: Store, items: Sequence[Item]) -> str:
    """A headline and a table of the artifacts of a store."""
    header = ("graph", "bucket", "precision", "target", "neuronx-cc", "weights", "MB", "state")
    size = sum(item.artifact.manifest["bytes"] for item in items)
    headline = f"{store.root}: {len(items)} artifacts, {size / 1e9:.2f} GB"
    return f"{headline}\n\n{table(header, [item.row() for item in items])}"


def unusable(store: Store, *, stale: bool) -> list[Path]:
    """Folders of a store that nothing can use; with ``stale`` also what other versions made."""
    is_stale = _stale_here() if stale else lambda recipe: False
    folders = list(store.leftovers())
    folders += [a.folder for a in store if a.quarantined or is_stale(a.manifest["recipe"])]
    return folders


def _stale_here() -> Callable[[Mapping[str, Any]], bool]:
    """Whether a recipe is of another version of this library, or of Neuron packages that are not installed here."""
    installed = find_neuron().versions
    fill = has_small_kernel_defect(installed.get("neuronx-cc", "0"))
    sources = {name: source_digest(name, fill=fill) for name in CATALOGUE}

    def is_stale(recipe: Mapping[str, Any]) -> bool:
        made_with = {name: recipe["versions"][name] for name in ("torch-neuronx", "neuronx-cc")}
        return bool(
            recipe["source"] != sources.get(recipe["graph"])
            or any(installed.get(name) != version for name, version in made_with.items())
        )

    return is_stale


def remove(folder: Path) -> int:
    """Remove a folder; returns the bytes that its files took."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    return size
