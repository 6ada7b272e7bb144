"""What the host backend computes with where the model's own weights are not the fastest: converted copies.

They are converted once, at `patch`, and again when the model's weights have changed.
"""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from neuron_xtts.backends.host.kernels import linear, multiply, pack, row_layer
from neuron_xtts.backends.host.operators import HostOperators, Padding
from neuron_xtts.backends.host.smoothing import Units, find_units, linears_of, values_in
from neuron_xtts.backends.memory import Aside, give_back_memory
from neuron_xtts.coqui.hooks import is_hooked
from neuron_xtts.coqui.sample import Sample
from neuron_xtts.coqui.weights import Stamp, is_plain, stamp, tensors_of
from neuron_xtts.errors import Fallback
from neuron_xtts.graphs.transformer import Trunk
from neuron_xtts.graphs.vocoder import Vocoder, fold_weight_norm
from neuron_xtts.precision import WEIGHT_BYTES

logger = logging.getLogger(__name__)

State = tuple[tuple[int, ...], Stamp]  # of what was converted: changes when a layer or a weight is another


class Converted(NamedTuple):
    """A linear layer with converted weights.

    Attributes:
        layer: as `multiply` takes it.
        takes: the units of its input; None for those of the model.
        gives: the units of its output; likewise.
    """

    layer: Any
    takes: Units | None
    gives: Units | None


class Linears:
    """How the trunk's linear layers are applied.

    Args:
        kind: of their weights: ``"fp32"``, the model's own; ``"fp16"`` or ``"int8"``, copies.
        aside: where the originals of copies go; None to leave them where they are.
        sample: what int8 finds units with; None to compute in those of the model.

    Attributes:
        bytes: of copies.
    """

    def __init__(self, kind: str, aside: Aside | None = None, sample: Sample | None = None) -> None:
        self.kind = kind
        self.aside = aside
        self.bytes = 0
        self._sample = sample if kind == "int8" else None
        self._converted: dict[nn.Module, Converted] = {}
        self._stamp: State | None = None

    def is_current(self, trunk: Trunk) -> bool:
        """Whether the copies are of the weights that GPT-2 blocks have now."""
        return self.kind == "fp32" or self._state(trunk) == self._stamp

    def _state(self, trunk: Trunk) -> State:
        layers = _layers_to_convert(trunk)
        seen = [tensor for layer in layers for tensor in tensors_of(layer)]
        if self._sample:  # units depend on these, too
            norms = [norm for block in trunk.h for norm in (block.ln_1, block.ln_2)]
            seen += [*(tensor for norm in norms for tensor in tensors_of(norm)), *self._sample.tensors()]
        return tuple(map(id, layers)), stamp(seen)

    def convert(self, trunk: Trunk) -> None:
        """Make copies of the weights of GPT-2 blocks, unless they are there."""
        if self.is_current(trunk):
            return
        layers = _layers_to_convert(trunk)
        start = time.perf_counter()
        self._converted.clear()
        self.bytes = 0
        takes = self._units(trunk)
        # The values of attention are made in the units that the layer behind it takes.
        gives = {block.attn.c_attn: values_in(takes[block.attn.c_proj]) for block in trunk.h if takes}
        behind_activations = {block.mlp.c_proj for block in trunk.h}
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"  # of the packing; nothing else asks for it later
        try:
            for layer in layers:
                weight, bias = layer.weight.detach(), layer.bias.detach()
                if layer in takes:
                    weight, bias = takes[layer].taken(weight, bias)
                if layer in gives:
                    weight, bias = gives[layer].given(weight, bias)
                if not _holds(self.kind, weight, bias):
                    logger.warning("a linear layer keeps its weights, of which %s cannot hold some", self.kind)
                    continue
                packed = pack(self.kind, weight, bias, positive=layer in behind_activations and layer in takes)
                self._converted[layer] = Converted(packed, takes.get(layer), gives.get(layer))
                self.bytes += WEIGHT_BYTES[self.kind] * layer.weight.numel()
                if self.aside:
                    self.aside.move(layer.weight)
        finally:
            torch.backends.quantized.engine = engine
        self._stamp = self._state(trunk)
        seconds = time.perf_counter() - start
        logger.info("%d linear layers converted to %s in %.1f s", len(layers), self.kind, seconds)

    def _units(self, trunk: Trunk) -> dict[nn.Module, Units]:
        """The units of the layers' inputs, where they are others than the model's."""
        if self._sample is None:
            return {}
        try:
            with torch.autocast("cpu", enabled=False):
                return find_units(trunk, self._sample.embeds())
        except LookupError as reason:
            logger.warning("int8 computes in the model's units, which large channels may make coarse: %s", reason)
            return {}

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        """``module(x)``."""
        converted = self._converted.get(module)
        if converted is None or is_hooked(module):
            return linear(module, x)
        if converted.takes:
            x = converted.takes.into(x)
        y = multiply(self.kind, x, converted.layer)
        return converted.gives.out_of(y) if converted.gives else y

    def argument(self, module: Any) -> Any:
        """The layer as the function `product_of` its kind takes it: its input and output are in units of its own.

        Raises:
            LookupError: this layer is none that could be.
        """
        if not is_hooked(module):
            if self.kind == "fp32" and type(module) is Conv1D and module.weight.is_contiguous():
                return row_layer(module)
            if module in self._converted:
                return self._converted[module].layer
        raise LookupError(f"a {type(module).__name__} with hooks, or of another kind")

    def takes(self, module: nn.Module) -> Units | None:
        """The units of the input of a layer that has an `argument`; None for those of the model."""
        converted = self._converted.get(module)
        return converted.takes if converted else None


