"""The timeline: what every utterance was at, exactly, and the picture of it."""

import copy
import itertools
import json
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest
import torch
from helpers import fallbacks, stop_after
from matplotlib.colors import to_hex

import neuron_xtts
from neuron_xtts import BucketPlan, Report
from neuron_xtts.patching.patch import find_patch
from neuron_xtts.picture import COLORS, FALLBACK, Clock
from neuron_xtts.recorder import KEPT, Recorder
from neuron_xtts.timeline import Event, Phase, Timeline

NOISE = 0.08  # seconds that a busy machine may add anywhere
TEXT = "the band plays an old song."


def timeline(model):
    return neuron_xtts.report(model).timeline


def check(utterances):
    """Spans are there, in order, and none overlaps another."""
    for utterance in utterances:
        assert utterance.spans
        for span in utterance.spans:
            assert span.start < span.end
            assert min(span.decoding, span.sampling) >= 0
            assert span.decoding + span.sampling < 1 + 1e-9
        for before, after in itertools.pairwise(utterance.spans):
            assert before.end <= after.start
        assert sum(utterance.seconds().values()) == pytest.approx(sum(span.seconds for span in utterance.spans))


def phases(utterance, but=(Phase.AROUND,)):
    """What an utterance was at in turn, but for some."""
    found = [span.phase for span in utterance.spans if span.phase not in but]
    return [phase for phase, _ in itertools.groupby(found)]


def calls(model, *routes):
    """The events of calls of routes."""
    return [event for event in timeline(model).events if event.route in routes]


def together(*works):
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


# What is recorded


def test_one_sentence(tts, xtts, reference):
    """Voice, prefill, decode, vocoder: as long as the call and as the report's own counters say."""
    stop_after(xtts, None)
    neuron_xtts.patch(tts, backend="cpu")
    start = time.perf_counter()
    tts.tts(TEXT, speaker_wav=str(reference), language="en", seed=3, max_new_tokens=60)
    end = time.perf_counter()
    report = neuron_xtts.report(tts)
    (utterance,) = report.timeline.utterances()
    check([utterance])
    assert (utterance.number, utterance.streamed) == (1, False)
    order = phases(utterance, but=(Phase.AROUND, Phase.WAITING))
    assert order == [Phase.VOICE, Phase.PREFILL, Phase.DECODE, Phase.VOCODER]
    assert start < utterance.start < utterance.end < end
    seconds = utterance.seconds()
    graphs = {name: sum(counts.seconds for counts in buckets.values()) for name, buckets in report.graphs.items()}
    # Some more, such as the embedding of codes, and what a busy machine adds.
    assert graphs["prefill"] <= seconds[Phase.PREFILL] < graphs["prefill"] + NOISE
    assert graphs["vocoder"] <= seconds[Phase.VOCODER] < graphs["vocoder"] + NOISE
    assert graphs["decode"] <= seconds[Phase.DECODE] < graphs["decode"] + 59 * 2e-3 + NOISE
    assert seconds[Phase.WAITING] < NOISE  # for nobody
    assert seconds[Phase.SAMPLING] > 0
    outermost = ("Xtts.get_conditioning_latents", "GPT.generate", "GPT.forward", "HifiDecoder.forward")
    events = calls(tts, *outermost)
    assert tuple(event.route for event in events) == outermost
    assert not calls(tts, "GPT.get_style_emb", "Xtts.get_speaker_embedding")  # which are part of the first
    # The spans are the calls, cut into pieces.
    assert sum(seconds.values()) == pytest.approx(sum(event.end - event.start for event in events), abs=1e-6)
    assert sum(report.routes[name].seconds for name in outermost) == pytest.approx(sum(seconds.values()), abs=NOISE)
    for event in events:
        inside = [span for span in utterance.spans if span.start < event.end and span.end > event.start]
        assert inside[0].start >= event.start
        assert inside[-1].end <= event.end + 1e-9
    steps = report.timeline.steps()
    assert sum(each.steps for each in steps) == 59
    assert {(each.rows, each.utterances) for each in steps} == {(1, (1,))}
    assert len(steps) < 10  # one, where nobody interrupts
    assert report.timeline.reasons() == {}


