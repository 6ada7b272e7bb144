"""Arguments that several commands of ``neuron-xtts`` have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from neuron_xtts.buckets import BucketPlan

_MOST = 2**31  # of whatever is counted: what takes numbers does not take any

# `argparse._ActionsContainer` is a parser, or a group of one.


def add_model(container: argparse._ActionsContainer, small: str = "a small model, for a quick look") -> None:
    """Which model: a checkpoint, or a small one with random weights."""
    container.add_argument("--checkpoint", type=Path, metavar="DIR", help="a real XTTS v2 checkpoint")
    container.add_argument("--small", action="store_true", help=small)


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The store, and the sizes of the bucket plan."""
    parser.add_argument("--store", type=Path, metavar="DIR", help="of compiled graphs (default: the user's cache)")
    parser.add_argument(
        "--sizes", type=sizes, action="append", default=[], metavar="FIELD=N,N",
        help="of the bucket plan, such as decode=512, slots=1,4 or steps=4; nothing after the = leaves the graph out",
    )  # fmt: skip


def add_precision(parser: argparse.ArgumentParser) -> None:
    """In what is computed, and how the compiler is told to."""
    parser.add_argument(
        "--precision",
        default="fp32",
        metavar="NAME",
        help="fp32, bf16, int8 (host), bf16-all (Neuron); default: fp32",
    )
    parser.add_argument(
        "--compiler-args", type=assignment, action="append", default=[], metavar="GRAPH=ARGS",
        help="of neuronx-cc for one graph, such as vocoder=-O2",
    )  # fmt: skip


def add_speaker(parser: argparse.ArgumentParser) -> None:
    """A recording of the voice."""
    parser.add_argument(
        "--speaker-wav",
        type=Path,
        metavar="FILE",
        help="the voice to clone (default: a tone it makes; in the demo, the miniature's own)",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Where it runs."""
    parser.add_argument(
        "--backend", default="auto", help="auto, cpu, neuron, neuron:N or neuron:N-M (default: %(default)s)"
    )


def add_target(parser: argparse.ArgumentParser) -> None:
    """For which instances it is compiled."""
    parser.add_argument("--target", help="inf2, trn1, trn1n or trn2 (default: this machine)")


def whole(least: int, most: int = _MOST) -> Callable[[str], int]:
    """What reads an argument that is a whole number between two others."""

    def read(value: str) -> int:
        if not (value.removeprefix("-").isdecimal() and least <= int(value) <= most):
            limits = f"from {least} on" if most == _MOST else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number {limits}")
        return int(value)

    return read


positive = whole(1)
#: What torch's generators can be seeded with.
seed = whole(-(2**63), 2**64 - 1)


def assignment(value: str) -> tuple[str, str]:
    """What is before and behind an equals sign."""
    name, equals, rest = value.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=VALUE")
    return name, rest


def sizes(value: str) -> tuple[str, tuple[int, ...] | int]:
    """A field of the bucket plan, and its sizes."""
    name, sizes = assignment(value)
    if name not in {field.name for field in fields(BucketPlan)}:
        raise argparse.ArgumentTypeError(f"{name!r} is not a field of BucketPlan")
    if name == "steps":
        return name, positive(sizes)
    return name, tuple(positive(size) for size in sizes.split(",") if size)
