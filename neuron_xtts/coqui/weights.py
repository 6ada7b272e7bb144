"""What a graph's weights are: a cheap stamp that says whether they may have changed, and a digest that says what."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

Stamp = tuple[tuple[int, int], ...]


def stamp(tensors: Iterable[Tensor]) -> Stamp:
    """Changes when one of ``tensors`` is replaced, moved or written to (but not through ``tensor.data``)."""
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


class Tensors(Protocol):
    """Whatever has parameters and buffers, such as an ``nn.Module``."""

    def parameters(self) -> Iterable[Tensor]:
        """The parameters, in a fixed order."""

    def buffers(self) -> Iterable[Tensor]:
        """The buffers, in a fixed order."""


def tensors_of(module: Tensors) -> list[Tensor]:
    """The parameters and buffers of a module, in a fixed order."""
    return [*module.parameters(), *module.buffers()]


def is_plain(module: Tensors) -> bool:
    """Whether the weights of a module are what can be converted: fp32 on the CPU."""
    return all(tensor.dtype is torch.float32 and tensor.is_cpu for tensor in tensors_of(module))


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor: type, shape and contents."""
    data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(data.numpy().data)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@dataclass
class Digester:
    """SHA-256 digests of modules. Tensors that graphs share, as they share the trunk, are read once.

    Attributes:
        bytes_read: bytes of weights read so far.
        seconds: spent on that so far.
    """

    bytes_read: int = 0
    seconds: float = 0.0
    _known: dict[tuple[int, int], str] = field(default_factory=dict)

    def digest(self, module: nn.Module) -> str:
        """The digest of what a compiled program would contain of a module: its layers, their settings and weights."""
        start = time.perf_counter()
        layers = [(name, type(layer).__name__, layer.extra_repr()) for name, layer in module.named_modules()]
        tensors = [(name, self._tensor(tensor)) for name, tensor in module.state_dict(keep_vars=True).items()]
        self.seconds += time.perf_counter() - start
        return hashlib.sha256(json.dumps([layers, tensors]).encode()).hexdigest()

    def _tensor(self, tensor: Tensor) -> str:
        (key,) = stamp([tensor])
        if key not in self._known:
            self.bytes_read += tensor.nbytes
            self._known[key] = tensor_digest(tensor)
        return self._known[key]

    def __str__(self) -> str:
        rate = self.bytes_read / self.seconds if self.seconds else 0.0
        return f"{self.bytes_read / 1e6:.0f} MB of weights read in {self.seconds:.2f} s ({rate / 1e9:.2f} GB/s)"