def test_sentences_and_their_voices(tts, xtts, voice, reference):
    """A generation begins an utterance; a voice right before it is part of it, a voice long before is not."""
    stop_after(xtts, None)
    neuron_xtts.patch(tts, backend="cpu")
    for _ in range(2):
        tts.tts(TEXT, speaker_wav=str(reference), language="en", seed=3, max_new_tokens=10)
    xtts.get_conditioning_latents(str(reference))
    find_patch(xtts).runner.recorder.here.ended -= 2
    for seed in range(2):
        xtts.inference(TEXT, "en", *voice, seed=seed, max_new_tokens=10)
    utterances = timeline(tts).utterances()
    check(utterances)
    assert [utterance.number for utterance in utterances] == [1, 2, 3, 4, 5]
    voiced = [any(span.phase is Phase.VOICE for span in utterance.spans) for utterance in utterances]
    assert voiced == [True, True, True, False, False]
    assert [phase for phase in phases(utterances[2]) if phase is not Phase.VOICE] == []


def test_streams_in_one_thread(xtts, voice):
    """What a thread pulls from in turns does not get the other's chunks."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu")
    streams = [
        xtts.inference_stream(f"{TEXT} {number}", "en", *voice, seed=number, max_new_tokens=50, min_new_tokens=50)
        for number in range(2)
    ]
    chunks = [list(pair) for pair in itertools.zip_longest(*streams)]
    assert len(chunks) == 3
    report = neuron_xtts.report(xtts)
    utterances = report.timeline.utterances()
    check(utterances)
    assert [utterance.streamed for utterance in utterances] == [True, True]
    for utterance in utterances:
        order = phases(utterance, but=(Phase.AROUND, Phase.WAITING))
        assert order[:3] == [Phase.PREFILL, Phase.DECODE, Phase.VOCODER]
        assert order.count(Phase.VOCODER) >= 2
    assert sum(step.steps * step.rows for step in report.timeline.steps()) == 2 * 49
    assert sum(step.steps for step in report.timeline.steps()) == sum(report.batch.steps.values())


def test_a_stream_is_few_events(xtts, voice):
    """Pulls and steps that follow each other are one: some for a chunk, and none for a code."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu")
    list(xtts.inference_stream(TEXT, "en", *voice, seed=1, max_new_tokens=200, min_new_tokens=200))
    assert len(timeline(xtts).events) < 200
    assert sum(step.steps for step in timeline(xtts).steps()) == 199
    assert len(calls(xtts, "GPT.get_generator")) < 80


def test_an_abandoned_stream(xtts, voice):
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu")
    stream = xtts.inference_stream(TEXT, "en", *voice, seed=1, max_new_tokens=100)
    next(stream)
    (open_,) = timeline(xtts).utterances()  # what goes on is as it is so far
    del stream
    xtts.inference(TEXT, "en", *voice, seed=2, max_new_tokens=5)
    utterances = timeline(xtts).utterances()
    check(utterances)
    assert [utterance.streamed for utterance in utterances] == [True, False]
    assert utterances[0].spans[: len(open_.spans) - 1] == open_.spans[:-1]


