"""The picture of a report: utterances over time, rows that decode together, and how full buckets are."""

from __future__ import annotations

import bisect
import itertools
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from neuron_xtts.timeline import Event, Phase, Span, Timeline, Utterance

# Okabe and Ito's colours, which everybody can tell apart; and greys that are lighter and darker than all of them.
COLORS = {
    Phase.VOICE: "#CC79A7",
    Phase.WAITING: "#4D4D4D",
    Phase.PREFILL: "#E69F00",
    Phase.DECODE: "#0072B2",
    Phase.SAMPLING: "#56B4E9",
    Phase.LATENTS: "#F0E442",
    Phase.VOCODER: "#009E73",
    Phase.AROUND: "#C8C8C8",
}
# From below, in the overview.
_STACK = (
    Phase.VOICE, Phase.PREFILL, Phase.DECODE, Phase.SAMPLING, Phase.LATENTS, Phase.VOCODER, Phase.AROUND, Phase.WAITING,
)  # fmt: skip
FALLBACK = "#D55E00"  # lines across what coqui-tts served
HATCH = "////"

_THICK, _THIN = 0.8, 0.16  # of a lane; waiting is thin
_INTERVALS = 150  # of the overview
_BUCKETS = 12  # that are shown by themselves
_REASONS = 8
_PAUSE = 1.0  # seconds in which nothing was asked for, above which they are cut out
# What is left of a pause, and of all together, as a share of everything else.
_CUT = 0.02
_ALL_CUTS = 0.3
_LABELLED = 12  # pauses, above which there is no room to say how long each was


class Use(NamedTuple):
    """How a bucket was used.

    Attributes:
        graph: its graph.
        bucket: its name.
        runs: how many.
        seconds: in them.
        waste: the share of the work that was padding.
    """

    graph: str
    bucket: str
    runs: int
    seconds: float
    waste: float


class Clock:
    """Where moments are on the axis of time: seconds since the first, with long pauses cut short.

    Args:
        busy: start and end of whatever there is.

    Attributes:
        pauses: where each begins on the axis, and how many seconds it was.
        width: of a pause.
        end: of the axis.
    """

    def __init__(self, busy: Iterable[tuple[float, float]]) -> None:
        self._parts: list[list[float]] = []
        for start, end in sorted(busy):
            if self._parts and start - self._parts[-1][1] <= _PAUSE:
                self._parts[-1][1] = max(end, self._parts[-1][1])
            else:
                self._parts.append([start, end])
        total = sum(end - start for start, end in self._parts)
        self.width = total * min(_CUT, _ALL_CUTS / len(self._parts)) if self._parts else 0.0
        self.pauses: list[tuple[float, float]] = []
        self._places: list[float] = []
        place = 0.0
        for number, (start, end) in enumerate(self._parts):
            if number:
                self.pauses.append((place, start - self._parts[number - 1][1]))
                place += self.width
            self._places.append(place)
            place += end - start
        self.end = place
        self._starts = [start for start, _ in self._parts]

    def at(self, moment: float) -> float:
        """The place of a moment in which there is something."""
        number = bisect.bisect_right(self._starts, moment) - 1
        return self._places[number] + moment - self._starts[number]


def draw(headline: str, timeline: Timeline, uses: Sequence[Use], latest: int) -> Figure:
    """Draw a report.

    Args:
        headline: above everything.
        timeline: of its model.
        uses: of buckets.
        latest: how many utterances to draw one by one, the latest ones; of more, how many were at what.
    """
    known = timeline.utterances()
    if not known:
        return _nothing(headline)
    utterances, uses = known[-latest:], _most_used(uses)
    reasons = _reasons(known)
    heights = {
        "overview": 1.5 if len(utterances) < len(known) else 0,
        "utterances": 0.6 + 0.2 * len(utterances),
        "batch": 1.2,
        "buckets": 0.5 + 0.2 * max(len(uses), 1),
        "reasons": 0.2 * len(set(reasons.values())),
    }
    heights = {name: height for name, height in heights.items() if height}
    figure = Figure(figsize=(11, sum(heights.values()) + 0.25 * len(heights) + 1), layout="constrained")
    panels = dict(zip(heights, figure.subplots(len(heights), height_ratios=list(heights.values())), strict=True))
    if "overview" in panels:
        _draw_overview(panels["overview"], known)
    start, end = min(each.start for each in utterances), max(each.end for each in utterances)
    steps = [step for step in timeline.steps() if step.end > start and step.start < end]
    spans = [(span.start, span.end) for utterance in utterances for span in utterance.spans]
    clock = Clock([*spans, *((max(step.start, start), min(step.end, end)) for step in steps)])
    panels["batch"].sharex(panels["utterances"])
    _draw_utterances(panels["utterances"], clock, utterances, reasons)
    shown = f"the latest {len(utterances)} of {timeline.number}" if len(utterances) < timeline.number else "all"
    _title(
        panels["utterances"],
        f"Utterances ({shown}); where decode and sampling are stacked, height is their share of the time",
    )
    _draw_batch(panels["batch"], clock, steps, start, end)
    _draw_buckets(panels["buckets"], uses)
    if reasons:
        _write_reasons(panels["reasons"], reasons)
    figure.suptitle(headline, x=0.01, ha="left")
    _draw_legend(figure)
    return figure


