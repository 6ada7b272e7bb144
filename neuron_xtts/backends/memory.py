"""Memory: what caches grow into is taken when it is used, and weights that nothing computes with are on the disk."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import mmap
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros whose memory the operating system hands out as they are written, in small pages."""
    # Not numpy.zeros: it asks for huge pages, of which a KV cache soon touches every one.
    private: dict[str, int] = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **private)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


class Aside:
    """Weights of a model that were moved from memory into files, which are mapped in their place.

    Whoever computes with them all the same, as coqui-tts does in a fallback, reads them from the disk.

    Args:
        folder: on a disk, where the files are made. They have no name and vanish with the process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._moved: list[tuple[nn.Parameter, int]] = []
        self._full = False

    def move(self, parameter: nn.Parameter) -> None:
        """Move a parameter; where that fails, as on a full disk, it stays, and so do those that come later."""
        if self._full:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder) as file:
                file.write(parameter.detach().contiguous().numpy().data)
                file.flush()
                mapped = torch.from_file(file.name, shared=False, size=parameter.numel(), dtype=parameter.dtype)
        except OSError as error:
            logger.warning("fp32 weights stay in memory: %s", error)
            self._full = True
            return
        parameter.data = mapped.view(parameter.shape)
        give_back_memory()
        self._moved.append((parameter, mapped.data_ptr()))

    def bring_back(self) -> None:
        """Move every parameter back into memory, but for those that somebody gave another storage."""
        for parameter, pointer in self._moved:
            if parameter.data_ptr() == pointer:
                parameter.data = parameter.data.clone()
        self._moved.clear()


def give_back_memory() -> None:
    """Have the C library return freed memory to the operating system, where it can be asked to."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
