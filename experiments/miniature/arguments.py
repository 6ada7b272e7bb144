"""What the scripts of this folder check first: their arguments, and what the scripts before them have written."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

#: The script that writes a file of WORK.
MADE_BY = {
    **dict.fromkeys(("texts.json", "audio.npy", "lengths.npy"), "data.py"),
    **dict.fromkeys(("mels.npy", "norms.pt", "dvae.pt", "codes.npy"), "codes.py"),
    **dict.fromkeys(("vocab.json", "gpt.pt"), "gpt.py"),
    "vocoder.pt": "vocoder.py",
}


def check_files(work: Path, *names: str) -> None:
    """Raise SystemExit, which prints what it says, unless a folder has files of `MADE_BY`."""
    for name in names:
        if not (work / name).is_file():
            raise SystemExit(f"{work} has no {name}: run {MADE_BY[name]} first")


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """What reads an argument that is a whole number between two others."""

    def read(value: str) -> int:
        if not value.isdecimal() or not least <= int(value) <= most:
            limits = f"from {least} on" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number {limits}")
        return int(value)

    return read


def positive(value: str) -> float:
    """Read an argument that is a number above zero."""
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number above zero")
    return number


def fraction(value: str) -> float:
    """Read an argument that is a number from zero to one."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number from 0 to 1")
    return number
