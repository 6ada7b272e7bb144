"""What this library reads of coqui-tts: the typed surface of ``GPT``, ``HifiDecoder`` and ``Xtts``.

A new version of coqui-tts is a review of this file. What graphs are made of is typed beside them, in
``neuron_xtts.graphs``; whether a model has it is decided in ``recognise.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from neuron_xtts.graphs.conditioning import Encoder, Perceiver
from neuron_xtts.graphs.transformer import GPT2
from neuron_xtts.graphs.vocoder import Generator


class Module(Protocol):
    """An ``nn.Module``, as far as it is read."""

    training: bool

    def modules(self) -> Iterator[nn.Module]:
        """The module itself and all modules inside."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the module and of all modules inside."""

    def buffers(self) -> Iterator[Tensor]:
        """The buffers of the module and of all modules inside."""


class Trunk(GPT2, Module, Protocol):
    """The ``transformers.GPT2Model`` inside a ``GPT``."""

    config: object


class Positions(Protocol):
    """A ``LearnedPositionEmbeddings``: positions of text or audio."""

    emb: nn.Embedding

    def __call__(self, x: Tensor) -> Tensor:
        """Embeddings (T, D) of the first T positions, for ``x`` (B, T)."""

    def get_fixed_embedding(self, position: int, device: object) -> Tensor:
        """Embedding (1, 1, D) of one position."""


class GenerationConfig(Protocol):
    """A ``transformers.GenerationConfig``, as far as it is read."""

    def to_diff_dict(self) -> Mapping[str, object]:
        """Settings that differ from transformers' defaults, by name."""


class Inference(Protocol):
    """The ``GPT2InferenceModel`` of a ``GPT``, with which coqui-tts generates."""

    generation_config: GenerationConfig
    cached_prefix_emb: Tensor | None

    def store_prefix_emb(self, prefix: Tensor | None) -> None:
        """Put the embeddings of a prefix on the model, for the next generation."""


class ConditioningEncoder(Encoder, Module, Protocol):
    """The ``ConditioningEncoder`` of a ``GPT``."""


class PerceiverResampler(Perceiver, Module, Protocol):
    """The ``PerceiverResampler`` of a ``GPT``."""


class Gpt(Module, Protocol):
    """A ``TTS.tts.layers.xtts.gpt.GPT``."""

    gpt: Trunk
    final_norm: nn.LayerNorm
    mel_head: nn.Linear
    heads: int
    gpt_inference: Inference

    text_embedding: nn.Embedding
    text_pos_embedding: Positions
    mel_embedding: nn.Embedding
    mel_pos_embedding: Positions

    start_text_token: int
    stop_text_token: int
    start_audio_token: int
    stop_audio_token: int
    max_gen_mel_tokens: int
    code_stride_len: int

    use_perceiver_resampler: bool
    conditioning_encoder: ConditioningEncoder
    conditioning_perceiver: PerceiverResampler


class HifiganGenerator(Generator, Module, Protocol):
    """The ``HifiganGenerator`` of a ``HifiDecoder``."""


class HifiDecoder(Module, Protocol):
    """A ``TTS.tts.layers.xtts.hifigan_decoder.HifiDecoder``."""

    waveform_decoder: HifiganGenerator
    speaker_encoder: nn.Module
    input_sample_rate: int
    output_sample_rate: int
    output_hop_length: int
    ar_mel_length_compression: int


class Xtts(Module, Protocol):
    """A ``TTS.tts.models.xtts.Xtts``."""

    gpt: Gpt
    hifigan_decoder: HifiDecoder
    mel_stats: Tensor


class Networks(NamedTuple):
    """The two networks of an ``Xtts`` that graphs are made of."""

    gpt: Gpt
    decoder: HifiDecoder

    @classmethod
    def of(cls, xtts: Xtts) -> Networks:
        """The networks that a model has now."""
        return cls(xtts.gpt, xtts.hifigan_decoder)
