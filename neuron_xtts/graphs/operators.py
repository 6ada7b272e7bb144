"""The operators of graphs that a backend may compute in its own way, and what every graph has in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

# Added to the score of a position that must not be attended to. Finite, because compilers turn infinities into NaN;
# in fp32 its exponential is exactly zero.
MASKED = -1e9

_SQRT_2_BY_PI = math.sqrt(2 / math.pi)
_SQRT_HALF = math.sqrt(0.5)


class Mask(Protocol):
    """Which frames of a window are no padding: a tensor (1, 1, T) of ones and zeros, or what stands for one."""

    def repeat_interleave(self, repeats: int, dim: int) -> Mask:
        """The mask of frames that are ``repeats`` times as many."""


class Operators:
    """Plain operators of torch, as compilers want them. They shape every compiled program."""

    def linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """``layer(x)`` of a linear layer of the trunk."""
        y: Tensor = layer(x)
        return y

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Softmax attention of ``q`` (B, H, L, K) over ``k`` and ``v`` (B, H, S, K), with an additive mask, if any."""
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, H, L, S)
        return torch.softmax(scores if mask is None else scores + mask, dim=-1) @ v

    def writer(self, positions: Tensor) -> Callable[[Tensor, Tensor], object]:
        """What writes (B, H, 1, K) into a cache (B, H, S, K), each row at its position (B,)."""
        index = positions.long().view(-1, 1, 1, 1)
        return lambda cache, new: cache.scatter_(2, index.expand_as(new), new)

    def leaky_relu(self, x: Tensor, slope: float, *, inplace: bool = False) -> Tensor:
        """``x`` where positive, else ``slope`` times ``x``, for 0 < slope < 1; in place only if it may be."""
        return torch.maximum(x, x * slope)  # torch's own lowers to a program with a 64-bit float

    def gelu(self, x: Tensor, *, tanh: bool = False) -> Tensor:
        """GELU, or its approximation by a hyperbolic tangent.

        Written out, because torch_neuronx puts a call of its own in place of torch's function, another program than the
        one that is lowered and compared here.
        """
        if tanh:
            return 0.5 * x * (1 + torch.tanh(x * (_SQRT_2_BY_PI + _SQRT_2_BY_PI * 0.044715 * (x * x))))
        return 0.5 * x * (1 + torch.erf(x * _SQRT_HALF))

    def masked(self, x: Tensor, mask: Mask | None) -> Tensor:
        """``x`` (B, C, T) with its padding set to zero, if there is any."""
        if mask is None:
            return x
        assert isinstance(mask, Tensor)  # whoever passes something else has operators for it
        return x * mask


PLAIN = Operators()


class Graph(nn.Module):
    """A program over tensors of fixed shapes, made of the very layers of a model: no weight is copied.

    Attributes:
        operators: what it computes with.
    """

    operators = PLAIN

    def use(self, operators: Operators) -> None:
        """Compute with other operators from now on."""
        for module in self.modules():
            if isinstance(module, Graph):
                module.operators = operators

    def example(self, *bucket: int) -> dict[str, Tensor]:
        """Random inputs by name that fill a bucket."""
        raise NotImplementedError

    def examples(self, *bucket: int) -> list[dict[str, Tensor]]:
        """Inputs by name to compare results on: from one end of what a bucket may be given to the other."""
        return [self.example(*bucket), self.example(*bucket)]

    def lowerable(self, *, fill: bool) -> Graph:
        """The same program with layers that lower; this graph and the model stay as they are.

        Args:
            fill: put zeros between the taps of convolutions whose kernel is smaller than their dilation.
        """
        return self

    def round_weights(self, known: dict[int, Tensor]) -> None:
        """Multiply by weights in bf16 from now on, in the parts that stand it; of a copy that `lowerable` made.

        Args:
            known: rounded weights by the identity of the weights, which graphs of a family share.
        """
        for part in self.children():
            if isinstance(part, Graph):
                part.round_weights(known)

    def in_bucket(self, *bucket: int) -> nn.Module:
        """The form that is compiled for a bucket, `Stateful` or not: it takes the inputs of `example`."""
        return self


class Stateful(nn.Module):
    """A graph in the form that tracers want: its state as parameters, the state's new contents its last outputs.

    Args:
        shapes: of each tensor of the state, which is zero at first.

    Attributes:
        states: the state.
        outputs: how many outputs come before it.
    """

    outputs = 2

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        tensors = (torch.zeros(*shape) for shape in shapes)
        self.states = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in tensors)

    def expected(self, inputs: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What a device is to return.

        Args:
            inputs: of a call.
            found: what the device returned, for graphs that decide something on the way.
        """
        outputs: tuple[Tensor, ...] = self(*inputs)
        return outputs


def states_of(module: nn.Module) -> list[Tensor]:
    """The state of what `Graph.in_bucket` made; none if it has none."""
    return list(module.states) if isinstance(module, Stateful) else []