def test_callers_together(xtts, voice):
    """Each has its lane; who waits for slots waits, until it is prefilled; the batch is what steps say."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", buckets=BucketPlan(slots=(1, 2)))

    def say(number):
        options = {"seed": number, "max_new_tokens": 60, "min_new_tokens": 60}
        if number % 2:
            list(xtts.inference_stream(f"{TEXT} {number}", "en", *voice, **options))
        else:
            xtts.inference(f"{TEXT} {number}", "en", *voice, **options)

    together(*(lambda number=number: say(number) for number in range(5)))
    report = neuron_xtts.report(xtts)
    utterances = report.timeline.utterances()
    check(utterances)
    assert sorted(utterance.streamed for utterance in utterances) == [False] * 3 + [True] * 2
    rows = {}
    for step in report.timeline.steps():
        assert len(set(step.utterances)) == step.rows
        rows[step.rows] = rows.get(step.rows, 0) + step.steps
        for utterance in utterances:
            if utterance.number in step.utterances:
                assert utterance.start <= step.start
                assert step.end <= utterance.end + NOISE
    assert rows == report.batch.steps
    assert max(rows) == 2
    for before, after in itertools.pairwise(report.timeline.steps()):  # one engine makes one at a time
        assert before.end <= after.start
    waited = sum(utterance.seconds()[Phase.WAITING] for utterance in utterances)
    assert waited > report.batch.seconds * 0.5 > 0
    decoded = sum(utterance.seconds()[Phase.DECODE] for utterance in utterances)
    assert decoded == pytest.approx(sum(s.decoding * s.rows for s in report.timeline.steps()), rel=0.05)


# Fallbacks


def test_a_fallback(xtts, voice):
    """What coqui-tts served has the reason; what graphs served beside it has none."""
    neuron_xtts.patch(xtts, backend="cpu")
    xtts.inference(TEXT, "en", *voice, max_new_tokens=20, typical_p=0.9)
    (utterance,) = timeline(xtts).utterances()
    check([utterance])
    assert fallbacks(xtts, "GPT.generate") == {"argument typical_p": 1}
    (span,) = (span for span in utterance.spans if span.reason)
    assert (span.phase, span.reason) == (Phase.DECODE, "GPT.generate: argument typical_p")
    (event,) = calls(xtts, "GPT.generate")
    assert (span.start, span.end) == (event.start, event.end)
    assert timeline(xtts).reasons() == {span.reason: 1}
    assert not timeline(xtts).steps()


def test_a_fallback_waits_for_its_turn(xtts, voice):
    """For which coqui-tts cannot be blamed."""
    neuron_xtts.patch(xtts, backend="cpu")
    turns, held, over = find_patch(xtts).runner.turns, threading.Event(), []

    def hold():
        with turns.take():
            held.set()
            while not turns.wanted:
                time.sleep(0.005)
            time.sleep(0.5)
            over.append(time.perf_counter())

    def speak():
        held.wait()
        xtts.gpt.generate(voice[0], torch.arange(1, 9)[None], max_new_tokens=3, typical_p=0.9)

    together(hold, speak)
    (utterance,) = timeline(xtts).utterances()
    check([utterance])
    assert utterance.seconds()[Phase.WAITING] > 0.3
    reasons = [span for span in utterance.spans if span.reason]
    assert sum(max(min(span.end, over[0]) - span.start, 0) for span in reasons) < 0.3
    assert max(span.end for span in reasons) > over[0]


def test_a_stream_that_falls_back(xtts, voice, monkeypatch):
    """At its tenth step: what graphs made stays theirs."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu")
    runner = find_patch(xtts).runner
    steps, real = itertools.count(1), runner.step

    def step(*args):
        if next(steps) == 10:
            raise RuntimeError("the device is gone")
        return real(*args)

    monkeypatch.setattr(runner, "step", step)
    list(xtts.inference_stream(TEXT, "en", *voice, seed=1, max_new_tokens=50, min_new_tokens=50))
    (utterance,) = timeline(xtts).utterances()
    check([utterance])
    assert utterance.streamed
    assert sum(step.steps for step in timeline(xtts).steps()) == 9
    decoded = [span.reason is not None for span in utterance.spans if span.phase is Phase.DECODE]
    assert decoded == sorted(decoded)  # first graphs, then coqui-tts
    assert {True, False} == set(decoded)
    (reason,) = {span.reason for span in utterance.spans if span.reason}
    assert reason == "GPT.get_generator: RuntimeError: the device is gone"


def test_disabled(xtts, voice, monkeypatch):
    neuron_xtts.patch(xtts, backend="cpu")
    monkeypatch.setenv("NEURON_XTTS_DISABLE", "1")
    xtts.inference(TEXT, "en", *voice, max_new_tokens=10)
    (utterance,) = timeline(xtts).utterances()
    check([utterance])
    assert {span.reason for span in utterance.spans} == {
        f"{route}: NEURON_XTTS_DISABLE is set" for route in ("GPT.generate", "GPT.forward", "HifiDecoder.forward")
    }


# The recorder by itself


