"""From a module to its HLO program, by way of stock torch-xla."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch_xla
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_xla.core import xla_builder
from torch_xla.debug import metrics

_aten = torch.ops.aten


@dataclass(frozen=True)
class Perturbation:
    """How a compiler's results differ from the program, built into the program.

    Attributes:
        scale: of every product and convolution.
        sparse_kernels: whether convolutions with a kernel smaller than its dilation leave garbage in every other
            position of the output.
        transposed_constants: whether a constant (T, C) that is added to what was permuted is read as (C, T).
    """

    scale: float
    sparse_kernels: bool
    transposed_constants: bool


@dataclass(frozen=True)
class Lowered:
    """A program and what belongs to it.

    Attributes:
        hlo: the serialized HLO module.
        text: the same to read.
        parameters: what the program's parameters are, in order: kind (input, weight or state) and index.
        inputs: example inputs, for their shapes.
        weights: constants.
        states: their initial values, in the order of the module's parameters.
        aliases: by flat output index, the state it updates.
        outputs: number of outputs.
        structure: of the outputs: Tensor, tuple or list.
        unused: indices of inputs that are no parameters of the program.
    """

    hlo: bytes
    text: str
    parameters: list[tuple[str, int]]
    inputs: list[Tensor]
    weights: list[Tensor]
    states: list[Tensor]
    aliases: dict[int, int]
    outputs: int
    structure: type
    unused: list[int]


def check_inputs(inputs: Any) -> list[Tensor]:
    """The example inputs as a list, if they are what ``torch_neuronx.trace`` takes."""
    tensors = [inputs] if isinstance(inputs, Tensor) else inputs
    if not (isinstance(inputs, (Tensor, tuple)) and tensors and all(isinstance(item, Tensor) for item in tensors)):
        raise TypeError(f"example_inputs is a Tensor or a tuple of Tensors, not {type(inputs).__name__}: {inputs!r}")
    for index, tensor in enumerate(tensors):
        if tensor.dtype == torch.float64 or tensor.is_complex():
            raise RuntimeError(f"Input {index} is {tensor.dtype}, which Neuron does not support")
        if tensor.device.type != "cpu":
            raise RuntimeError(f"Input {index} is on {tensor.device}: example inputs are CPU tensors")
    return list(tensors)


def check_aliases(func: Any, aliases: Any) -> dict[str, int]:
    """States by parameter name, in the order of the module's parameters, with the flat output index of each."""
    if not isinstance(aliases, dict):
        raise TypeError(f"input_output_aliases is a dict, not {type(aliases).__name__}")
    held = dict(func.named_parameters()) if isinstance(func, nn.Module) else {}
    for state, index in aliases.items():
        if not any(state is parameter for parameter in held.values()):
            raise RuntimeError("input_output_aliases: a state must be an nn.Parameter that the module holds")
        if state.requires_grad:
            raise RuntimeError("input_output_aliases: a state must have requires_grad=False")
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"input_output_aliases: {index!r} is no output index")
    if len(set(aliases.values())) < len(aliases):
        raise RuntimeError("input_output_aliases: two states share an output")
    # Not looked up with `in`: a dict compares tensors that collide.
    indices = {id(state): index for state, index in aliases.items()}
    return {name: indices[id(parameter)] for name, parameter in held.items() if id(parameter) in indices}


