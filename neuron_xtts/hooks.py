"""Forward hooks of modules: which of them could change a result."""

from __future__ import annotations

import copy

from torch import nn

# transformers 5 leaves hooks of its own once hidden states were asked for, as coqui-tts's streams do. They record, and
# change nothing.
_RECORDERS = "transformers."


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` calls code of somebody else."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not _records(hook) for hook in hooks)


def without_recorders(module: nn.Module) -> nn.Module:
    """A copy of the structure, over the same tensors, without the hooks that only record: they cannot be pickled."""
    tensors = [*module.parameters(), *module.buffers()]
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for layer in copied.modules():
        for key, hook in list(layer._forward_hooks.items()):
            if _records(hook):
                del layer._forward_hooks[key]
    return copied


def _records(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_RECORDERS)
