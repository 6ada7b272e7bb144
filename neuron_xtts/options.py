"""The options of `patch` and `compile`: checked before anything is touched, and turned into a backend."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TypedDict

from neuron_xtts.backends import Backend
from neuron_xtts.backends.neuron.device import TARGETS, Neuron, find_neuron
from neuron_xtts.backends.neuron.store import Recipe, Store
from neuron_xtts.buckets import BucketPlan
from neuron_xtts.coqui.sample import Sample
from neuron_xtts.coqui.surface import Networks
from neuron_xtts.coqui.weights import Digester
from neuron_xtts.errors import NeuronMissingError
from neuron_xtts.graphs.operators import Graph
from neuron_xtts.precision import HOST, HOST_PRECISIONS, NEURON_PRECISIONS, Precision

logger = logging.getLogger(__name__)

#: How many voices `patch` remembers unless told otherwise; each takes about 130 KB. A choice of ours.
VOICES = 16

#: How many calls may wait unless told otherwise: four batches of the host's. A choice of ours.
QUEUE = 64


class PatchOptions(TypedDict, total=False):
    """Keyword arguments of `neuron_xtts.patch` that say where and how graphs run; they are described there."""

    backend: str
    precision: str | Precision
    buckets: BucketPlan | None
    store: str | os.PathLike[str] | None


@dataclass(frozen=True)
class Options:
    """Options that have been checked.

    Attributes:
        neuron: what there is of Neuron; None if graphs run on the host.
        cores: the NeuronCores to run on; of no meaning on the host.
        precision: of the graphs.
        plan: the buckets the user asked for; None for the backend's default.
        store: of compiled graphs.
    """

    neuron: Neuron | None
    cores: tuple[int, ...]
    precision: Precision
    plan: BucketPlan | None
    store: Store

    @classmethod
    def make(
        cls,
        backend: str,
        precision: str | Precision,
        buckets: BucketPlan | None,
        store: str | os.PathLike[str] | None,
        *,
        to_run: bool,
        target: str | None = None,
    ) -> Options:
        """Check the options of `patch` (``to_run``) or `compile`; they and the errors are described there."""
        name = re.fullmatch(r"(auto|cpu|neuron)(?::(\d+)(?:-(\d+))?)?", backend)
        first = int(name[2] or 0) if name else 0
        cores = range(first, int(name[3] or first) + 1) if name else ()
        if name is None or (name[2] and name[1] != "neuron") or not cores:
            raise ValueError(
                f"backend={backend!r} does not exist; choose one of 'auto', 'cpu', 'neuron', 'neuron:N', or "
                "'neuron:N-M' for several NeuronCores, N the first of them"
            )
        if target is not None and target not in TARGETS:
            raise ValueError(f"target={target!r} does not exist; choose one of {', '.join(map(repr, TARGETS))}")
        if buckets is not None and not isinstance(buckets, BucketPlan):
            raise TypeError(f"buckets must be a neuron_xtts.BucketPlan or None, got a {type(buckets).__name__}")
        neuron = None if name[1] == "cpu" else _neuron(backend, target, to_run)
        if neuron is not None:
            _check_neuron(neuron, backend, cores[-1], buckets, to_run)
        known = HOST_PRECISIONS if neuron is None else NEURON_PRECISIONS
        chosen = precision if isinstance(precision, str) else precision.name
        if chosen not in known:
            where = "the host" if neuron is None else "Neuron"
            raise ValueError(f"precision={chosen!r} does not exist on {where}; choose one of {_list(known)}")
        if neuron is None:
            check_host_precision(chosen)
        if isinstance(precision, str):
            precision = Precision(precision)
        if precision.release and (neuron is not None or HOST[chosen].linears == "fp32"):
            where = "on the host" if neuron is None else "on Neuron"
            raise ValueError(
                f"Precision has release=True, but {chosen!r} {where} converts no weights that could be released; "
                "leave it out, or choose another precision on the host"
            )
        return cls(neuron, tuple(cores) if to_run else (), precision, buckets, Store(store))

    @property
    def static_plan(self) -> BucketPlan:
        """The buckets on Neuron."""
        return self.plan or BucketPlan.static()

    def recipes(self, graphs: Mapping[str, Graph], digester: Digester | None = None) -> list[Recipe]:
        """What the artifacts of graphs on Neuron are made by, one recipe for each graph and bucket.

        Args:
            graphs: by name, as `make_graphs` makes them.
            digester: of the weights; by default one of its own.
        """
        from neuron_xtts.backends.neuron.compiler import make_recipes

        assert self.neuron is not None
        return make_recipes(graphs, self.static_plan, self.precision, self.neuron, digester or Digester())

    def make_backends(self, networks: Networks, graphs: Mapping[str, Graph]) -> list[Backend]:
        """The backends of a model, one for each core, with its graphs loaded."""
        if self.neuron is None:
            from neuron_xtts.backends.host.backend import CpuBackend

            aside = self.store.root / "aside" if self.precision.release else None
            return [CpuBackend(graphs, self.plan, HOST[self.precision.name], aside, Sample(networks))]
        from neuron_xtts.backends.neuron.backend import NeuronBackend

        recipes = self.recipes(graphs)
        return [
            NeuronBackend(
                graphs,
                self.static_plan,
                recipes,
                precision=self.precision,
                store=self.store,
                core=core,
                machine=self.neuron.instance,
            )
            for core in self.cores
        ]


def check_host_precision(name: str) -> None:
    """Raise ValueError if this machine has no kernels for a precision of the host."""
    import torch

    if HOST[name].linears != "fp32" and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ValueError(
            f"precision={name!r} needs FBGEMM, which torch has for x86 CPUs with AVX2; this one has "
            f"{', '.join(torch.backends.quantized.supported_engines)}. Choose 'fp32'"
        )


def _neuron(backend: str, target: str | None, to_run: bool) -> Neuron | None:
    """What there is of Neuron, if it can be used; None where ``"auto"`` means the host."""
    neuron = find_neuron()
    neuron = replace(neuron, target=target or neuron.target)
    packages = list(neuron.package_problems())
    problems = [*packages, *(neuron.device_problems() if to_run else neuron.compiler_problems())]
    problems = problems or list(neuron.target_problems())
    if not problems:
        return neuron
    # With Neuron's packages here, compile() must not take what is wrong with them for a wish to stay on the host.
    if backend != "auto" or not (packages or to_run):
        raise NeuronMissingError(f"backend={backend!r}: " + "; ".join(problems))
    if neuron.there:
        logger.warning("Neuron cannot be used, graphs run on the host: %s", "; ".join(problems))
    return None


def _check_neuron(neuron: Neuron, backend: str, last: int, buckets: BucketPlan | None, to_run: bool) -> None:
    if to_run and last >= neuron.cores:
        raise ValueError(f"backend={backend!r}: this process may use {neuron.cores} NeuronCores, counted from 0")
    exact = [field.name for field in fields(BucketPlan) if buckets and getattr(buckets, field.name) is None]
    if exact:
        raise ValueError(
            f"BucketPlan.{exact[0]} is None, which means exact shapes; compiled graphs need sizes. Start from "
            f"BucketPlan.static(), such as dataclasses.replace(BucketPlan.static(), decode=(512,)), or () for no graph"
        )


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