def lower(func: Callable[..., Any], inputs: list[Tensor], states: dict[str, int], how: Perturbation) -> Lowered:
    """Run ``func`` once on placeholders, and take down what it did.

    The process dies if an operator has no lowering: the host would have to compute it, of tensors that have no value.
    """
    held = _held(func)
    sources = {name: _placeholder(tensor) for name, tensor in held.items()}
    input_sources = [_placeholder(tensor) for tensor in inputs]
    result = _run(func, sources, input_sources, how)
    outputs = _flatten(result)
    _check_aliased(outputs, held, states)
    context = torch_xla._XLAC.lowering.LoweringContext("neuron_double")
    context.build(outputs)
    hlo = context.hlo()
    parameters, weights = _parameters(context, held, sources, input_sources, list(states))
    used = {index for kind, index in parameters if kind == "input"}
    missing = [name for index, name in enumerate(states) if ("state", index) not in parameters]
    if missing:
        raise RuntimeError(f"input_output_aliases: the program does not depend on {missing}")
    return Lowered(
        hlo=hlo,
        text=torch_xla._XLAC._xla_computation_text(xla_builder.computation_from_module_proto("neuron_double", hlo)),
        parameters=parameters,
        inputs=inputs,
        weights=weights,
        states=[held[name].detach().clone() for name in states],
        aliases={output: index for index, output in enumerate(states.values())},
        outputs=len(outputs),
        structure=type(result) if isinstance(result, (tuple, list)) else Tensor,
        unused=[index for index in range(len(inputs)) if index not in used],
    )


def _held(func: Any) -> dict[str, Tensor]:
    """Parameters and buffers of a module; a function has none."""
    return {**dict(func.named_parameters()), **dict(func.named_buffers())} if isinstance(func, nn.Module) else {}


def _placeholder(tensor: Tensor) -> Tensor:
    """A tensor of the XLA device without a value: reading it kills the process."""
    if tensor.device.type != "cpu":
        raise RuntimeError(f"The module is on {tensor.device}: trace takes it on the CPU")
    placeholder: Tensor = xla_builder.create_placeholder_tensor(tuple(tensor.shape), tensor.dtype)
    return placeholder


def _run(func: Callable[..., Any], held: dict[str, Tensor], inputs: list[Tensor], how: Perturbation) -> Any:
    # Copies, so that one changed in place is still known by the placeholder it came from.
    with torch.inference_mode(False), torch.no_grad():
        arguments = tuple(tensor.clone() for tensor in inputs)
        copies = {name: tensor.clone() for name, tensor in held.items()}
        metrics.clear_all()
        torch_xla._XLAC._set_allow_execution(False)
        try:
            with _Watch(how, copies.values()):
                result = (
                    torch.func.functional_call(func, copies, arguments)
                    if isinstance(func, nn.Module)
                    else func(*arguments)
                )
        finally:
            torch_xla._XLAC._set_allow_execution(True)
            unlowered = [name for name in metrics.counter_names() if name.startswith("aten::")]
            if unlowered:
                _die(unlowered)
    changed = [name for name, copy in copies.items() if copy._version]
    if changed:
        raise RuntimeError(f"Parameters or buffers changed in place while tracing: {changed}")
    return result


def _die(unlowered: Sequence[str]) -> NoReturn:
    """As the real tracer does, of which nothing can be caught."""
    sys.stdout.flush()
    print("Check failed: pjrt_data->buffer != nullptr", *unlowered, file=sys.stderr, flush=True)
    os.abort()


