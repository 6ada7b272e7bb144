"""Code of somebody else in a module: forward hooks, or another ``forward``. Which of it could change a result."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection
from typing import TypeVar

from torch import nn

from neuron_xtts.coqui.weights import tensors_of
from neuron_xtts.errors import Fallback

Module = TypeVar("Module", bound=nn.Module)

# transformers 5 leaves hooks of its own once hidden states were asked for, as coqui-tts's streams do. They record, and
# change nothing.
_RECORDERS = "transformers."


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` calls more than its class: hooks that do not just record, or another ``forward``."""
    if "forward" in vars(module):
        return True
    if not (module._forward_hooks or module._forward_pre_hooks):
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not _records(hook) for hook in hooks)


def unhooked(module: Module) -> Module:
    """The same layer over the same tensors, without anybody's code."""
    copied = copy.copy(module)
    vars(copied).pop("forward", None)
    copied._forward_hooks, copied._forward_pre_hooks = OrderedDict(), OrderedDict()
    return copied


def check_unhooked(modules: Collection[nn.Module]) -> None:
    """Raise `Fallback` if calling one of ``modules`` calls code of somebody else."""
    if any("forward" in vars(module) for module in modules):
        raise Fallback("a forward method that somebody replaced")
    if any(is_hooked(module) for module in modules):
        raise Fallback("forward hooks")


def without_recorders(module: Module) -> Module:
    """A copy of the structure, over the same tensors, without the hooks that only record: they cannot be pickled."""
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors_of(module)})
    for layer in copied.modules():
        for key, hook in list(layer._forward_hooks.items()):
            if _records(hook):
                del layer._forward_hooks[key]
    return copied


def _records(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_RECORDERS)
