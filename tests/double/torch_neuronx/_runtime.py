"""Executing lowered programs, from inside of a ScriptModule that ``torch.jit`` can save and load."""

import json
import secrets
import sys
import threading
import time
from collections import Counter
from typing import Any

import torch
import torch_xla
from torch import Tensor, nn
from torch_xla.core import xla_builder

from torch_neuronx import _machine
from torch_neuronx._frontend import Lowered

# Which cores `torch.jit.load` puts a program on: first core and number of them.
context = (-1, -1)
# Executions so far by tag and core.
executions: Counter[tuple[str, int]] = Counter()


class _Program:
    """A program in this process, and its constants on the device."""

    def __init__(self, program: Tensor, weights: list[Tensor]) -> None:
        self.computation = xla_builder.computation_from_module_proto("neuron_double", program.numpy().tobytes())
        self.weights = [_to_device(weight) for weight in weights]


class _Kept:
    """What a device holds of states where what is written into them is not always seen.

    Args:
        states: as they were loaded.
    """

    def __init__(self, states: list[Tensor]) -> None:
        self.contents = [_to_device(state.cpu()) for state in states]
        self.versions = [state._version for state in states]
        self.written = False

    def seen(self, states: list[Tensor], once: bool) -> list[Tensor]:
        """What the next execution sees."""
        if once and not self.written and self.versions != [state._version for state in states]:
            self.contents = [_to_device(state.cpu()) for state in states]
            self.written = True
        return self.contents


_lock = threading.Lock()
_programs: dict[str, _Program] = {}
_running: dict[int, object] = {}  # the call that is executing, of every instance with states
_first_core: dict[int, int] = {}  # of the instances that are loaded
_states: dict[int, _Kept] = {}  # of the instances whose writes are not all seen


def reset() -> None:
    """Forget everything that happened in this process."""
    global context
    context = (-1, -1)
    for store in (executions, _programs, _running, _first_core, _states):
        store.clear()


def _define() -> None:
    """Define the operators, once per process; they call whichever double is imported."""
    if hasattr(torch.ops.neuron_double, "library"):
        return
    library = torch.library.Library("neuron_double", "DEF")
    library.define("placed(bool training) -> (int, int, int)")  # without an argument it would be folded away
    library.define(
        "execute(str meta, int[] placement, Tensor program, Tensor[] weights, Tensor(a!)[] states, Tensor[] inputs)"
        " -> Tensor[]"
    )
    for name in ("placed", "execute"):
        # Composite, because the states are on another device than the inputs.
        library.impl(name, _Forward(name), "CompositeImplicitAutograd")
    torch.ops.neuron_double.library = library  # it takes its operators along when it is collected


class _Forward:
    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: Any) -> Any:
        return getattr(sys.modules["torch_neuronx._runtime"], self.__name__)(*args)


def placed(training: bool = False) -> tuple[int, int, int]:
    """Cores for a module that is being made or loaded, and a number that tells it from all others."""
    return (*context, secrets.randbits(62))


_define()


class _Placement(nn.Module):
    """Where a module is. Loading it asks anew, instead of restoring what was saved."""

    start: int
    count: int
    instance: int

    def __init__(self) -> None:
        super().__init__()
        self.start, self.count, self.instance = placed()

    @torch.jit.export
    def __getstate__(self):
        return self.training

    @torch.jit.export
    def __setstate__(self, training: bool):
        start, count, instance = torch.ops.neuron_double.placed(training)
        self.start = start
        self.count = count
        self.instance = instance
        self.training = training


class _Traced(nn.Module):
    meta: str

    def __init__(self, lowered: Lowered, meta: str) -> None:
        super().__init__()
        self.meta = meta
        self.placement = _Placement()
        self.register_buffer("program", torch.frombuffer(bytearray(lowered.hlo), dtype=torch.uint8))
        self.weights = nn.Module()
        for index, weight in enumerate(lowered.weights):
            self.weights.register_buffer(f"w{index}", weight.clone())
        self.states = nn.ParameterList(nn.Parameter(state, requires_grad=False) for state in lowered.states)


def wrap(lowered: Lowered, tag: str, target: str) -> torch.jit.ScriptModule:
    """The ScriptModule that executes a program."""
    meta = {
        "id": secrets.token_hex(16),
        "tag": tag,
        "target": target,
        "inputs": [[list(tensor.shape), str(tensor.dtype)] for tensor in lowered.inputs],
        "parameters": lowered.parameters,
        "aliases": sorted(lowered.aliases.items()),
    }
    # A class of its own: TorchScript shares types, and then the forward that is defined below.
    kind = type("Traced", (_Traced,), {})
    module = torch.jit.script(kind(lowered, json.dumps(meta)).eval())
    names = [f"input_{index}" for index in range(len(lowered.inputs))]
    weights = ", ".join(f"self.weights.w{index}" for index in range(len(lowered.weights)))
    results = ", ".join(f"results[{index}]" for index in range(lowered.outputs))
    empty = "torch.jit.annotate(List[Tensor], [])"
    module.define(
        f"def forward(self, {', '.join(f'{name}: Tensor' for name in names)}):\n"
        "    placement = [self.placement.start, self.placement.count, self.placement.instance]\n"
        f"    weights = {f'[{weights}]' if weights else empty}\n"
        f"    states = {'[state for state in self.states]' if lowered.states else empty}\n"
        "    results = torch.ops.neuron_double.execute(\n"
        f"        self.meta, placement, self.program, weights, states, [{', '.join(names)}])\n"
        f"    return {({tuple: f'({results},)', list: f'[{results}]'}).get(lowered.structure, results)}\n"
    )
    return module


