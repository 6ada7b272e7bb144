"""The target: find the `Xtts` model, check versions before anything is touched, say what the graphs can serve."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import nn

from neuron_xtts.errors import Fallback, ModelNotReadyError, UnsupportedVersionError
from neuron_xtts.hooks import check_unhooked

#: What this library was written for and is tested on. pyproject.toml says the same.
SUPPORTED = {"coqui-tts": ">=0.27.3,<0.29", "transformers": ">=4.57,<6", "torch": ">=2.8"}


def check_versions() -> None:
    """Raise `UnsupportedVersionError` unless every package that is patched is of a supported version."""
    for package, supported in SUPPORTED.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UnsupportedVersionError(
                f"{package} is not installed; neuron_xtts needs {package}{supported}: "
                f'pip install "{package}{supported}"'
            ) from None
        if not SpecifierSet(supported).contains(installed, prereleases=True):
            raise UnsupportedVersionError(
                f"{package} {installed} is installed; neuron_xtts supports {package}{supported}: "
                f'pip install "{package}{supported}"'
            )


def find_xtts(model: Any) -> Any:
    """Return the ``Xtts`` inside a ``TTS.api.TTS``, a ``Synthesizer`` or itself.

    Raises:
        TypeError: ``model`` is none of them, or holds a model other than XTTS.
        ModelNotReadyError: it is one of them, but no XTTS that can synthesize is loaded.
    """
    from TTS.api import TTS
    from TTS.tts.models.xtts import Xtts
    from TTS.utils.synthesizer import Synthesizer

    found = model
    if isinstance(found, TTS):
        found = found.synthesizer
        if found is None:
            raise ModelNotReadyError(
                "This TTS holds no text-to-speech model (its synthesizer is None). "
                'Load one first, such as TTS("tts_models/multilingual/multi-dataset/xtts_v2").'
            )
    if isinstance(found, Synthesizer):
        found = found.tts_model
        if found is None:
            raise ModelNotReadyError(
                "This Synthesizer holds no text-to-speech model (its tts_model is None). "
                "Create it with the checkpoint of an XTTS model."
            )
    if not isinstance(found, Xtts):
        inside = "" if found is model else f" holding a {type(found).__name__}"
        raise TypeError(
            f"Expected a TTS.api.TTS, a Synthesizer or an Xtts with an XTTS model, got a {type(model).__name__}{inside}"
        )
    return found


def check_ready(xtts: Any) -> None:
    """Raise `ModelNotReadyError` unless coqui-tts itself could synthesize with ``xtts``."""
    if getattr(xtts, "gpt", None) is None:
        raise ModelNotReadyError("This Xtts has no GPT yet. Call load_checkpoint(...) on it before patch().")
    if not hasattr(xtts.gpt, "gpt_inference"):
        raise ModelNotReadyError(
            "This Xtts was not made ready for inference. Call load_checkpoint(..., eval=True) or eval() before patch()."
        )


def check_gpt(gpt: Any) -> None:
    """Raise `Fallback` where the GPT's architecture is not the one that the transformer graphs compute."""
    trunk = gpt.gpt
    _check_class(trunk, "GPT2Model")
    for block in trunk.h:
        _check_class(block, "GPT2Block")
        _check_class(block.attn, "GPT2Attention")
        _check_class(block.mlp, "GPT2MLP")
    config = trunk.config
    expected = {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }
    for name, value in expected.items():
        if getattr(config, name, value) != value:
            raise Fallback(f"GPT-2 with {name}={getattr(config, name)!r}")
    if not isinstance(gpt.mel_pos_embedding, nn.Module):
        raise Fallback("a GPT without learned positions")


def check_vocoder(decoder: Any) -> None:
    """Raise `Fallback` where the vocoder's architecture is not the one that the vocoder graph computes."""
    generator = decoder.waveform_decoder
    _check_class(generator, "HifiganGenerator")
    for block in generator.resblocks:
        _check_class(block, "ResBlock1", "ResBlock2")
    if hasattr(generator, "lin_pre") or not hasattr(generator, "cond_layer"):
        raise Fallback("a HiFi-GAN without speaker conditioning, or with a linear layer in front")


def check_conditioning(gpt: Any) -> None:
    """Raise `Fallback` where the voice encoder's architecture is not the one that the conditioning graph computes."""
    if not gpt.use_perceiver_resampler:
        raise Fallback("a GPT without perceiver resampler")
    encoder, perceiver = gpt.conditioning_encoder, gpt.conditioning_perceiver
    _check_class(encoder, "ConditioningEncoder")
    for block in encoder.attn:
        _check_class(block, "AttentionBlock")
        _check_class(block.attention, "QKVAttentionLegacy")
        if block.tortoise_norm or block.relative_pos_embeddings is not None:
            raise Fallback("a conditioning encoder with tortoise_norm or relative positions")
    for conv in (encoder.init, *(conv for block in encoder.attn for conv in (block.qkv, block.proj_out))):
        _check_class(conv, "Conv1d")
        if (conv.kernel_size, conv.stride, conv.padding, conv.groups) != ((1,), (1,), (0,), 1):
            raise Fallback("a conditioning encoder with convolutions over time")
    _check_class(perceiver, "PerceiverResampler")
    _check_class(perceiver.norm, "RMSNorm")
    if perceiver.norm.cond:
        raise Fallback("a perceiver with a conditioned norm")
    for attn, mlp in perceiver.layers:
        _check_class(attn, "Attention")
        _check_class(attn.attend, "Attend")
        if not attn.cross_attn_include_queries or attn.attend.causal or attn.attend.attn_dropout.p:
            raise Fallback("a perceiver whose attention is causal, has dropout or leaves out the latents")
        if [type(module).__name__ for module in mlp] != ["Linear", "GEGLU", "Linear"]:
            raise Fallback("a perceiver with another MLP")


def _check_class(module: nn.Module, *known: str) -> None:
    if type(module).__name__ not in known:
        raise Fallback(f"a {type(module).__name__} where a {' or '.join(known)} belongs")


def check_state(*modules: nn.Module) -> None:
    """Raise `Fallback` where torch would not compute in fp32 on the CPU, or would call code of somebody else.

    Args:
        modules: those whose ``forward`` the graphs do not call, the first of them with parameters.
    """
    weight = next(modules[0].parameters())
    if weight.device.type != "cpu":
        raise Fallback(f"weights on {weight.device.type}")
    if weight.dtype != torch.float32:
        raise Fallback(f"weights of {weight.dtype}")
    if torch.is_autocast_enabled("cpu"):
        raise Fallback("autocast")
    check_unhooked(modules)