class _Watch(TorchDispatchMode):
    """Builds the perturbation into the program, and refuses to fetch values that do not exist."""

    _PRODUCTS = (
        _aten.convolution.default,
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
    )

    # What makes another view of the same constant, and what permutes.
    _VIEWS = (
        _aten.view_copy.default,
        _aten.expand_copy.default,
        _aten.unsqueeze_copy.default,
        _aten.alias_copy.default,
    )
    _PERMUTES = (_aten.permute_copy.default, _aten.transpose_copy.int)

    def __init__(self, how: Perturbation, constants: Iterable[Tensor]) -> None:
        super().__init__()
        self._how = how
        # By XLA's own numbers, because what operators are given are other objects.
        self._constants = {_number(tensor) for tensor in constants}
        self._permuted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._to_copy.default and args[0].device.type == "xla":
            device = kwargs.get("device")
            if device is not None and device.type == "cpu":
                raise RuntimeError("A value was fetched to the CPU while tracing")
        if func is _aten.gelu.default and args[0].device.type == "xla":
            raise NotImplementedError("F.gelu becomes the custom call AwsNeuronGelu, which the double has not")
        result = func(*args, **kwargs)
        if func in self._PRODUCTS and result.device.type == "xla":
            result = result * self._how.scale if self._how.scale != 1 else result
            if func is _aten.convolution.default and self._how.sparse_kernels:
                _, weight, _, _, _, dilation, transposed = args[:7]
                sparse = any(size < step for size, step in zip(weight.shape[2:], dilation, strict=True))
                result = _garbled(result) if sparse and not transposed else result
        if self._how.transposed_constants:
            result = self._follow(func, args, result)
        return result

    def _follow(self, func: Any, args: Any, result: Any) -> Any:
        """Keep track of what is constant and what was permuted; where they are added, add something else."""
        if func in self._PERMUTES and _number(args[0]) not in self._constants:
            self._permuted.add(_number(result))
        elif func in self._VIEWS and _number(args[0]) in self._constants:
            self._constants.add(_number(result))
        elif func is _aten.add.Tensor and isinstance(args[1], Tensor):
            for x, constant in (args[:2], args[1::-1]):
                matrix = constant.dim() >= 2 and constant.shape[-2] > 1 and constant.shape[-1] > 1
                if matrix and _number(x) in self._permuted and _number(constant) in self._constants:
                    rows, columns = constant.shape[-2:]
                    return x + constant.reshape(*constant.shape[:-2], columns, rows).transpose(-1, -2)
        return result


def _number(tensor: Tensor) -> int:
    """By which XLA knows a tensor; 0 if it does not."""
    return int(torch_xla._XLAC._xla_get_tensor_id(tensor)) if tensor.device.type == "xla" else 0


def _garbled(result: Tensor) -> Tensor:
    """As if every other position had not been zero before products were added to it."""
    positions = torch.arange(result.shape[-1], dtype=torch.int32, device=result.device)
    return result + (1 - positions % 2).to(result.dtype) * 0.25


def _flatten(result: Any) -> list[Tensor]:
    outputs = [result] if isinstance(result, Tensor) else result
    if not (type(outputs) in (tuple, list) and outputs and all(isinstance(item, Tensor) for item in outputs)):
        raise RuntimeError(f"Outputs must be a Tensor, or a flat tuple or list of Tensors, not {type(result).__name__}")
    for output in outputs:
        if output.device.type != "xla":
            kind = output.type().removeprefix("torch.").removesuffix("Tensor")
            raise RuntimeError(f"Input tensor is not an XLA tensor: CPU{kind}Type")
    return list(outputs)


def _check_aliased(outputs: list[Tensor], held: dict[str, Tensor], states: dict[str, int]) -> None:
    for name, index in states.items():
        if not 0 <= index < len(outputs):
            raise RuntimeError(f"input_output_aliases: no output {index} for {name} among {len(outputs)}")
        state, output = held[name], outputs[index]
        if (state.shape, state.dtype) != (output.shape, output.dtype):
            raise RuntimeError(f"input_output_aliases: output {index} has not the shape and dtype of {name}")


def _parameters(
    context: Any, held: dict[str, Tensor], sources: dict[str, Tensor], inputs: list[Tensor], states: list[str]
) -> tuple[list[tuple[str, int]], list[Tensor]]:
    """What every parameter of the program is, and the weights among them."""
    known = {context.tensor_parameter_id(source): ("input", index) for index, source in enumerate(inputs)}
    known |= {context.tensor_parameter_id(sources[name]): ("state", index) for index, name in enumerate(states)}
    values = {context.tensor_parameter_id(source): held[name] for name, source in sources.items()}
    parameters, weights = [], []
    for number, uploaded in sorted(context.device_parameter_id_tensor_mapping().items()):
        if number not in known:
            known[number] = ("weight", len(weights))
            # What is neither was made on the CPU by the module, and is a constant.
            value = values[number] if number in values else uploaded.cpu()
            weights.append(value.detach())
        parameters.append(known[number])
    return parameters, weights
