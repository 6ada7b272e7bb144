"""Calls: what the scheduler knows of a caller's rows from their prefix to their last code."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence

import transformers
from torch import Tensor

from neuron_xtts.coqui.constants import STREAM_CHUNK
from neuron_xtts.decoding.batch import Parked
from neuron_xtts.decoding.row import Row
from neuron_xtts.recorder import Growing
from neuron_xtts.turns import Urgency, later

Step = tuple[Tensor, Tensor]  # a code (rows,) and its latents (rows, D) of every row

# Codes of a stream that are made before they are asked for: coqui-tts's chunk, unless it is told otherwise.
AHEAD = STREAM_CHUNK


class Call:
    """Rows that begin together, from the prefixes of one call of coqui-tts's, and end together.

    Args:
        rows: as many for each prefix, one prefix after another.
        prefix: (B, P, D) embeddings.
        identity: of what it is to be computed with (`Runner.identity`).
        streamed: its steps are asked for one by one, and not made far ahead.
        with_cache: its rows' keys and values are wanted.
        patient: it waits, however many others do, as of `Caller`.
        urgency: of its next step.

    Attributes:
        steps: that were made, and that nobody took yet.
        cache: of its rows when it is over, if wanted.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        prefix: Tensor,
        identity: Hashable,
        *,
        streamed: bool = False,
        with_cache: bool = False,
        patient: bool = False,
        urgency: Urgency = later,
    ) -> None:
        self.rows = rows
        self.prefix = prefix
        self.identity = identity
        self.streamed = streamed
        self.with_cache = with_cache
        self.urgency = urgency
        self.made = time.monotonic()
        self.steps: deque[Step] = deque()
        self.cache: transformers.DynamicCache | None = None
        self.codes: Tensor | None = None  # (rows,) drawn last
        self.utterance = 0  # of the timeline
        self.asked: Growing | None = None  # when its caller waited last
        self.parked: list[Parked] = []
        self.error: BaseException | None = None
        self.begun = False  # it waits, or did
        self.patient = patient
        self.over = False  # nothing more will be computed
        self.given_up = False
        self.waited_for = False
        self.woken = threading.Event()

    @property
    def ready(self) -> bool:
        """Whether its caller has nothing to wait for."""
        return self.over or (self.streamed and bool(self.steps))

    @property
    def wants(self) -> bool:
        """Whether another step is to be made for it."""
        return not self.over and not self.given_up and (not self.streamed or len(self.steps) < AHEAD)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will be computed."""
        self.error = error
        self.over = True
        self.wake()

    def wake(self) -> None:
        """Have its caller, if that waits, look what there is."""
        if self.waited_for:
            self.woken.set()
