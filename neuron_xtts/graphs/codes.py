"""Several codes in one call: decode steps that embed, draw and look out for the stop code on the device.

Shapes are those of ``transformer.py``, and N steps. Compilers have no sort, so top-k and top-p are thresholds, between
which and the next score an interval is narrowed down: by counting the scores above some points, or by adding up the
shares below them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuron_xtts.graphs.operators import MASKED, Graph, Stateful
from neuron_xtts.graphs.transformer import Decode, Trunk, spread

# An interval is cut into so many parts, so many times: into 2^30, about as fine as fp32 tells scores apart.
_PARTS, _CUTS = 32, 6
# Chances that differ by less, as a share, are alike to a device that rounds exponentials in its own way; so are sums of
# shares that differ by less.
_ALIKE, _EDGES = 1e-3, (-5e-3, 5e-3)


class CodeTables(NamedTuple):
    """What codes are embedded by, where they stand in the audio, and the code that stops a row."""

    codes: nn.Embedding
    places: nn.Embedding
    stop: int


class Rules(NamedTuple):
    """How rows draw: the columns (B, 1) of a tensor (B, 7), or the numbers of one row.

    Attributes:
        penalty: on codes that it had.
        temperature: 1 for none.
        kept: top-k; as many as there are codes for all.
        cut: the share of the least likely codes that top-p leaves out; below zero for none.
        early: codes that must come before the stop code may.
        draws: 1 to draw, 0 to take the likeliest.
        stopped: 1 if it has stopped, and goes on with stop codes.
    """

    penalty: Any
    temperature: Any
    kept: Any
    cut: Any
    early: Any
    draws: Any
    stopped: Any


class Drawn(NamedTuple):
    """What rows have drawn.

    Attributes:
        codes: (B,) int32, the latest.
        seen: (B, V) 1 for each code that a row had, else 0.
        stopped: (B, 1) 1 if it has stopped, else 0.
    """

    codes: Tensor
    seen: Tensor
    stopped: Tensor

    def then(self, codes: Tensor, stop: int) -> Drawn:
        """With the next codes (B,) of every row."""
        every = torch.arange(self.seen.shape[1], device=codes.device)
        seen = torch.where(every == codes.unsqueeze(1), 1.0, self.seen)
        return Drawn(codes, seen, torch.where(codes.unsqueeze(1) == stop, 1.0, self.stopped))


class Codes(Graph):
    """Several audio codes per row, each drawn from the logits of the one before.

    Args:
        decode: one step.
        tables: what codes are embedded by.
    """

    def __init__(self, decode: Decode, tables: CodeTables) -> None:
        super().__init__()
        self.decode = decode
        self.codes, self.places, self.stop = tables

    def extra_repr(self) -> str:
        """What the weights do not say."""
        return f"stop={self.stop}"

    @property
    def trunk(self) -> Trunk:
        """Of the steps."""
        return self.decode.trunk

    @property
    def vocabulary(self) -> int:
        """Codes that there are, V."""
        return self.codes.num_embeddings

    def forward(
        self,
        codes: Tensor,
        places: Tensor,
        seen: Tensor,
        rules: Tensor,
        waits: Tensor,
        positions: Tensor,
        *cache: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run N steps. A row that has no position left writes its last one over and over.

        Args:
            codes: (B,) int32, the latest of each row.
            places: (B,) int32, its place in the audio.
            seen: (B, V) 1 for each code that the repetition penalty holds against a row, else 0.
            rules: (B, 7), as `Rules` names them.
            waits: (B, N, V) numbers of the standard exponential distribution. The code with the largest share for its
                wait is drawn, as ``torch.multinomial`` draws one.
            positions: (B,) int32, the slot of the cache that each row writes first.
            cache: as for `Decode.forward`.

        Returns:
            codes (B, N) int32, the latents (B, N, D) and logits (B, N, V) that they were drawn from, and what they were
            drawn by: scores (B, N, V), in which the best stands for every code that was left out.
        """
        slots = torch.arange(cache[0].shape[2], device=codes.device)
        named = Rules(*rules.unsqueeze(2).unbind(1))
        drawn = Drawn(codes, seen, named.stopped)
        steps = []
        for step in range(waits.shape[1]):
            place = torch.clamp(places + step, max=self.places.num_embeddings - 1)
            at = torch.clamp(positions + step, max=len(slots) - 1)
            mask = torch.where(slots <= at.unsqueeze(1), 0.0, MASKED)[:, None, None]  # (B, 1, 1, S)
            embeds = (self.codes(drawn.codes) + self.places(place)).unsqueeze(1)
            latents, logits = self.decode(embeds, at, mask, *cache)
            scores, chances = _chances(logits, drawn, named, waits[:, step], step, self.stop)
            drawn = drawn.then(_next(chances, drawn, self.stop), self.stop)
            steps.append((drawn.codes, latents, logits, scores))
        found = [torch.stack(tensors, dim=1) for tensors in zip(*steps, strict=True)]
        return found[0], found[1], found[2], found[3]

    def examples(self, *bucket: int) -> list[dict[str, Tensor]]:
        """Inputs by name: in the middle of a bucket, at its start, and at its end; with rules of every kind."""
        slots, positions, steps = bucket
        firsts = (positions // 2, 0, positions - steps, positions - 1)
        return [self._example(slots, positions, steps, first, kind) for kind, first in enumerate(firsts)]

    def example(self, *bucket: int) -> dict[str, Tensor]:
        """Inputs by name for a number of rows, of positions and of steps."""
        return self.examples(*bucket)[0]

    def _example(self, slots: int, positions: int, steps: int, first: int, kind: int) -> dict[str, Tensor]:
        given = dict(zip(("codes", "places", "seen", "rules", "waits"), self.given(slots, steps, kind), strict=True))
        at = (torch.arange(slots, dtype=torch.int32) + first) % positions
        return given | {"positions": at}

    def given(self, rows: int, steps: int, kind: int = 0) -> tuple[Tensor, ...]:
        """Random inputs of some rows, all but their positions, with rules of a kind and the next ones."""
        every = self.vocabulary
        some = [
            Rules(5.0, 0.75, 50, 0.15, 0, 1, 0),  # coqui-tts's own
            Rules(1.0, 1.0, every, -1.0, (steps + 1) // 2, 0, 0),
            Rules(2.0, 1.3, every, 0.05, 0, 1, 0),
            Rules(1.0, 0.5, 5, -1.0, 1, 1, 1),
        ]
        return (
            torch.randint(every, (rows,), dtype=torch.int32),
            # The last kind is at the end of the table, where places are the last one over and over.
            torch.randint(self.places.num_embeddings - steps, (rows,), dtype=torch.int32)
            if kind < len(some) - 1
            else torch.full((rows,), self.places.num_embeddings - 1, dtype=torch.int32),
            (torch.rand(rows, every) < 0.1).float(),
            torch.tensor([some[(row + kind) % len(some)] for row in range(rows)]),
            torch.empty(rows, steps, every).exponential_(),
        )

    def arrange(
        self, given: Sequence[Tensor], slots: Sequence[int], positions: Sequence[int], width: int
    ) -> tuple[Tensor, ...]:
        """What `forward` takes if some slots step: see `Decode.arrange`. What the others draw nobody looks at."""
        return (*(spread(tensor, slots, len(positions)) for tensor in given), torch.tensor(positions).int())

    def expected(self, inputs: Sequence[Tensor], found: Sequence[Tensor], cache: Sequence[Tensor]) -> list[Tensor]:
        """What a device is to return that drew the codes that were ``found``, and the codes that it was to draw.

        One that rounds otherwise draws another code now and then, and everything differs from there on.

        Args:
            inputs: as for `forward`.
            found: what the device returned.
            cache: as for `forward`.
        """
        codes, places, seen, rules, waits, positions = inputs
        drawn, _, logits, scores = found[:4]
        every = torch.arange(self.vocabulary)
        forced = torch.where(every == drawn.unsqueeze(2), 1e-30, 1e30)
        free = torch.tensor(Rules(1.0, 1.0, self.vocabulary, -1.0, 0, 1, 0)).repeat(len(rules), 1)
        free[:, -1] = rules[:, -1]
        _, latents, expected_logits, _ = self(codes, places, seen, free, forced, positions, *cache)
        named = Rules(*rules.unsqueeze(2).unbind(1))
        # What top-p leaves out is known but for what lies at its edge.
        edges = [named._replace(cut=torch.where(named.cut < 0, named.cut, named.cut + by)) for by in _EDGES]
        state, ours, shown = Drawn(codes, seen, named.stopped), [], []
        for step in range(drawn.shape[1]):
            given = waits[:, step], step, self.stop
            _, chances = _chances(logits[:, step], state, named, *given)
            more, fewer = (_chances(logits[:, step], state, edge, *given)[0] for edge in edges)
            its_scores = scores[:, step]
            shown.append(torch.where((its_scores - more).abs() <= (its_scores - fewer).abs(), more, fewer))
            code, its = _next(chances, state, self.stop), drawn[:, step]
            chance = chances.gather(1, its.long().clamp(0, self.vocabulary - 1).unsqueeze(1))
            alike = (chance >= chances.amax(1, keepdim=True) * (1 - _ALIKE)).squeeze(1) & (state.stopped[:, 0] == 0)
            ours.append(torch.where(alike, its, code))
            state = state.then(its, self.stop)
        return [torch.stack(ours, dim=1), latents, expected_logits, torch.stack(shown, dim=1)]

    def in_bucket(self, *bucket: int) -> nn.Module:
        """Steps that hold the cache among their parameters."""
        slots, positions, _ = bucket
        return StatefulCodes(self, slots, positions)


class StatefulCodes(Stateful):
    """`Codes` with the cache as parameters.

    Args:
        codes: the graph.
        slots: rows, B.
        positions: slots of the cache per row, S.
    """

    outputs = 4

    def __init__(self, codes: Codes, slots: int, positions: int) -> None:
        super().__init__(codes.trunk.cache_shapes(slots, positions))
        self.codes = codes

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run steps as `Codes.forward` does; returns codes, latents, logits, scores, then the cache."""
        cache = [state.clone() for state in self.states]
        return (*self.codes(*inputs, *cache), *cache)

    def expected(self, inputs: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See `Codes.expected`."""
        cache = [state.clone() for state in self.states]
        return (*self.codes.expected(inputs, found, cache), *cache)


def _chances(logits: Tensor, drawn: Drawn, rules: Rules, waits: Tensor, step: int, stop: int) -> tuple[Tensor, Tensor]:
    """What ``logits`` (B, V) come to with ``waits`` (B, V).

    Returns:
        scores (B, V), in which the best stands for every code that is left out, and chances (B, V), of which the
        largest is drawn.
    """
    every = torch.arange(logits.shape[1], device=logits.device)
    punished = torch.where(logits < 0, logits * rules.penalty, logits / rules.penalty)
    scores = torch.where(drawn.seen > 0, punished, logits) / rules.temperature
    barred = (every == stop) & (rules.early > step)
    scores, there = torch.where(barred, MASKED, scores), ~barred
    top = scores.amax(1, keepdim=True)
    least = torch.where(there, scores, top).amin(1, keepdim=True)

    def enough(points: Tensor) -> Tensor:
        """Whether as many as are kept reach the points (B, W)."""
        count = (scores.unsqueeze(1) >= points.unsqueeze(2)).float().sum(2)
        return torch.ge(count, rules.kept)

    kept = _narrowed(least, top + 1, enough)
    there = there & (scores >= kept)
    shares = torch.softmax(torch.where(there, scores, MASKED), dim=1)

    def unlikely(points: Tensor) -> Tensor:
        """Whether all that do not exceed the points (B, W) are left out."""
        below = torch.where(scores.unsqueeze(1) <= points.unsqueeze(2), shares.unsqueeze(1), 0.0)
        return torch.le(below.sum(2), rules.cut)

    cut = _narrowed(kept - 1, top, unlikely)
    there = there & ((scores > cut) | (scores >= top))
    chances = torch.where(rules.draws > 0, torch.where(there, shares, 0.0) / waits, scores)
    return torch.where(there, scores, top), chances


def _narrowed(low: Tensor, high: Tensor, holds: Callable[[Tensor], Tensor]) -> Tensor:
    """Where between two points (B, 1) something that holds for small ones holds last; ``low`` if nowhere."""
    for _ in range(_CUTS):
        points = low + (high - low) * (torch.arange(1, _PARTS, device=low.device) / _PARTS)  # (B, W)
        held = holds(points)
        low, high = (
            torch.where(held, points, low).amax(1, keepdim=True),
            torch.where(held, high, points).amin(1, keepdim=True),
        )
    return low


def _next(chances: Tensor, drawn: Drawn, stop: int) -> Tensor:
    """The codes (B,) int32 with the best ``chances`` (B, V); ``stop`` for rows that have stopped."""
    # In fp32, which holds them all: the least of 64-bit integers begins with one that compilers refuse.
    every = torch.arange(chances.shape[1], device=chances.device).float()
    best = torch.where(chances >= chances.amax(1, keepdim=True), every, every[-1]).amin(1, keepdim=True)
    return torch.where(drawn.stopped > 0, float(stop), best).squeeze(1).int()
