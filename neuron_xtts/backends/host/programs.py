"""Functions that the host runs as TorchScript: products of linear layers in each kind, and the blocks for rows.

Called from Python, an operator with packed weights takes 15 us before it begins; from TorchScript 6. With
``PYTORCH_JIT=0`` in the environment they run as Python, for a debugger.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from types import FunctionType
from typing import TypeVar, cast

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Program = TypeVar("Program", bound=Callable[..., Tensor])
Layer = TypeVar("Layer")  # a linear layer as its product takes it

# A linear layer in fp32: its weight, its bias, and the weight's rows in equal parts, see `row_layer` in kernels.py.
Rows = tuple[Tensor, Tensor, Tensor, Tensor]
Norm = tuple[Tensor, Tensor, float]  # weight, bias and epsilon of a layer norm
# Where in a block several rows write keys (R, H, K), among all elements, and values (R, H), among rows of K; the rows
# of W keys that they see, where the bags of each chunk begin (R H C), and whose head's query (R H) each is weighted by;
# the rows of K values, where the bags of each head begin (R H), and what share, of all (R H C W), each is weighted by.
Where = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def product_fp32(x: Tensor, layer: Rows) -> Tensor:
    """The product of one row and a linear layer in fp32."""
    weight, bias, rows, bags = layer
    partial = torch.embedding_bag(weight, rows, bags, False, 0, False, x.reshape(-1))[0]
    return (partial.sum(0) + bias).view(list(x.shape[:-1]) + [-1])  # noqa: RUF005  # TorchScript has no [*shape, -1]


def product_fp32_of_rows(x: Tensor, layer: Rows) -> Tensor:
    """The product of any rows and a linear layer in fp32 by oneDNN; how it rounds depends on how many there are."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer[0].t(), layer[1], "none", [], "")
    return result


# The type of packed weights exists at run time only. TorchScript finds it by its full name, not before it is needed.
def product_fp16(
    x: Tensor,
    layer: tuple[torch.classes.quantized.LinearPackedParamsBase, list[int]],  # type: ignore[name-defined]
) -> Tensor:
    """The product of any rows and a linear layer with weights in fp16: these, and how many rows to make of so many."""
    packed, made = layer
    rows = x.numel() // x.shape[-1]
    if rows >= len(made) or made[rows] == rows:
        result: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, packed)
        return result
    padded = torch.constant_pad_nd(x.reshape(rows, x.shape[-1]), [0, 0, 0, made[rows] - rows])
    result = torch.ops.quantized.linear_dynamic_fp16(padded, packed).narrow(0, 0, rows)
    return result.view(list(x.shape[:-1]) + [-1])  # noqa: RUF005


def product_int8(
    x: Tensor,
    layer: tuple[torch.classes.quantized.LinearPackedParamsBase, Tensor, float, int],  # type: ignore[name-defined]
) -> Tensor:
    """The product of any rows and a linear layer in int8: weight, bias, and scale and zero point of rows of size one.

    Every row is divided by its size, so that no other changes it. One of zeros becomes NaN, which FBGEMM takes for some
    number, and the size of zero makes nothing of that.
    """
    weight, bias, scale, zero_point = layer
    size = x.abs().amax([-1], True)
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x / size, scale, zero_point, weight)
    return torch.addcmul(bias, product, size)


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
        four linear layers per block; and per block the units of what is behind the MLP's activation, or None. H heads
        have K channels each, S positions lie in C chunks of W. It gives the last block's output (1, 1, channels).
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
        units: list[tuple[Tensor, Tensor] | None],
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
            unit = units[i]
            if unit is not None:
                hidden = torch.addcmul(unit[1], hidden, unit[0])
            x = x + product(hidden, layers[4 * i + 3])
        return x

    return run


def several_rows_blocks(product: Callable[[Tensor, Layer], Tensor]) -> Callable[..., Tensor]:
    """All blocks of the trunk for several rows, each at a position of its own, with ``product`` for linear layers.

    The arithmetic of a row is that of `one_row_blocks`, whatever the others are: of theirs nothing is summed with its.

    Returns:
        a function of embeddings (R, 1, channels); keys (blocks, B, H, C, K, W) and values (blocks, B, H, S, K) of B
        slots, into which it writes; where to; an additive mask (R, 1, C W) of the chunks of the longest row; norms,
        layers and units as there; and how many rows an activation may take at once.
    """

    def run(
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        where: Where,
        mask: Tensor,
        norms: list[Norm],
        layers: list[Layer],
        units: list[tuple[Tensor, Tensor] | None],
        together: int,
    ) -> Tensor:
        rows, heads, channels, width = x.shape[0], keys.shape[2], keys.shape[4], keys.shape[5]
        key_at, value_at, key_rows, key_bags, owners, value_rows, value_bags, shares_at = where
        for i in range(keys.shape[0]):
            k, v = keys[i], values[i]
            query, key, value = product(norm(x, norms[2 * i]), layers[4 * i]).view(rows, 3, heads, channels).unbind(1)
            k.view(-1).put_(key_at, key.to(k.dtype))
            v.view(-1, channels).index_put_([value_at], value.to(v.dtype))
            query = (query * channels**-0.5).view(-1, channels).index_select(0, owners).view(-1)
            scores = sums(k.view(-1, width), key_rows, key_bags, query).view(rows, heads, -1) + mask
            shares = torch.softmax(scores, -1, dtype=torch.float).view(-1).index_select(0, shares_at)
            attended = sums(v.view(-1, channels), value_rows, value_bags, shares).to(x.dtype).view(x.shape)
            x = x + product(attended, layers[4 * i + 1])
            hidden = product(norm(x, norms[2 * i + 1]), layers[4 * i + 2])
            if together < rows:
                parts = [torch.ops.aten.gelu(part, approximate="tanh") for part in torch.split(hidden, together)]
                hidden = torch.cat(parts)
            else:
                hidden = torch.ops.aten.gelu(hidden, approximate="tanh")
            unit = units[i]
            if unit is not None:
                hidden = torch.addcmul(unit[1], hidden, unit[0])
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
