"""What stands in for neuronx-cc: its command line, the programs it refuses, and its known miscompilation."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from torch_neuronx import _machine
from torch_neuronx._frontend import Lowered, Perturbation

_CHOICES = {
    "--target": ["inf2", "trn1", "trn1n", "trn2"],
    "--model-type": ["generic", "transformer", "unet-inference"],
    "--auto-cast": ["none", "matmult", "all"],
    "--auto-cast-type": ["bf16", "fp16", "tf32", "fp8_e4m3"],
    "--distribution-strategy": ["llm-training"],
    "--verbose": ["debug", "info", "warning", "error", "critical"],
}
_SWITCHES = [
    "--enable-mixed-precision-accumulation",
    "--disable-mixed-precision-accumulation",
    "--enable-saturate-infinity",
    "--enable-fast-context-switch",
    "--enable-fast-loading-neuron-binaries",
]
_SINCE_2_27 = {
    "--native-int64": ["enabled", "disabled"],
    "--implicit-integer-downcast": ["none", "all"],
}
_TRN2 = {"--native-int64", "--implicit-integer-downcast"}  # documented for it and later targets
_LIMIT = 2 << 30  # bytes of a serialized HLO module

Version = tuple[int, ...]


class Compiler:
    """One run of the compiler.

    Args:
        arguments: as ``torch_neuronx.trace`` takes them.
        workdir: likewise.

    Attributes:
        target: as the arguments have it.
        tag: by which faults name the program.

    Raises:
        RuntimeError: no compiler is installed, or it does not understand the arguments.
    """

    def __init__(self, arguments: str | list[str] | None, workdir: str | None) -> None:
        self._version = _installed()
        self._workdir = Path(workdir) if workdir is not None else None
        self.tag = self._workdir.name if self._workdir else ""
        parsed = _parse(_words(arguments), self._version)
        self.target: str | None = parsed.target

    def perturbation(self) -> Perturbation:
        """How this compiler's results differ from what the program says."""
        return Perturbation(
            scale=1.05 if "miscompile" in _machine.faults(self.tag) else 1.0,
            # "Incorrect convolution output when kernel_size is smaller than dilation", fixed in 2.25
            sparse_kernels=self._version < (2, 25),
            # x.permute(0, 2, 1) + constant reads the constant as if it were transposed; status PASS
            transposed_constants=self._version == (2, 26),
        )

    def compile(self, program: Lowered) -> None:
        """Leave behind what a compilation does.

        Raises:
            RuntimeError: the program is refused, or a fault strikes.
        """
        tempfile.mkdtemp(prefix="neuronxcc-", dir=os.getcwd())  # the real one litters likewise
        if "alone" in _machine.faults(self.tag):
            _machine.runtime.alone()
        if self._workdir:
            self._workdir.mkdir(parents=True, exist_ok=True)
        self._strike()
        unfit = self._version >= (2, 27) and _islpy() > (2026, 1, 0)
        if unfit or "islpy" in _machine.faults(self.tag):  # aws-neuron-sdk#1391
            _fail(70, "ERROR: [NCC_ISMP902] Simplifier error: is_subset()")
        refused = [f"ERROR: [{code}] {message}" for code, message in _refused(program)]
        self._log(*(refused or ["Compiler status PASS"]))
        if refused:
            _fail(70, *refused)
        if self._workdir:
            (self._workdir / "graph.neff").write_bytes(program.hlo)

    def _strike(self) -> None:
        faults = _machine.faults(self.tag)
        if "hang" in faults:
            time.sleep(3600)
        if "crash" in faults:
            os.abort()
        if "killed" in faults:
            _fail(-9)
        if "fail" in faults:
            lines = ["Traceback of the compiler", "ERROR: [NCC_EXSP001] Unhandled exception", "Compiler status ERROR"]
            self._log(*lines)
            _fail(70, *lines)

    def _log(self, *lines: str) -> None:
        if self._workdir:
            (self._workdir / "log-neuron-cc.txt").write_text("\n".join(lines) + "\n")


def _fail(status: int, *lines: str) -> NoReturn:
    for line in lines:
        print(line, file=sys.stderr, flush=True)
    raise RuntimeError(f"neuronx-cc failed with {status}")


