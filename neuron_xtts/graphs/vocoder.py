"""The HiFi-GAN vocoder of XTTS as a graph over one window of frames.

Shapes: B rows, C channels, T frames in a window, G speaker channels, hop samples per frame (256 in XTTS v2).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neuron_xtts.graphs.operators import Graph, Mask

LRELU_SLOPE = 0.1  # a fact of the checkpoint, as in the HiFi-GAN paper's code
FINAL_LRELU_SLOPE = 0.01  # torch's default, which HiFi-GAN uses before its last convolution


class Generator(Protocol):
    """A coqui-tts ``HifiganGenerator`` without ``lin_pre``, as far as it is read."""

    conv_pre: nn.Conv1d
    cond_layer: nn.Conv1d
    ups: Sequence[nn.ConvTranspose1d]
    cond_in_each_up_layer: bool
    conds: Sequence[nn.Conv1d]
    resblocks: nn.ModuleList
    num_kernels: int
    conv_post: nn.Conv1d


class Vocoder(Graph):
    """HiFi-GAN with a validity mask at every convolution's input.

    A convolution pads its input with zeros at the ends of the audio. Frames that pad a window hold zeros too, but
    biases and speaker conditioning make them anything but zero one layer later: multiplying every input by the mask
    restores what the convolution would have seen.

    Args:
        generator: of the model.
    """

    ups: Sequence[nn.ConvTranspose1d]
    conds: Sequence[nn.Conv1d] | None

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.conv_pre = generator.conv_pre
        self.cond_layer = generator.cond_layer
        self.ups = generator.ups
        self.conds = generator.conds if generator.cond_in_each_up_layer else None
        self.resblocks = generator.resblocks
        self.kernels = generator.num_kernels
        self.conv_post = generator.conv_post

    def forward(self, frames: Tensor, speaker: Tensor, mask: Mask | None = None) -> tuple[Tensor]:
        """Waveform of a window.

        Args:
            frames: (B, C, T).
            speaker: (B or 1, G, 1) speaker embedding.
            mask: (1, 1, T), one where there is a frame and zero where there is padding, or what the operators take for
                it; None means no padding.

        Returns:
            audio (B, 1, T * hop). Within the receptive field of a padded or cut edge it is only right if the edge is
            one of the whole audio.
        """
        leaky_relu, masked = self.operators.leaky_relu, self.operators.masked
        x = self.conv_pre(masked(frames, mask)) + self.cond_layer(speaker)
        for i, up in enumerate(self.ups):
            x = up(masked(leaky_relu(x, LRELU_SLOPE), mask))
            if self.conds is not None:
                x += self.conds[i](speaker)
            if mask is not None:
                mask = mask.repeat_interleave(up.stride[-1], -1)
            blocks = self.resblocks[i * self.kernels : (i + 1) * self.kernels]
            total = self.resblock(blocks[0], x, mask)
            for block in blocks[1:]:
                total += self.resblock(block, x, mask)
            x = total.div_(self.kernels)
        x = self.conv_post(masked(leaky_relu(x, FINAL_LRELU_SLOPE), mask))
        return (x.tanh(),)

    def resblock(self, block: nn.Module, x: Tensor, mask: Mask | None) -> Tensor:
        """A HiFi-GAN residual block of type 1 (pairs of convolutions) or 2 (single ones)."""
        leaky_relu, masked = self.operators.leaky_relu, self.operators.masked
        for convs in residual_layers(block):
            y = x
            for conv in convs:
                y = conv(masked(leaky_relu(y, LRELU_SLOPE, inplace=y is not x), mask))
            x = y.add_(x)  # in place: nobody else sees what a convolution returned
        return x

    def lowerable(self, *, fill: bool) -> Vocoder:
        """A copy with plain convolutions, because weight norm does not lower."""
        folded = fold_weight_norm(self)
        if fill:
            fill_small_kernels(folded)
        return folded

    def example(self, *bucket: int) -> dict[str, Tensor]:
        """Inputs by name for a window of frames, the last of them padding."""
        (frames,) = bucket
        return self._example(frames, padding=1)

    def examples(self, *bucket: int) -> list[dict[str, Tensor]]:
        """Inputs by name: nearly full, half of it padding, and full."""
        (frames,) = bucket
        return [self._example(frames, padding) for padding in (1, frames // 2, 0)]

    def _example(self, frames: int, padding: int) -> dict[str, Tensor]:
        mask = torch.ones(1, 1, frames)
        mask[:, :, frames - padding :] = 0
        return {
            "frames": torch.randn(1, self.conv_pre.in_channels, frames),
            "speaker": torch.randn(1, self.cond_layer.in_channels, 1),
            "mask": mask,
        }


def fold_weight_norm(vocoder: Vocoder) -> Vocoder:
    """A copy with plain convolutions where the model's are parametrized by weight norm, which does not lower.

    Not ``remove_parametrizations`` on a deepcopy: it deletes from the class that the copy shares with the original.
    """
    folded = copy.deepcopy(vocoder)
    for path, conv in list(folded.named_modules()):
        # Those that are not parametrized any more still hold a hook of it, which cannot be pickled.
        if not isinstance(conv, (nn.Conv1d, nn.ConvTranspose1d)):
            continue
        parent, _, name = path.rpartition(".")
        kind = nn.ConvTranspose1d if isinstance(conv, nn.ConvTranspose1d) else nn.Conv1d
        sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        # On no device: initial weights would be drawn from the generator that codes are drawn from.
        options: dict[str, Any] = {"dilation": conv.dilation, "bias": conv.bias is not None, "device": "meta"}
        plain: Any = kind(*sizes, **options)  # type: ignore[arg-type]
        plain.weight = nn.Parameter(conv.weight.detach().clone(), requires_grad=False)
        plain.bias = conv.bias
        setattr(folded.get_submodule(parent), name, plain)
    for i, block in enumerate(folded.resblocks):
        folded.resblocks[i] = plain_block(block)
    return folded


def plain_block(block: nn.Module) -> nn.Module:
    """A residual block with the same convolutions that is of torch alone: a process that loads it needs no more."""
    plain = nn.Module()
    for name in ("convs1", "convs2") if hasattr(block, "convs1") else ("convs",):
        plain.add_module(name, getattr(block, name))
    return plain


def fill_small_kernels(vocoder: Vocoder) -> None:
    """Replace convolutions whose kernel is smaller than their dilation by equal ones without dilation, in place.

    Zeros stand between the taps: a kernel of 3 with dilation 5 becomes one of 11.

    Args:
        vocoder: of `fold_weight_norm`.
    """
    for path, conv in list(vocoder.named_modules()):
        if not isinstance(conv, nn.Conv1d) or conv.kernel_size[0] >= conv.dilation[0]:
            continue
        parent, _, name = path.rpartition(".")
        setattr(vocoder.get_submodule(parent), name, without_dilation(conv))


def without_dilation(conv: nn.Conv1d) -> nn.Conv1d:
    """A convolution that computes the same, with zeros between the taps of its kernel."""
    (kernel,), (dilation,) = conv.kernel_size, conv.dilation
    size = (kernel - 1) * dilation + 1
    stride: Any = conv.stride
    padding: Any = conv.padding
    filled = nn.Conv1d(conv.in_channels, conv.out_channels, size, stride=stride, padding=padding, device="meta")
    weight = conv.weight.detach()
    taps = weight.new_zeros(*weight.shape[:2], size)
    taps[:, :, ::dilation] = weight
    filled.weight = nn.Parameter(taps, requires_grad=False)
    filled.bias = conv.bias
    return filled


def residual_layers(block: Any) -> list[tuple[Any, ...]]:
    """The convolutions of a residual block, grouped by residual connection."""
    if hasattr(block, "convs1"):
        return list(zip(block.convs1, block.convs2, strict=True))
    return [(conv,) for conv in block.convs]


def receptive_field(vocoder: Vocoder) -> tuple[int, int]:
    """Frames to the left and to the right that the audio of one frame depends on (13 on either side in XTTS v2)."""
    hop = math.prod(up.stride[0] for up in vocoder.ups)
    first, last = _widen((0, hop - 1), vocoder.conv_post)
    for i in reversed(range(len(vocoder.ups))):
        blocks = vocoder.resblocks[i * vocoder.kernels : (i + 1) * vocoder.kernels]
        reach = max(sum(_radius(conv) for convs in residual_layers(block) for conv in convs) for block in blocks)
        up = vocoder.ups[i]
        stride, kernel, padding = up.stride[0], up.kernel_size[0], int(up.padding[0])
        # Output t of a transposed convolution reads the inputs i with 0 <= t + padding - i * stride < kernel.
        first = math.ceil((first - reach + padding - kernel + 1) / stride)
        last = math.floor((last + reach + padding) / stride)
    first, last = _widen((first, last), vocoder.conv_pre)
    return -first, last


def halo_of(graphs: Iterable[nn.Module]) -> int:
    """Frames to either side that the audio of a frame depends on, in the vocoder among ``graphs``; 0 without one."""
    return max((max(receptive_field(graph)) for graph in graphs if isinstance(graph, Vocoder)), default=0)


def _radius(conv: nn.Conv1d) -> int:
    radius: int = conv.dilation[0] * (conv.kernel_size[0] - 1) // 2
    return radius


def _widen(span: tuple[int, int], conv: nn.Conv1d) -> tuple[int, int]:
    return span[0] - _radius(conv), span[1] + _radius(conv)