def _holds(kind: str, weight: Tensor, bias: Tensor) -> bool:
    """Whether copies of a kind have the numbers of a layer: FBGEMM would put others in place of what fp16 lacks."""
    largest = torch.finfo(torch.float16 if kind == "fp16" else torch.float32).max
    bounds = torch.stack([*torch.aminmax(weight), *torch.aminmax(bias)])
    return bool((bounds.abs() <= largest).all())  # false of NaN, too


def _layers_to_convert(trunk: Trunk) -> list[Any]:
    """Another kind of layer computes as it likes; with weights of another kind the route falls back."""
    layers = (layer for block in trunk.h for layer in linears_of(block))
    return [layer for layer in layers if type(layer) is Conv1D and is_plain(layer)]


class HostVocoder:
    """The vocoder graph with folded weights in a layout that the CPU computes fast.

    Args:
        vocoder: the graph.
        dtype: of its arithmetic, up to the last convolution, which is always in fp32.

    Attributes:
        bytes: of copies.
    """

    def __init__(self, vocoder: Vocoder, dtype: torch.dtype) -> None:
        self.vocoder = vocoder
        self.dtype = dtype
        self.bytes = 0
        self._stamp: State | None = None
        self._copy: Vocoder | None = None

    def is_current(self) -> bool:
        """Whether the copy is of the weights that the vocoder has now."""
        return self._state() == self._stamp

    def _state(self) -> State:
        return tuple(map(id, self.vocoder.modules())), stamp(tensors_of(self.vocoder))

    @torch.no_grad()
    def convert(self) -> None:
        """Make a copy of the weights, unless it is there."""
        if self.is_current():
            return
        now = self._state()
        self._copy, self._stamp = None, None
        if not is_plain(self.vocoder):
            return  # the route falls back
        copied = fold_weight_norm(self.vocoder)
        for module in copied.modules():
            if not isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) and not list(module.children()):
                raise Fallback(f"a {type(module).__name__} where a convolution belongs")
        channels_last(copied)
        copied.use(HostOperators())
        if self.dtype is not torch.float32:
            last = copied.conv_post
            copied.to(self.dtype)
            copied.conv_post = InFloat(last.float())  # type: ignore[assignment]
        self._copy, self._stamp = copied, now
        give_back_memory()  # the steps in between took more than the result
        self.bytes = sum(tensor.nbytes for tensor in tensors_of(copied))

    @torch.no_grad()
    def __call__(self, frames: Tensor, speaker: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
        """See `Vocoder.forward`; ``mask`` may have its zeros at the end only."""
        frames, speaker = frames.unsqueeze(2).to(self.dtype), speaker.unsqueeze(2).to(self.dtype)
        used = frames.shape[-1] if mask is None else int(mask.sum())
        padding = Padding(used) if used < frames.shape[-1] else None
        assert self._copy is not None  # `convert` came first
        (audio,) = self._copy(frames.contiguous(memory_format=torch.channels_last), speaker, padding)
        return (audio.squeeze(2),)


def channels_last(vocoder: Vocoder) -> None:
    """Replace convolutions over (B, C, T) by equal ones over (B, C, 1, T) with channels last in memory, in place.

    oneDNN computes those faster than one-dimensional ones (measured in docs/performance.md).

    Args:
        vocoder: of `fold_weight_norm`.
    """
    for path, conv in list(vocoder.named_modules()):
        if not isinstance(conv, (nn.Conv1d, nn.ConvTranspose1d)):
            continue
        kind: Any = nn.ConvTranspose2d if isinstance(conv, nn.ConvTranspose1d) else nn.Conv2d
        flat = kind(
            conv.in_channels,
            conv.out_channels,
            (1, *conv.kernel_size),
            stride=(1, *conv.stride),
            padding=(0, *conv.padding),
            dilation=(1, *conv.dilation),
            device="meta",
        )
        weight = conv.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        flat.weight = nn.Parameter(weight, requires_grad=False)
        flat.bias = conv.bias
        parent, _, name = path.rpartition(".")
        setattr(vocoder.get_submodule(parent), name, flat)


class InFloat(nn.Module):
    """A layer whose input is cast to fp32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result."""
        y: Tensor = self.layer(x.float())
        return y
