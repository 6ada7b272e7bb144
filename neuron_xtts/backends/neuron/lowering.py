"""What the XLA frontend makes of a graph: unlowered operators, disconnected inputs, patterns that neuronx-cc rejects.

``torch_neuronx.trace`` is built on this frontend. An operator without a lowering runs on the host while tracing, and
what it computes becomes a constant of the program. The reverse does not hold: the compiler may reject what lowers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuron_xtts.backends.neuron.device import import_module
from neuron_xtts.errors import FrontendMissingError
from neuron_xtts.graphs.operators import states_of


@dataclass(frozen=True)
class Lowering:
    """A graph as the frontend lowers it.

    Attributes:
        graph: its name.
        bucket: its sizes.
        operators: HLO operators, with their number.
        flops: multiplications and additions of matrix products and convolutions.
        bytes: of everything that goes in and comes out, weights and state included: what memory must at least move.
        unlowered: ``aten`` operators that the frontend ran on the host instead.
        disconnected: inputs and states that the program does not depend on.
        rejected: patterns that neuronx-cc is documented to reject or to compute wrongly.
        products: matrix products of each size, as `Program.products` counts them: their number, rows, inner, columns.
        inputs: bytes of each input of a call.
        results: bytes of each result of a call, without the state.
        states: bytes of each tensor of the state.
    """

    graph: str
    bucket: str
    operators: dict[str, int]
    flops: int
    bytes: int
    unlowered: list[str]
    disconnected: list[str]
    rejected: list[str]
    products: list[tuple[int, int, int, int]] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    results: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What stands against compiling it, one line each."""
        return [
            *(f"{operator} has no lowering" for operator in self.unlowered),
            *(f"{name} is not connected" for name in self.disconnected),
            *self.rejected,
        ]


def lower(name: str, bucket: str, graph: nn.Module, inputs: Mapping[str, Tensor]) -> Lowering:
    """Lower one graph.

    Args:
        name: of the graph.
        bucket: its sizes, for the result.
        graph: on the XLA device; its parameters called ``states.*`` are its state.
        inputs: its positional inputs by name, on the host.

    Raises:
        FrontendMissingError: no XLA frontend is installed.
    """
    torch_xla = frontend()
    from torch_xla.core import xla_builder
    from torch_xla.debug import metrics

    device = torch_xla.device()
    moved = {key: tensor.to(device) for key, tensor in inputs.items()}
    torch_xla.sync()
    metrics.clear_all()
    with torch.no_grad():
        outputs = graph(*moved.values())
    context = torch_xla._XLAC.lowering.LoweringContext()
    context.build(list(outputs))
    unlowered = sorted(counter for counter in metrics.counter_names() if counter.startswith("aten::"))
    computation = xla_builder.computation_from_module_proto(name, context.hlo())
    program = Program(torch_xla._XLAC._xla_computation_text(computation))
    states = {f"states.{i}": state for i, state in enumerate(states_of(graph))}
    disconnected = [key for key, tensor in {**moved, **states}.items() if context.tensor_parameter_id(tensor) < 0]
    given = [*moved.values(), *states.values()]
    rejected = program.rejected({context.tensor_parameter_id(tensor) for tensor in given})
    scalars = [tensor for tensor in context.parameter_id_tensor_mapping().values() if tensor.numel() == 1]
    if any(torch.isinf(scalar.cpu().double()).any() for scalar in scalars):
        rejected.append("infinity as an operand")
    return Lowering(
        name,
        bucket,
        operators=dict(program.operators()),
        flops=program.flops(),
        bytes=program.bytes(),
        unlowered=unlowered,
        disconnected=disconnected,
        rejected=rejected,
        products=[(number, *product) for product, number in program.products().items()],
        inputs=_sizes(inputs.values()),
        results=_sizes(outputs[: len(outputs) - len(states)]),  # the state's new contents come last
        states=_sizes(states.values()),
    )


def _sizes(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor.numel() * tensor.element_size() for tensor in tensors]


