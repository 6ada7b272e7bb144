"""Memory for caches that grow: nothing of it is taken before it is used."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros whose memory the operating system hands out as they are written, in small pages."""
    # Not numpy.zeros: it asks for huge pages, of which a KV cache soon touches every one.
    private: dict[str, int] = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **private)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)
