"""A TEST DOUBLE of the package ``torch_neuronx``: not the real one, and it needs no Neuron hardware.

It keeps the documented contract of ``torch_neuronx.trace`` on stock torch-xla and the host CPU: it refuses what the
real one refuses, and it executes the program that was lowered, never the Python. Nothing in it says anything about
speed, about the precision of bf16, or about what the real compiler makes of a program beyond the checks in
``_compiler``.

The environment says what to pretend, and is read whenever it matters:
    NEURON_DOUBLE_ROOT: root of a file system with the driver and devices of the machine. Unset: there are none.
    NEURON_DOUBLE_FAULT: what goes wrong, see `_machine.FAULTS`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import libneuronxla  # noqa: F401 - the real package needs it, too
import torch
from torch import Tensor, nn

# A test that forgets this package may leave its modules behind: they hold the environment of the first import.
for _name in [name for name in sys.modules if name.startswith(f"{__name__}.")]:
    del sys.modules[_name]
os.environ.setdefault("PJRT_DEVICE", "CPU")
# The real import runs this program, which pip puts beside the interpreter.
if str(Path(sys.executable).parent) not in os.environ.get("PATH", "").split(os.pathsep):
    raise FileNotFoundError(2, "No such file or directory", "libneuronpjrt-path")

from torch_neuronx import _compiler, _frontend, _machine, _runtime  # noqa: E402

__version__ = version("torch-neuronx")


def trace(
    func: nn.Module | Callable[..., Any],
    example_inputs: Tensor | tuple[Tensor, ...],
    *_: Any,
    input_output_aliases: dict[Tensor, int] = {},  # noqa: B006 - the signature of the real one
    compiler_workdir: str | None = None,
    compiler_args: str | list[str] | None = None,
    partitioner_config: Any = None,
    inline_weights_to_neff: bool = True,
    cpu_backend: bool = False,
    **unexpected: Any,
) -> torch.jit.ScriptModule:
    """Lower ``func``, check the program as the compiler would, and wrap it up as a ScriptModule."""
    if _:
        raise TypeError("Keyword arguments given as positional ones: the real trace only warns, and guesses")
    if unexpected:
        warnings.warn(f"Unexpected keyword arguments: {list(unexpected)}", UserWarning, stacklevel=2)
    if partitioner_config is not None or not inline_weights_to_neff:
        raise NotImplementedError("The double covers neither a partitioner nor weights outside of the NEFF")
    inputs = _frontend.check_inputs(example_inputs)
    states = _frontend.check_aliases(func, input_output_aliases)
    compiler = _compiler.Compiler(compiler_args, compiler_workdir)
    _initialize(compiler, cpu_backend)
    lowered = _frontend.lower(func, inputs, states, compiler.perturbation())
    compiler.compile(lowered)
    for index in lowered.unused:
        shape, dtype = inputs[index].shape, inputs[index].dtype
        warnings.warn(
            "Received an input tensor that was unused. Tensor will be ignored. "
            f"(index={index}, shape={shape}, dtype={dtype})",
            UserWarning,
            stacklevel=2,
        )
    return _runtime.wrap(lowered, compiler.tag, compiler.target)


def _initialize(compiler: _compiler.Compiler, cpu_backend: bool) -> None:
    """What tracing asks of the host."""
    if not cpu_backend:
        _machine.runtime.start()
        compiler.target = compiler.target or _machine.target()
        return
    if compiler.target is None:
        raise RuntimeError("Please supply compiler argument target with one of options trn1, inf2, trn1n, trn2")
    if not _machine.driver() and not _machine.TARGET_OVERRIDE:
        raise RuntimeError("Bad StatusOr access: INTERNAL: RET_CHECK failure (neuron client) !(num_devices > 0)")


def move_trace_to_device(trace: torch.jit.ScriptModule, device_id: int) -> None:
    """Place a traced module on a core, and its states with it: as new tensors; old handles of them are dead."""
    _runtime.require_traced(trace)
    cores = _machine.runtime.start()
    if isinstance(device_id, bool) or not isinstance(device_id, int):
        raise TypeError(f"move_trace_to_device takes the index of a NeuronCore, not {device_id!r}")
    if not 0 <= device_id < len(cores):
        raise RuntimeError(f"NRT_INVALID: no NeuronCore {device_id} among the {len(cores)} visible ones")
    _runtime.place(trace, device_id, 1)
    _runtime.load(trace)


def set_neuron_cores(trace: torch.jit.ScriptModule, start_nc: int = -1, nc_count: int = -1) -> None:
    """Choose the cores of a traced module; as documented, nothing happens to any other."""
    _check_cores(start_nc, nc_count)
    if _runtime.is_traced(trace):
        _runtime.place(trace, start_nc, nc_count)


@contextmanager
def neuron_cores_context(start_nc: int = -1, nc_count: int = -1) -> Iterator[None]:
    """Choose the cores of what ``torch.jit.load`` loads meanwhile, and of nothing else."""
    _check_cores(start_nc, nc_count)
    before, _runtime.context = _runtime.context, (start_nc, nc_count)
    try:
        yield
    finally:
        _runtime.context = before


def _check_cores(start_nc: int, nc_count: int) -> None:
    cores = len(_machine.runtime.start())
    if not -1 <= start_nc < cores:
        raise RuntimeError(f"NRT_INVALID: no NeuronCore {start_nc} among the {cores} visible ones")
    if nc_count != -1 and not 1 <= nc_count <= cores - max(start_nc, 0):
        raise ValueError(f"Invalid nc_count {nc_count}: {cores} NeuronCores are visible")


def _reset() -> None:
    """As in a new process: counters at zero, no runtime, no program loaded. Not part of the real package."""
    _runtime.reset()
    _machine.runtime.stop()