def test_bounded():
    """Events, and the memory of them, though they are of the largest kind."""
    recorder = Recorder()
    tracemalloc.start()
    for number in range(3 * KEPT):
        growing = recorder.grow(None, Phase.DECODE, number + 0.5, tuple(range(10**6 + number, 10**6 + number + 16)))
        growing.end, growing.steps, growing.decoding, growing.sampling = number + 0.9, 1000 + number, 0.123, 0.456
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    found = recorder.timeline()
    assert (len(found.events), found.full) == (KEPT, True)
    assert used < 9e6


def test_what_is_forgotten():
    """An utterance of which a part is forgotten is not shown as if it were whole."""
    events = [Event(Phase.VOCODER, start, start + 1.0, (number,)) for number, start in ((1, 0), (2, 0.5), (3, 1.5))]
    assert [utterance.number for utterance in Timeline(tuple(events)).utterances()] == [1, 2, 3]
    assert [utterance.number for utterance in Timeline(tuple(events), full=True).utterances()] == [3]
    assert Timeline(tuple(events), full=True).number == 3


def test_what_covers_what():
    """A run is shown over a step, that over a wait, that over its call; short waits are around graphs."""
    events = (
        Event(Phase.AROUND, 0.0, 10.0, (1,), "GPT.generate"),
        Event(Phase.WAITING, 1.0, 9.0, (1,)),
        Event(Phase.PREFILL, 2.0, 3.0, (1,)),
        Event(Phase.DECODE, 3.0005, 6.0005, (1, 2), rows=2, steps=5, decoding=1.5, sampling=0.75),
        Event(Phase.VOCODER, 4.0, 5.0, (1,)),
    )
    first, second = Timeline(events).utterances()
    assert [(span.phase, span.start, span.end) for span in first.spans] == [
        (Phase.AROUND, 0.0, 1.0),
        (Phase.WAITING, 1.0, 2.0),
        (Phase.PREFILL, 2.0, 3.0),
        (Phase.AROUND, 3.0, 3.0005),
        (Phase.DECODE, 3.0005, 4.0),
        (Phase.VOCODER, 4.0, 5.0),
        (Phase.DECODE, 5.0, 6.0005),
        (Phase.WAITING, 6.0005, 9.0),
        (Phase.AROUND, 9.0, 10.0),
    ]
    assert second.seconds()[Phase.DECODE] == pytest.approx(1.5)
    assert second.seconds()[Phase.SAMPLING] == pytest.approx(0.75)
    assert second.seconds()[Phase.AROUND] == pytest.approx(0.75)


def test_an_interrupted_call_is_open_no_more():
    """An interrupt may come between a call's beginning and its end being certain; later ones are recorded."""
    recorder = Recorder()
    call = recorder.call("GPT.generate", Phase.DECODE)
    call.__enter__()
    with recorder.call("GPT.forward", Phase.LATENTS):  # inside of it
        pass
    assert not recorder.timeline().events
    del call
    with recorder.call("GPT.forward", Phase.LATENTS):
        pass
    assert [event.route for event in recorder.timeline().events] == ["GPT.forward"]


def test_reading_while_others_record():
    recorder, over = Recorder(), threading.Event()

    def record():
        while not over.is_set():
            with recorder.call("GPT.generate", Phase.DECODE):
                recorder.ran("prefill", time.perf_counter(), time.perf_counter())

    def read():
        for _ in range(300):
            recorder.timeline()
        over.set()

    together(record, record, read)
    check(recorder.timeline().utterances())
    numbers = [event.utterances[0] for event in recorder.timeline().events if event.route]
    assert len(numbers) == len(set(numbers))  # no number is given twice


def test_copies_and_plain_data(xtts, voice):
    """A report is a snapshot that can be copied and pickled; as plain data it is small, however long the session."""
    neuron_xtts.patch(xtts, backend="cpu")
    for seed in range(10):
        xtts.inference(TEXT, "en", *voice, seed=seed, max_new_tokens=5)
    report = neuron_xtts.report(xtts)
    kept = report.timeline
    assert copy.deepcopy(report) == report == pickle.loads(pickle.dumps(report))
    xtts.inference(TEXT, "en", *voice, seed=99, max_new_tokens=5)
    assert report.timeline is kept
    assert kept.number == 10
    data = json.loads(json.dumps(report.to_dict()))["timeline"]
    assert data["utterances"] == data["remembered"] == 10
    assert set(data["seconds"]) == {phase.value for phase in Phase}
    assert data["seconds"]["vocoder"] > 0
    assert len(json.dumps(report.to_dict())) < 5000
    assert "Event" not in repr(report)


