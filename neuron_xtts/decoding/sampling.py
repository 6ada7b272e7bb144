"""Sampling on the host: transformers' public logits processors in Hugging Face's order, and the draw.

The order and the defaults are those of ``GenerationMixin.generate`` (transformers 4.57 to 5): repetition penalty,
minimum length, then, if sampling, temperature, top-k and top-p. The same seed therefore draws the same codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from torch import Tensor

from neuron_xtts.coqui.surface import GenerationConfig
from neuron_xtts.errors import Fallback

# Arguments of generate() that change nothing at these values. length_penalty only matters to beam search.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "use_cache": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "do_stream": False,  # of coqui-tts's own stream generator, up to 0.27.3
}
_IGNORED = {"length_penalty"}

# Set on every generation config, and overridden by the token ids that GPT.generate passes.
_CONFIG_BOOKKEEPING = {"bos_token_id", "eos_token_id", "pad_token_id", "_from_model_config", "transformers_version"}


Processor = Callable[[Tensor, Tensor], Tensor]


class _NotBefore(transformers.LogitsProcessor):  # type: ignore[misc]
    """Does as transformers' ``MinNewTokensLengthLogitsProcessor`` in one operator, not five: 50 us a code less."""

    def __init__(self, length: int, token: int) -> None:
        self.length = length
        self.token = torch.tensor([token])

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, self.token, -torch.inf) if ids.shape[1] < self.length else scores


@dataclass(frozen=True)
class Sampling:
    """What a call of ``GPT.generate`` asks for; the defaults are those of transformers' ``GenerationConfig``.

    With ``draws``, which is no argument of it, codes are drawn even without ``do_sample``.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    max_new_tokens: int = 0
    num_return_sequences: int = 1
    return_dict_in_generate: bool = False
    draws: bool = False

    @classmethod
    def parse(cls, kwargs: Mapping[str, Any], generation_config: GenerationConfig, max_new_tokens: int) -> Sampling:
        """Read the keyword arguments of ``generate``.

        Args:
            kwargs: as the caller gave them.
            generation_config: the model's own.
            max_new_tokens: the limit where the caller names none.

        Raises:
            Fallback: naming the argument that the decode loop does not know.
        """
        for name, value in generation_config.to_diff_dict().items():
            if name not in _CONFIG_BOOKKEEPING and not (name in _NEUTRAL and _NEUTRAL[name] == value):
                raise Fallback(f"generation_config.{name}")
        known = {field.name for field in fields(cls)} - {"draws"}
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        for name, value in kwargs.items():
            if name in known and value is not None:
                settings[name] = value
            elif name not in _IGNORED and not (name in _NEUTRAL and _NEUTRAL[name] == value):
                raise Fallback(f"argument {name}")
        sampling = cls(**settings)
        if sampling.max_new_tokens < 1:
            raise Fallback("argument max_new_tokens below 1")
        if sampling.num_return_sequences > 1 and not sampling.do_sample:
            raise Fallback("argument num_return_sequences without do_sample")
        if "return_dict_in_generate" in kwargs and not sampling.return_dict_in_generate:
            raise Fallback("argument return_dict_in_generate=False")  # coqui-tts looks for the name, not the value
        return sampling

    def processors(self, prefix_length: int, stop_token: int) -> list[Processor]:
        """The logits processors, in Hugging Face's order.

        Not a ``LogitsProcessorList``, which inspects the signature of every one at every call.
        """
        processors: list[Processor] = []
        if self.repetition_penalty != 1.0:
            processors.append(transformers.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.min_new_tokens > 0:
            processors.append(_NotBefore(prefix_length + self.min_new_tokens, stop_token))
        if self.do_sample:
            if self.temperature != 1.0:
                processors.append(transformers.TemperatureLogitsWarper(self.temperature))
            if self.top_k != 0:
                processors.append(transformers.TopKLogitsWarper(self.top_k))
            if self.top_p < 1.0:
                processors.append(transformers.TopPLogitsWarper(self.top_p))
        return processors


class Sampler:
    """What the codes of one call are drawn by.

    Args:
        sampling: what the call asked for.
        prefix_length: positions of the prefix, P.
        stop_code: the code that stops a row.
        generator: what codes are drawn with; None for torch's global one.
    """

    def __init__(
        self, sampling: Sampling, prefix_length: int, stop_code: int, generator: torch.Generator | None = None
    ) -> None:
        self.sampling = sampling
        self.prefix_length = prefix_length
        self.stop_code = stop_code
        self.generator = generator
        self._processors = sampling.processors(prefix_length, stop_code)

    def draw(self, ids: Tensor, scores: Tensor) -> Tensor:
        """One code per row (B,).

        Args:
            ids: (B, P + N) the prefix and the codes so far.
            scores: (B, V) the logits.
        """
        for process in self._processors:
            scores = process(ids, scores)
        if not (self.sampling.do_sample or self.sampling.draws):
            return scores.argmax(dim=-1)
        shares = torch.softmax(scores, dim=-1)
        return torch.multinomial(shares, num_samples=1, generator=self.generator).squeeze(1)