def frontend() -> Any:
    """The module ``torch_xla``: stock, or the one that torch-neuronx brings.

    Raises:
        FrontendMissingError: it is not installed.
    """
    try:
        torch_xla = import_module("torch_xla")
    except ImportError as error:
        version = torch.__version__.partition("+")[0]
        raise FrontendMissingError(
            f"Graphs are lowered with torch-xla, which cannot be imported ({error}). On a Neuron instance "
            f"torch-neuronx brings it; elsewhere: pip install torch-xla=={version}"
        ) from error
    return torch_xla


class Product(NamedTuple):
    """A product of two matrices, (rows, inner) and (inner, columns)."""

    rows: int
    inner: int
    columns: int


class Program:
    """The text of an HLO module, read line by line."""

    _INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")

    def __init__(self, text: str) -> None:
        self.text = text
        self.types: dict[str, str] = {}
        self.opcodes: dict[str, str] = {}
        self.rest: dict[str, str] = {}
        self._entry: list[str] = []
        entry = False
        for line in text.splitlines():
            entry = line.startswith("ENTRY") or (entry and line != "}")
            if match := self._INSTRUCTION.match(line):
                _, name, self.types[match[2]], self.opcodes[match[2]], self.rest[match[2]] = match.groups()
                if entry:
                    self._entry.append(name)

    def operators(self) -> Counter[str]:
        """Operators of the entry computation, with their number."""
        return Counter(self.opcodes[name] for name in self._entry)

    def flops(self) -> int:
        """Two for every multiply-add of dots and convolutions."""
        return sum(2 * number * math.prod(product) for product, number in self.products().items())

    def products(self) -> Counter[Product]:
        """The matrix products of dots and convolutions, with their number.

        A dot is one for every index of its batch. A convolution is one for every tap of its kernel, with a row for each
        output channel and a column for each position that the tap meets: zeros between dilated inputs are not counted.
        """
        found: Counter[Product] = Counter()
        for name in self._entry:
            if self.opcodes[name] == "dot":
                batch, product = self._dot(name)
                found[product] += batch
            elif self.opcodes[name] == "convolution":
                taps, product = self._convolution(name)
                found[product] += taps
        return found

    def _dot(self, name: str) -> tuple[int, Product]:
        left, right = (_shape(self.types[operand]) for operand in self._operands(name)[:2])
        batch, inner = (
            math.prod(left[i] for i in self._dimensions(name, kind)) for kind in ("lhs_batch", "lhs_contracting")
        )
        return batch, Product(math.prod(left) // (batch * inner), inner, math.prod(right) // (batch * inner))

    def _convolution(self, name: str) -> tuple[int, Product]:
        kernel = _shape(self.types[self._operands(name)[1]])
        labels = re.search(r"dim_labels=\w+_(\w+)->", self.rest[name])
        outputs, inputs = (kernel[labels[1].index(label)] if labels else 1 for label in "oi")
        columns = _elements(self.types[name]) // outputs // math.prod(self._window(name, "lhs_dilate"))
        return math.prod(kernel) // (outputs * inputs), Product(outputs, inputs, columns)

    def bytes(self) -> int:
        """Bytes of the entry computation's parameters and results."""
        ends = [name for name in self._entry if self.opcodes[name] == "parameter"] + self._entry[-1:]
        return sum(_bytes(self.types[name]) for name in ends)

    def rejected(self, given: Collection[int]) -> list[str]:
        """What neuronx-cc is documented to reject, or reported to compute wrongly, one line a finding.

        Args:
            given: numbers of the parameters that are no constants of the compiled program.
        """
        found = []
        if re.search(r"\bc(64|128)\[", self.text):
            found.append("complex numbers (NCC_EVRF004)")
        if re.search(r"\bf64\[", self.text):
            found.append("64-bit floats")
        large = re.findall(r"\b([su]64)\[[^\]]*\](?:\{[^}]*\})? constant\(\{?(-?\d+)", self.text)
        if any(not -(2**31) <= int(value) < 2**31 for _, value in large):
            found.append("64-bit integers that do not fit 32 bits (NCC_ESFH001, NCC_ESFH002)")
        if re.search(r"\[[^\]]*<=", self.text):
            found.append("dynamic shapes (NCC_EMOD025)")
        for name, opcode in self.opcodes.items():
            operands = self._operands(name)
            if opcode == "sort":
                found.append(f"sort: {name}")
            if opcode == "dynamic-update-slice" and any(
                self.opcodes.get(index) != "constant" for index in operands[2:]
            ):
                found.append(f"dynamic-update-slice at an index that is not constant: {name}")
            if opcode == "convolution":
                dilated_input = any(size > 1 for size in self._window(name, "lhs_dilate"))
                if dilated_input and any(size > 1 for size in self._window(name, "rhs_dilate")):
                    found.append(f"convolution with dilated input and kernel (NCC_EVRF010): {name}")
                if dilated_input and any(size > 1 for size in self._window(name, "stride")):
                    found.append(f"strided convolution with dilated input (NCC_EVRF011): {name}")
            if opcode == "add" and any(self._adds_constant(*pair, given) for pair in permutations(operands, 2)):
                found.append(f"a constant added to what was transposed, which 2.26 reads the wrong way round: {name}")
            # The start of a maximum is minus infinity, and stays inside the reduction.
            if opcode not in ("reduce", "reduce-window") and any(
                self.opcodes.get(operand) == "constant" and "inf" in self.rest[operand] for operand in operands
            ):
                found.append(f"infinity as an operand: {name}")
        return found

    def _adds_constant(self, x: str, constant: str, given: Collection[int]) -> bool:
        """Whether ``x`` was transposed, and the other is a constant with rows and columns."""
        if self.opcodes.get(self._unscaled(x)) != "transpose":
            return False
        constant = self._unscaled(constant)
        while self.opcodes.get(constant) in ("broadcast", "reshape"):
            (constant,) = self._operands(constant)
        opcode = self.opcodes.get(constant)
        if sum(size > 1 for size in _shape(self.types.get(constant, ""))) < 2:
            return False
        return opcode == "constant" or (
            opcode == "parameter" and int(self.rest[constant].partition(")")[0]) not in given
        )

    def _unscaled(self, name: str) -> str:
        """What is multiplied by a number, such as the one by which torch multiplies what it adds."""
        operands = self._operands(name)
        for x, factor in permutations(operands) if self.opcodes.get(name) == "multiply" else ():
            if self.opcodes.get(factor) == "broadcast" and not _shape(self.types[self._operands(factor)[0]]):
                return x
        return name

    def _operands(self, name: str) -> list[str]:
        arguments = self.rest[name].partition("), ")[0]
        return re.findall(r"%([\w.\-]+)", arguments)

    def _dimensions(self, name: str, kind: str) -> list[int]:
        found = re.search(rf"\b{kind}_dims=\{{([\d,]*)\}}", self.rest[name])
        return [int(i) for i in found[1].split(",") if i] if found else []

    def _window(self, name: str, key: str) -> list[int]:
        found = re.search(rf"window=\{{[^}}]*\b{key}=([\dx]+)", self.rest[name])
        return [int(size) for size in found[1].split("x")] if found else [1]


def _shape(type_: str) -> list[int]:
    return [int(size) for size in type_.partition("[")[2].partition("]")[0].split(",") if size]


def _elements(type_: str) -> int:
    return math.prod(_shape(type_))


def _bytes(type_: str) -> int:
    """Bytes of a type such as ``f32[4,8]{1,0}`` or a tuple of them; ``pred`` takes one, the others say their bits."""
    return sum(
        int(bits or 8) // 8 * math.prod(int(size) for size in shape.split(",") if size)
        for bits, shape in re.findall(r"\b[a-z]+(\d*)[a-z\d]*\[([\d,]*)\]", type_)
    )