# The picture


def panels(figure):
    return {axes.get_title(loc="left").partition(":")[0].partition(" (")[0]: axes for axes in figure.axes}


def bars(axes):
    """How many bars of each kind there are."""
    return {found.get_label(): len(found.get_paths()) for found in axes.collections}


def test_picture_of_one_sentence(tts, xtts, reference, tmp_path):
    stop_after(xtts, None)
    neuron_xtts.patch(tts, backend="cpu")
    tts.tts(TEXT, speaker_wav=str(reference), language="en", seed=3, max_new_tokens=60)
    report = neuron_xtts.report(tts)
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert list(panels(figure)) == ["Utterances", "Batch", "Buckets since patch()"]
    lanes = panels(figure)["Utterances"]
    (utterance,) = report.timeline.utterances()
    spans = [span.phase for span in utterance.spans]
    found = bars(lanes)
    for phase in (Phase.VOICE, Phase.PREFILL, Phase.DECODE, Phase.VOCODER):
        assert found[phase.value] == spans.count(phase)
    assert found["sampling"] == spans.count(Phase.DECODE)
    assert set(found) - {"waiting"} == {"voice", "prefill", "decode", "sampling", "vocoder", "around graphs"}
    colors = {each.get_label(): to_hex(each.get_facecolor()[0]).upper() for each in lanes.collections}
    assert colors == {phase.value: COLORS[phase] for phase in Phase if phase.value in colors}
    assert [label.get_text() for label in lanes.get_yticklabels()] == ["1"]
    box = next(each for each in lanes.collections if each.get_label() == "decode").get_paths()[0].get_extents()
    span = next(span for span in utterance.spans if span.phase is Phase.DECODE)
    assert (box.x0, box.x1) == pytest.approx((span.start - utterance.start, span.end - utterance.start))
    assert box.height == pytest.approx(0.8 * span.decoding)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [phase.value for phase in Phase] + [
        "coqui-tts (fallback)"
    ]
    assert panels(figure)["Batch"].get_ylabel() == "rows"
    names = [text.get_text() for text in panels(figure)["Buckets since patch()"].get_yticklabels()]
    assert names[:3] == ["conditioning exact", "prefill exact", "decode exact"]
    said = [text.get_text() for text in panels(figure)["Buckets since patch()"].texts]
    assert said[2].startswith("59 runs, ")
    assert said[0].startswith("1 run, ")


def test_picture_of_padding(xtts, voice):
    """As much of a bar is padding as the report says."""
    stop_after(xtts, None)
    neuron_xtts.patch(
        xtts, backend="cpu", buckets=BucketPlan(prefill=(128,), decode=(256,), slots=(1,), vocoder=(128,))
    )
    xtts.inference(TEXT, "en", *voice, seed=1, max_new_tokens=30)
    report = neuron_xtts.report(xtts)
    used, padding = panels(report.plot())["Buckets since patch()"].containers
    waste = [counts.waste for buckets in report.graphs.values() for counts in buckets.values()]
    assert len(waste) == 3
    assert [bar.get_width() for bar in padding] == pytest.approx([100 * share for share in waste])
    assert [bar.get_width() for bar in used] == pytest.approx([100 * (1 - share) for share in waste])
    assert min(waste) > 0.05