def _nothing(headline: str) -> Figure:
    figure = Figure(figsize=(11, 2), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0.5, 0.5, "nothing was spoken", ha="center", va="center", transform=axes.transAxes)
    figure.suptitle(headline, x=0.01, ha="left")
    return figure


def _title(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize="medium")


def _draw_overview(axes: Any, utterances: Sequence[Utterance]) -> None:
    """How many utterances were in each phase, on average over as many intervals as can be seen."""
    clock = Clock((span.start, span.end) for utterance in utterances for span in utterance.spans)
    width = clock.end / _INTERVALS
    layers: dict[tuple[Phase, bool], list[float]] = {}
    for span in (span for utterance in utterances for span in utterance.spans):
        left = clock.at(span.start)
        for phase, share in _shares(span).items():
            layer = layers.setdefault((phase, span.reason is not None), [0.0] * _INTERVALS)
            for number in range(int(left / width), min(int((left + span.seconds) / width) + 1, _INTERVALS)):
                inside = min(left + span.seconds, (number + 1) * width) - max(left, number * width)
                layer[number] += share * max(inside, 0.0) / width
    edges, bottom = [number * width for number in range(_INTERVALS + 1)], [0.0] * _INTERVALS
    order = [(phase, fell_back) for fell_back in (False, True) for phase in _STACK]
    for phase, fell_back in (key for key in order if key in layers):
        top = [a + b for a, b in zip(bottom, layers[phase, fell_back], strict=True)]
        axes.stairs(top, edges, baseline=bottom, fill=True, **_style(phase, fell_back))
        bottom = top
    axes.set(xlim=(0, clock.end), ylim=(0, max(bottom) * 1.1), ylabel="utterances")
    cut = ", pauses cut out" if clock.pauses else ""
    axes.set_xlabel(f"seconds since the first that is remembered{cut}")
    _title(axes, f"What the {len(utterances)} utterances that are remembered were at")
    _draw_pauses(axes, clock)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _reasons(utterances: Sequence[Utterance]) -> dict[str, str]:
    """A letter for each reason why coqui-tts served something; the last letter for all that are left."""
    found = dict.fromkeys(span.reason for utterance in utterances for span in utterance.spans if span.reason)
    return {reason: "abcdefghijklmnopqrstuvwxyz"[min(i, _REASONS - 1)] for i, reason in enumerate(found)}


def _draw_utterances(axes: Any, clock: Clock, utterances: Sequence[Utterance], reasons: dict[str, str]) -> None:
    bars: dict[tuple[Phase, bool], list[tuple[float, float, float, float]]] = {}
    for lane, utterance in enumerate(utterances):
        for span in utterance.spans:
            for phase, bar in _bars(span, clock, lane):
                bars.setdefault((phase, span.reason is not None), []).append(bar)
        for reason in dict.fromkeys(span.reason for span in utterance.spans if span.reason):
            longest = max((span for span in utterance.spans if span.reason == reason), key=lambda span: span.seconds)
            _draw_letter(axes, clock.at(longest.start), lane, reasons[reason])
    for (phase, fell_back), boxes in sorted(bars.items(), key=lambda item: item[0][1]):
        _draw_bars(axes, phase, boxes, fell_back)
    axes.set_yticks(range(len(utterances)), [_label(utterance) for utterance in utterances], fontsize="small")
    axes.set(ylim=(len(utterances) - 0.4, -0.6), xlim=(0, clock.end))
    _draw_pauses(axes, clock)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=False)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)


def _label(utterance: Utterance) -> str:
    if utterance.streamed:
        return f"{utterance.number}, stream"
    spoken = any(span.phase not in (Phase.VOICE, Phase.WAITING) for span in utterance.spans)
    return str(utterance.number) if spoken else f"{utterance.number}, voice"


def _bars(span: Span, clock: Clock, lane: int) -> Iterable[tuple[Phase, tuple[float, float, float, float]]]:
    """Boxes (left, bottom, width, height) of a span; steps have their shares of time on top of each other."""
    left, width = clock.at(span.start), span.seconds
    if span.phase is Phase.WAITING:
        yield span.phase, (left, lane - _THIN / 2, width, _THIN)
        return
    bottom = lane + _THICK / 2  # lanes are counted downwards
    for phase, share in _shares(span).items():
        bottom -= _THICK * share
        yield phase, (left, bottom, width, _THICK * share)


def _shares(span: Span) -> dict[Phase, float]:
    """The phases that a span's time went to."""
    around = 1 - span.decoding - span.sampling
    shares = ((span.phase, span.decoding), (Phase.SAMPLING, span.sampling), (Phase.AROUND, around))
    return {phase: share for phase, share in shares if share > 1e-6}