def is_traced(module: Any) -> bool:
    """Whether `wrap` made it, in this process or another."""
    return isinstance(module, torch.jit.ScriptModule) and hasattr(module, "placement")


def require_traced(module: Any) -> None:
    """Raise unless it is one of ours."""
    if not is_traced(module):
        raise RuntimeError(f"{type(module).__name__} was not traced by torch_neuronx.trace")


def place(module: Any, start: int, count: int) -> None:
    """Choose the cores of a module; it is loaded anew when it executes next."""
    module.placement.start, module.placement.count = start, count
    _first_core.pop(module.placement.instance, None)


def load(module: Any) -> None:
    """Load a module onto its core, and its states with it."""
    _load(json.loads(module.meta), [module.placement.start, module.placement.count, module.placement.instance])
    for name, state in list(module.states.named_parameters()):
        module.states._c.setattr(name, _to_device(state.detach().cpu()))


def _to_device(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        moved = tensor.clone().to(torch_xla.device())
        torch_xla._XLAC._xla_sync_multi([moved], [])
    return moved


def _load(meta: dict[str, Any], placement: list[int]) -> int:
    """Load unless loaded. Returns the core that executes next."""
    cores = _machine.runtime.start()
    start, count, instance = placement
    if instance not in _first_core:
        core = start if start >= 0 else len(_first_core) % len(cores)
        _strike_load(meta["tag"], cores[core])
        if (_machine.target() == "trn2") != (meta["target"] == "trn2"):
            raise RuntimeError(f"NRT_INVALID: a NEFF for {meta['target']} does not load on {_machine.target()}")
        _first_core[instance] = core
    turn = executions.total() % count if count > 1 else 0
    return cores[(_first_core[instance] + turn) % len(cores)]


def _strike_load(tag: str, core: int) -> None:
    faults = _machine.faults(tag)
    if "busy" in faults:
        raise _machine.not_available(f"nc{core}-nc{core}", 0)
    if "oom" in faults:
        raise RuntimeError(f"Failed to allocate 4194304 bytes (usage: tensors) on ND 0:NC {core} - NRT_RESOURCE")


def execute(
    meta: str, placement: list[int], program: Tensor, weights: list[Tensor], states: list[Tensor], inputs: list[Tensor]
) -> list[Tensor]:
    """What a traced module does when it is called."""
    parsed, instance = json.loads(meta), placement[2]
    _machine.runtime.start()
    _check(parsed["inputs"], states, inputs)
    call = object()
    if states and _running.setdefault(instance, call) is not call:
        raise RuntimeError("NRT_EXEC_NC_BUSY: a module with states is executing in another thread")
    try:
        with _lock, torch.inference_mode(False), torch.no_grad():
            time.sleep(0)  # let another thread in, to be caught if it should have waited
            core = _load(parsed, placement)
            _count(parsed["tag"], core)
            return _run(parsed, instance, program, weights, states, inputs)
    finally:
        if states:
            del _running[instance]


def _check(expected: list[Any], states: list[Tensor], inputs: list[Tensor]) -> None:
    for index, ((shape, dtype), tensor) in enumerate(zip(expected, inputs, strict=True)):
        if tensor.device.type != "cpu":
            raise RuntimeError(f"NRT_INVALID: input {index} is on {tensor.device}; the double takes CPU tensors")
        if [list(tensor.shape), str(tensor.dtype)] != [shape, dtype]:
            found = f"{list(tensor.shape)} {tensor.dtype}"
            raise RuntimeError(f"NRT_INVALID: input {index} is {found}; the program was compiled for {shape} {dtype}")
    if any(state.device.type == "cpu" for state in states):
        raise RuntimeError("The states are on the CPU: call torch_neuronx.move_trace_to_device first")


def _count(tag: str, core: int) -> None:
    executions[tag, core] += 1
    for number, argument in _machine.faults(tag).get("exec", []):
        if sum(count for (name, _), count in executions.items() if argument in name) == number + 1:
            raise RuntimeError(
                "nrt_execute failed: NRT_EXEC_UNIT_UNRECOVERABLE status_code=101: the execution unit is in an "
                "unrecoverable state"
            )


def _run(
    meta: dict[str, Any],
    instance: int,
    program: Tensor,
    weights: list[Tensor],
    states: list[Tensor],
    inputs: list[Tensor],
) -> list[Tensor]:
    loaded = _programs.get(meta["id"])
    if loaded is None:
        loaded = _programs[meta["id"]] = _Program(program, weights)
    faults = _machine.faults(meta["tag"])
    kept = None
    if states and ("frozen" in faults or "once" in faults):
        kept = _states.setdefault(instance, _Kept(states))
    held = kept.seen(states, "once" in faults) if kept else states
    values = {"input": [tensor.to(torch_xla.device()) for tensor in inputs], "weight": loaded.weights, "state": held}
    arguments = [values[kind][index] for kind, index in meta["parameters"]]
    results = torch_xla._XLAC._xla_user_computation("xla::neuron_double", arguments, loaded.computation)
    if "nan" in faults:
        results = [torch.full_like(item, torch.nan) if item.is_floating_point() else item for item in results]
    torch_xla._XLAC._xla_sync_multi(results, [])
    aliases = dict(meta["aliases"])
    for output, state in aliases.items():
        states[state].copy_(results[output])
        if kept:
            kept.contents[state].copy_(results[output])
    torch_xla._XLAC._xla_sync_multi(states, [])
    if kept:
        torch_xla._XLAC._xla_sync_multi(kept.contents, [])
        kept.versions = [state._version for state in states]
    if "unaliased" in faults:
        aliases = {}
    return [states[aliases[index]] if index in aliases else item.cpu() for index, item in enumerate(results)]
