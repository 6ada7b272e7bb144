"""Functions that the host runs as TorchScript: the product of a linear layer in each kind, and the blocks of one row.

Called from Python, an operator with packed weights takes 15 us before it begins; from TorchScript 6. With
``PYTORCH_JIT=0`` in the environment they run as Python, for a debugger.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Program = TypeVar("Program", bound=Callable[..., Tensor])
Layer = TypeVar("Layer")  # a linear layer as its product takes it

Rows = tuple[Tensor, Tensor, Tensor, Tensor]  # a linear layer in fp32, see `row_layer` in kernels.py
Norm = tuple[Tensor, Tensor, float]  # weight, bias and epsilon of a layer norm


def product_fp32(x: Tensor, layer: Rows) -> Tensor:
    """The product of one row and a linear layer in fp32."""
    weight, bias, rows, bags = layer
    partial = torch.embedding_bag(weight, rows, bags, False, 0, False, x.reshape(-1))[0]
    return (partial.sum(0) + bias).view(list(x.shape[:-1]) + [-1])  # noqa: RUF005  # TorchScript has no [*shape, -1]


# The type of packed weights exists at run time only. TorchScript finds it by its full name, not before it is needed.
def product_fp16(
    x: Tensor,
    layer: torch.classes.quantized.LinearPackedParamsBase,  # type: ignore[name-defined]
) -> Tensor:
    """The product of any rows and a linear layer with weights in fp16."""
    result: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, layer)
    return result


def product_int8(reduce_range: bool) -> Callable[[Tensor, Any], Tensor]:
    """The product of rows, which share a scale, and a linear layer in int8.

    Args:
        reduce_range: whether to keep to 7 bits of an activation.
    """

    # TorchScript closes over functions, but not over values: a default brings it in.
    def product(
        x: Tensor,
        layer: torch.classes.quantized.LinearPackedParamsBase,  # type: ignore[name-defined]
        reduce_range: bool = reduce_range,
    ) -> Tensor:
        result: Tensor = torch.ops.quantized.linear_dynamic(x, layer, reduce_range)
        return result

    return product


def norm(x: Tensor, layer: Norm) -> Tensor:
    """The layer norm of ``x``."""
    return torch.layer_norm(x, [x.shape[-1]], layer[0], layer[1], layer[2])


def sums(table: Tensor, rows: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of a table, as many of them as there are bags."""
    return torch.embedding_bag(table, rows, bags, False, 0, False, weights.to(table.dtype))[0]


def one_row_blocks(product: Callable[[Tensor, Layer], Tensor]) -> Callable[..., Tensor]:
    """All blocks of the trunk for one row and position, with ``product`` for their linear layers.

    Returns:
        a function of the embedding (1, 1, channels); keys (blocks, H, C, K, W) and values (blocks, H, S, K), into which
        it writes; the position; the indices of the rows of keys (H, C K) and of values (H, S); two norms per block;
        four linear layers per block; and per block what the MLP's activation is multiplied by, or None. H heads have K
        channels each, S slots lie in C chunks of W. It gives the last block's output (1, 1, channels).
    """

    def run(
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        at: int,
        chunk_rows: Tensor,
        slot_rows: Tensor,
        norms: list[Norm],
        layers: list[Layer],
        factors: list[Tensor | None],
    ) -> Tensor:
        heads, channels, width = keys.shape[1], keys.shape[3], keys.shape[4]
        chunks, used = at // width + 1, at + 1
        chunk_rows = chunk_rows.narrow(1, 0, chunks * channels).reshape(-1)
        slot_rows = slot_rows.narrow(1, 0, used).reshape(-1)
        chunk_bags, slot_bags = torch.arange(heads * chunks) * channels, torch.arange(heads) * used
        for i in range(keys.shape[0]):
            k, v = keys[i], values[i]
            query, key, value = product(norm(x, norms[2 * i]), layers[4 * i]).view(3, heads, channels).unbind()
            k.select(3, at % width).select(1, at // width).copy_(key)
            v.select(1, at).copy_(value)
            query = (query * channels**-0.5).unsqueeze(1).expand(heads, chunks, channels).reshape(-1)
            scores = sums(k.view(-1, width), chunk_rows, chunk_bags, query).view(heads, -1).narrow(1, 0, used)
            shares = torch.softmax(scores, -1, dtype=torch.float).view(-1)
            attended = sums(v.view(-1, channels), slot_rows, slot_bags, shares).to(x.dtype).view(x.shape)
            x = x + product(attended, layers[4 * i + 1])
            hidden = torch.ops.aten.gelu(product(norm(x, norms[2 * i + 1]), layers[4 * i + 2]), approximate="tanh")
            factor = factors[i]
            if factor is not None:
                hidden = hidden * factor
            x = x + product(hidden, layers[4 * i + 3])
        return x

    return run


def scripted(function: Program, product: Callable[..., Tensor] | None = None) -> Program:
    """A function in TorchScript, or, if torch, which gives it up, has it no more, the function itself.

    Args:
        function: in Python; without its source file, too, it stays as it is.
        product: where ``function`` is generic, the product that it was made with: its ``layer`` is ``Layer``.
    """
    try:
        typed = cast(FunctionType, function)
        if product is not None:
            # TorchScript looks for the types of parameters among a function's globals.
            layer = inspect.get_annotations(product, eval_str=True)["layer"]
            names = {**typed.__globals__, "Layer": layer}
            typed = FunctionType(typed.__code__, names, typed.__name__, typed.__defaults__, typed.__closure__)
        return cast(Program, torch.jit.script(typed))
    except Exception as error:  # what torch will raise one day is not known
        logger.warning("decoding is slower than it could be without TorchScript: %s", error)
        return function