def _style(phase: Phase, fell_back: bool) -> dict[str, Any]:
    if fell_back:
        label = f"{phase.value}, coqui-tts"
        return {"facecolor": COLORS[phase], "hatch": HATCH, "edgecolor": FALLBACK, "linewidth": 0.8, "label": label}
    return {"facecolor": COLORS[phase], "linewidth": 0, "label": phase.value}


def _draw_bars(axes: Any, phase: Phase, boxes: Sequence[tuple[float, float, float, float]], fell_back: bool) -> None:
    corners = [[(x, y), (x, y + h), (x + w, y + h), (x + w, y)] for x, y, w, h in boxes]
    axes.add_collection(PolyCollection(corners, **_style(phase, fell_back)))


def _draw_letter(axes: Any, left: float, lane: int, letter: str) -> None:
    box = {"facecolor": "white", "edgecolor": FALLBACK, "linewidth": 0.6, "pad": 1}
    axes.annotate(
        letter, (left, lane), (3, 0), textcoords="offset points", va="center", fontsize="x-small", bbox=box, zorder=5
    )


def _draw_pauses(axes: Any, clock: Clock) -> None:
    for left, seconds in clock.pauses:
        axes.axvspan(left, left + clock.width, facecolor="white", edgecolor="#999999", hatch="xx", linewidth=0)
        if axes.get_xlabel() and len(clock.pauses) <= _LABELLED:
            said = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
            place = axes.get_xaxis_transform()
            axes.text(left + clock.width / 2, 1.02, said, ha="center", va="bottom", fontsize="x-small", transform=place)


def _draw_batch(axes: Any, clock: Clock, steps: Sequence[Event], start: float, end: float) -> None:
    """Rows that decoded together at each moment, on all engines."""
    changes: dict[float, int] = {}
    for step in steps:
        for moment, rows in ((max(step.start, start), step.rows), (min(step.end, end), -step.rows)):
            changes[moment] = changes.get(moment, 0) + rows
    moments = sorted(changes)
    counts = list(itertools.accumulate(changes[moment] for moment in moments))
    places = [clock.at(moment) for moment in moments]
    color = COLORS[Phase.DECODE]
    axes.fill_between([0.0, *places, clock.end], [0, *counts, 0], step="post", color=color, linewidth=0)
    cut = ", pauses cut out" if clock.pauses else ""
    axes.set(
        xlabel=f"seconds since the first of these utterances{cut}", ylabel="rows", ylim=(0, max([1, *counts]) * 1.1)
    )
    _title(axes, "Batch: rows that decoded together")
    _draw_pauses(axes, clock)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _most_used(uses: Sequence[Use]) -> list[Use]:
    """The buckets that took most time, in the order of the report, and what is left as one."""
    if len(uses) <= _BUCKETS:
        return list(uses)
    most = sorted(uses, key=lambda use: -use.seconds)[: _BUCKETS - 1]
    rest = [use for use in uses if use not in most]
    runs, seconds = sum(use.runs for use in rest), sum(use.seconds for use in rest)
    waste = sum(use.waste * use.seconds for use in rest) / seconds if seconds else 0.0
    return [*(use for use in uses if use in most), Use(f"{len(rest)} others", "", runs, seconds, waste)]


def _draw_buckets(axes: Any, uses: Sequence[Use]) -> None:
    """The shares of work and padding of each bucket."""
    names = [f"{use.graph} {use.bucket}".strip().replace("exactxexact", "exact") for use in uses]
    used, waste = [100 * (1 - use.waste) for use in uses], [100 * use.waste for use in uses]
    places = range(len(uses))
    axes.barh(places, used, color=COLORS[Phase.DECODE], label="used")
    axes.barh(places, waste, left=used, color="white", edgecolor="#999999", hatch="....", linewidth=0, label="padding")
    axes.set_yticks(places, names, fontsize="small")
    for place, use in zip(places, uses, strict=True):
        axes.text(
            101, place, f"{use.runs} run{'s' * (use.runs > 1)}, {use.seconds:.2f} s", va="center", fontsize="small"
        )
    axes.set(xlabel="% of the work", xlim=(0, 118), ylim=(len(uses) - 0.4, -0.6))
    axes.set_xticks(range(0, 101, 20))
    _title(axes, "Buckets since patch(): used, and padding (dotted)")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _write_reasons(axes: Any, reasons: dict[str, str]) -> None:
    said: dict[str, list[str]] = {}
    for reason, letter in reasons.items():
        said.setdefault(letter, []).append(reason)
    lines = [
        f"{letter}  " + (textwrap.shorten(each[0], 150) if len(each) == 1 else f"{len(each)} other reasons")
        for letter, each in said.items()
    ]
    axes.text(0, 1, "\n".join(lines), va="top", fontsize="small", transform=axes.transAxes)
    axes.set_axis_off()


def _draw_legend(figure: Figure) -> None:
    handles = [Patch(facecolor=COLORS[phase], label=phase.value) for phase in Phase]
    handles.append(Patch(facecolor="white", edgecolor=FALLBACK, hatch=HATCH, label="coqui-tts (fallback)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small", frameon=False)
