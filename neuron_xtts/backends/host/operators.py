"""The operators that the host computes in its own way, because torch has faster ones for the CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from neuron_xtts.backends.host.kernels import linear
from neuron_xtts.graphs.operators import Mask, Operators


class Padding:
    """A mask for padding at the end, which is set to zero in place: nothing else is touched.

    Args:
        start: where it begins.
    """

    def __init__(self, start: int) -> None:
        self.start = start

    def repeat_interleave(self, repeats: int, dim: int) -> Padding:
        """The padding of frames that are ``repeats`` times as many."""
        return Padding(self.start * repeats)


class HostOperators(Operators):
    """Operators of the CPU.

    Args:
        linear: how a linear layer of the trunk is applied.
    """

    def __init__(self, linear: Callable[[nn.Module, Tensor], Tensor] = linear) -> None:
        self._linear = linear

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """See `Operators.linear`."""
        return self._linear(layer, x)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `Operators.attention`: the fused kernel keeps no scores (L, S)."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def writer(self, positions: Tensor) -> Callable[[Tensor, Tensor], object]:
        """See `Operators.writer`."""
        if len(positions) > 1:
            return super().writer(positions)
        at = int(positions)  # half a millisecond a step in 60 small operators
        return lambda cache, new: cache.narrow(2, at, 1).copy_(new)

    def leaky_relu(self, x: Tensor, slope: float, *, inplace: bool = False) -> Tensor:
        """See `Operators.leaky_relu`."""
        return F.leaky_relu(x, slope, inplace)

    def gelu(self, x: Tensor, *, tanh: bool = False) -> Tensor:
        """See `Operators.gelu`."""
        return F.gelu(x, approximate="tanh" if tanh else "none")

    def masked(self, x: Tensor, mask: Mask | None) -> Tensor:
        """See `Operators.masked`."""
        if isinstance(mask, Padding):
            x[..., mask.start :] = 0
            return x
        return super().masked(x, mask)