def test_picture_of_fallbacks(xtts, voice):
    """Hatched, with a letter for the reason, which is written below."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu")
    xtts.inference(TEXT, "en", *voice, max_new_tokens=20, typical_p=0.9)
    list(xtts.inference_stream(TEXT, "en", *voice, max_new_tokens=30, min_p=0.1))
    figure = neuron_xtts.report(xtts).plot()
    lanes = panels(figure)["Utterances"]
    (hatched,) = (each for each in lanes.collections if each.get_label() == "decode, coqui-tts")
    assert hatched.get_hatch()
    assert to_hex(hatched.get_edgecolor()[0]).upper() == FALLBACK
    assert to_hex(hatched.get_facecolor()[0]).upper() == COLORS[Phase.DECODE]
    assert all(not each.get_hatch() for each in lanes.collections if each is not hatched)
    assert {text.get_text() for text in lanes.texts} == {"a", "b"}
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "a  GPT.generate: argument typical_p\nb  GPT.get_generator: argument min_p" in said
    assert [label.get_text() for label in lanes.get_yticklabels()] == ["1", "2, stream"]


def test_picture_of_a_long_session():
    """The latest utterances one by one, and an overview in which all are."""
    recorder = Recorder()
    for number in range(300):
        start = 3.0 * number if number < 150 else 3.0 * number + 600
        recorder.events.append(Event(Phase.AROUND, start, start + 2.5, (number + 1,), "GPT.generate"))
        recorder.events.append(Event(Phase.PREFILL, start, start + 1.0, (number + 1,)))
        event = Event(Phase.DECODE, start + 1, start + 2, (number + 1,), rows=1, steps=9, decoding=0.6, sampling=0.4)
        recorder.events.append(event)
    report = Report(backend="cpu", precision="fp32", timeline=recorder.timeline())
    figure = report.plot(latest=10)
    found = panels(figure)
    assert list(found)[:3] == ["What the 300 utterances that are remembered were at", "Utterances", "Batch"]
    assert "the latest 10 of 300" in found["Utterances"].get_title(loc="left")
    assert bars(found["Utterances"]) == {"prefill": 10, "decode": 10, "sampling": 10, "around graphs": 10}
    overview = next(iter(found.values()))
    layers = {patch.get_label(): patch.get_data() for patch in overview.patches if patch.get_label() in COLOR_NAMES}
    area = {
        name: sum((values - base) * (edges[1] - edges[0]))
        for name, (values, edges, base) in ((name, tuple(data)) for name, data in layers.items())
    }
    assert area == pytest.approx({"prefill": 300.0, "decode": 180.0, "sampling": 120.0, "around graphs": 150.0})
    assert figure.get_size_inches()[1] < 12
    assert Report(timeline=recorder.timeline()).plot().get_size_inches()[1] < 13
    with pytest.raises(ValueError, match="latest=0; expected how many"):
        report.plot(latest=0)


COLOR_NAMES = {phase.value for phase in COLORS}


def test_pauses_are_cut():
    clock = Clock([(10.0, 12.0), (11.0, 15.0), (100.0, 101.0), (101.5, 105.0)])
    assert clock.pauses == [(5.0, 85.0)]
    assert clock.width == pytest.approx(0.2)
    assert [clock.at(moment) for moment in (10.0, 15.0, 100.0, 105.0)] == pytest.approx([0, 5, 5.2, 10.2])
    assert clock.end == pytest.approx(10.2)
    many = Clock([(10.0 * number, 10.0 * number + 1) for number in range(500)])
    assert many.end < 1.31 * 500


@pytest.mark.parametrize("patched", [True, False])
def test_picture_of_nothing(xtts, patched):
    if patched:
        neuron_xtts.patch(xtts, backend="cpu")
    figure = neuron_xtts.report(xtts).plot()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["nothing was spoken"]
    assert ("not patched" in figure.get_suptitle()) == (not patched)


def test_matplotlib_comes_with_the_picture_alone():
    script = (
        "import sys, neuron_xtts, neuron_xtts.recorder; "
        "assert 'matplotlib' not in sys.modules; "
        "neuron_xtts.Report().plot(); "
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_colors_are_apart():
    """Two that stand side by side differ in lightness, which everybody sees, or are of Okabe and Ito's palette."""
    palette = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert {COLORS[phase] for phase in Phase} - palette == {"#4D4D4D", "#C8C8C8"}
    assert FALLBACK in palette
    assert FALLBACK not in COLORS.values()
    assert len(set(COLORS.values())) == len(Phase)
    assert torch.tensor([int(COLORS[Phase.WAITING][1:3], 16) - int(COLORS[Phase.AROUND][1:3], 16)]).abs() > 100