def _installed() -> Version:
    try:
        installed = version("neuronx-cc")
    except PackageNotFoundError:
        installed = "1.0"
    found: Version = tuple(int(part) for part in re.findall(r"\d+", installed.partition("+")[0])[:2])
    if found < (2, 0):  # the stub on PyPI brings no compiler
        raise RuntimeError("neuronx-cc compiler binary does not exist")
    return found


def _islpy() -> Version:
    try:
        return tuple(map(int, version("islpy").split(".")))[:3]
    except PackageNotFoundError:
        return (2026, 1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(1, "usage: neuronx-cc compile [options]", f"neuronx-cc: error: {message}")


def _words(arguments: str | list[str] | None) -> list[str]:
    if isinstance(arguments, str):
        return shlex.split(arguments)
    if arguments is None:
        return []
    if isinstance(arguments, list) and all(isinstance(word, str) for word in arguments):
        return arguments
    raise TypeError(f"compiler_args is a string or a list of strings, not {arguments!r}")


def _parse(words: list[str], installed: Version) -> Any:
    parser = _Parser(prog="neuronx-cc", allow_abbrev=False, add_help=False)
    for flag, choices in {**_CHOICES, **(_SINCE_2_27 if installed >= (2, 27) else {})}.items():
        parser.add_argument(flag, choices=choices)
    for flag in _SWITCHES:
        parser.add_argument(flag, action="store_true")
    for flag in ("--logfile", "--output"):
        parser.add_argument(flag)
    parser.add_argument("-O", "--optlevel", choices=["1", "2", "3"])
    parser.add_argument("-lnc", "--logical-nc-config", choices=["1", "2"])
    parsed = parser.parse_args(words)
    if parsed.logical_nc_config and parsed.target != "trn2":
        parser.error("unrecognized arguments: --logical-nc-config [NCC_EARG001]")
    if parsed.target != "trn2" and (refused := _TRN2 & {word.partition("=")[0] for word in words}):
        parser.error(f"unrecognized arguments: {min(refused)} [NCC_EARG001]")
    return parsed


def _refused(program: Lowered) -> list[tuple[str, str]]:
    """What the compiler refuses in a program: codes and messages."""
    text = program.text
    found = []
    if re.search(r"\bc(64|128)\[", text):
        found.append(("NCC_EVRF004", "complex types are not supported"))
    if re.search(r"\bf64\[", text):
        found.append(("NCC_ESPP004", "f64 is not supported"))
    constants = re.findall(r"\b[su]64\[\](?:\{\})? constant\((-?\d+)\)", text)
    if any(not -(2**31) <= int(value) < 2**31 for value in constants):
        found.append(("NCC_ESFH001", "64-bit constants that exceed the 32-bit range are not supported"))
    if re.search(r"\[[^\]]*<=", text):
        found.append(("NCC_EMOD025", "dynamic shapes are not supported"))
    if _constant_bytes(program) > _LIMIT:
        found.append(("NCC_EOOM001", "the constants of the module exceed 2 GiB"))
    return found + _refused_instructions(text)


def _constant_bytes(program: Lowered) -> int:
    return sum(weight.numel() * weight.element_size() for weight in program.weights)


def _refused_instructions(text: str) -> list[tuple[str, str]]:
    found = []
    instructions = re.findall(r"%([\w.\-]+) = (?:\(.*?\)|\S+) ([a-z][a-z\-]*)\((.*)", text)
    opcodes = {name: opcode for name, opcode, _ in instructions}
    for name, opcode, rest in instructions:
        if opcode == "sort":
            found.append(("NCC_EVRF001", f"sort is not supported: {name}"))
        if opcode == "dynamic-update-slice":
            operands = re.findall(r"%([\w.\-]+)", rest)
            if any(opcodes.get(index) != "constant" for index in operands[2:]):
                found.append(("NCC_EUOC002", f"dynamic-update-slice with an index that is not constant: {name}"))
        if opcode == "convolution" and _window(rest, "lhs_dilate") > 1:
            if _window(rest, "rhs_dilate") > 1:
                found.append(("NCC_EVRF010", f"convolution with input and kernel dilation: {name}"))
            if _window(rest, "stride") > 1:
                found.append(("NCC_EVRF011", f"strided convolution with input dilation: {name}"))
    return found


def _window(rest: str, key: str) -> int:
    sizes = re.search(rf"window={{[^}}]*\b{key}=([\dx]+)", rest)
    return math.prod(int(size) for size in sizes[1].split("x")) if sizes else 1
