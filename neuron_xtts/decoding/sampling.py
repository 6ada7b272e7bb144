"""Sampling on the host: transformers' public logits processors in Hugging Face's order, and the draw.

The order and the defaults are those of ``GenerationMixin.generate`` (transformers 4.57 to 5): repetition penalty,
minimum length, then, if sampling, temperature, top-k and top-p. The same seed therefore draws the same codes. For calls
that decode together the same is done of all their rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from torch import Tensor

from neuron_xtts.coqui.surface import GenerationConfig
from neuron_xtts.errors import Fallback
from neuron_xtts.graphs.codes import Rules

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

    @property
    def draws(self) -> bool:
        """Whether codes are drawn, and not the likeliest taken."""
        return self.sampling.do_sample or self.sampling.draws

    @property
    def source(self) -> torch.Generator | None:
        """What codes are drawn with, if they are drawn."""
        return (self.generator or torch.default_generator) if self.draws else None

    def rules(self, drawn: int, vocabulary: int, *, stopped: bool) -> Rules:
        """How a row draws on a device that has drawn so many codes."""
        sampling = self.sampling
        samples = sampling.do_sample
        return Rules(
            penalty=sampling.repetition_penalty,
            temperature=sampling.temperature if samples else 1.0,
            kept=min(sampling.top_k or vocabulary, vocabulary) if samples else vocabulary,
            cut=1 - sampling.top_p if samples and sampling.top_p < 1 else -1.0,
            early=sampling.min_new_tokens - drawn,
            draws=float(self.draws),
            stopped=float(stopped),
        )

    @property
    def least_length(self) -> int:
        """Of ids, before the stop code may come."""
        return self.prefix_length + self.sampling.min_new_tokens

    def draw(self, ids: Tensor, scores: Tensor) -> Tensor:
        """One code per row (B,).

        Args:
            ids: (B, P + N) the prefix and the codes so far.
            scores: (B, V) the logits.
        """
        for process in self._processors:
            scores = process(ids, scores)
        if not self.draws:
            return scores.argmax(dim=-1)
        shares = torch.softmax(scores, dim=-1)
        return torch.multinomial(shares, num_samples=1, generator=self.generator).squeeze(1)


def draw_together(calls: Sequence[tuple[Sampler, Sequence[Tensor]]], scores: Tensor) -> Tensor:
    """What `Sampler.draw` gives for every call, in the operators of one: as many as their rows, B, are together.

    Args:
        calls: each with its rows' ids, (P + N,).
        scores: (B, V) logits, the rows of one call after those of another.

    Returns:
        a code for each row (B,).
    """
    if len(calls) == 1:
        ((sampler, ids),) = calls
        return sampler.draw(torch.stack(list(ids)), scores)
    settings = [sampler.sampling for sampler, ids in calls for _ in ids]
    scores = _processed(settings, calls, scores)
    shares = torch.softmax(scores, dim=-1)
    # What torch.multinomial does for one draw, with the generators of all calls.
    waits = [torch.empty(len(ids), scores.shape[1]) for _, ids in calls]
    draws = [sampler.draws for sampler, ids in calls for _ in ids]
    for (sampler, _), wait in zip(calls, waits, strict=True):
        if sampler.draws:
            wait.exponential_(generator=sampler.generator)
    drawn = (shares / torch.cat(waits)).argmax(-1)
    return drawn if all(draws) else torch.where(torch.tensor(draws), drawn, scores.argmax(-1))


def _processed(
    settings: Sequence[Sampling], calls: Sequence[tuple[Sampler, Sequence[Tensor]]], scores: Tensor
) -> Tensor:
    """``scores`` (B, V) after the processors of each row's settings; where it has none, one that changes nothing."""

    def column(value: Callable[[Sampling], float]) -> Tensor:
        return torch.tensor([value(sampling) for sampling in settings]).unsqueeze(1)

    rows = [(sampler, ids) for sampler, each in calls for ids in each]
    penalty = column(lambda sampling: sampling.repetition_penalty)
    lengths = torch.tensor([len(ids) for _, ids in rows])
    seen = torch.zeros(scores.shape, dtype=torch.bool)
    seen[torch.arange(len(rows)).repeat_interleave(lengths), torch.cat([ids for _, ids in rows])] = True
    scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    early = [i for i, (sampler, ids) in enumerate(rows) if len(ids) < sampler.least_length]
    if early:
        scores[early, [rows[i][0].stop_code for i in early]] = -torch.inf
    scores = scores / column(lambda sampling: sampling.temperature if sampling.do_sample else 1.0)
    kept = [min(sampling.top_k, scores.shape[1]) if sampling.do_sample else 0 for sampling in settings]
    if any(kept):
        largest = torch.topk(scores, max(kept)).values
        least = largest.gather(1, torch.tensor(kept).clamp_min(1).sub(1).unsqueeze(1))
        least[torch.tensor(kept) == 0] = -torch.inf
        scores = scores.masked_fill(scores < least, -torch.inf)
    if any(sampling.do_sample and sampling.top_p < 1 for sampling in settings):
        ordered, order = torch.sort(scores)
        out = ordered.softmax(-1).cumsum(-1) <= column(lambda s: 1 - s.top_p if s.do_sample and s.top_p < 1 else -1.0)
        out[:, -1] = False
        scores = scores.masked_fill(out.scatter(1, order, out), -torch.inf)
    return scores
