"""The guard by itself: its values, its cap, and where it hears a voice end, in whatever pieces the audio comes."""

import re
import threading

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neuron_xtts
from neuron_xtts import Guard
from neuron_xtts.report import GuardCounters, GuardCounts, Report
from neuron_xtts.routes.tails import Tails

BLOCK, RATE = 512, 24000
BAD = {
    "codes_per_token": [0, -1.0, float("nan"), float("inf"), "8", True],
    "spare": [-1, 2.5, None, True],
    "retry": [1, None, "yes"],
    "trim": [0, -40, float("nan"), "40", False],
    "keep": [-0.1, float("inf"), None, "1"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_values_that_mean_nothing(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}; expected ")):
        Guard(**{name: value})


def test_values_that_mean_something():
    Guard(codes_per_token=None, spare=0, retry=False, trim=None, keep=0)
    assert neuron_xtts.Guard is Guard
    assert Guard.of(False) is None
    assert Guard.of(True) == Guard()
    assert Guard.of(guard := Guard(spare=3)) is guard


def test_cap():
    guard = Guard(codes_per_token=2.5, spare=10)
    assert guard.cap(7, 100, 0) == 27
    assert guard.cap(7, 28, 0) == 27
    assert guard.cap(7, 27, 0) is None  # it is no limit of the guard's
    assert guard.cap(7, 100, 40) == 40
    assert guard.cap(7, 40, 40) is None
    assert guard.cap(-5, 100, 0) == 10
    assert Guard(codes_per_token=0.1, spare=0).cap(1, 100, 0) == 1
    assert Guard(codes_per_token=None).cap(7, 100, 0) is None


def tails(trim=40.0, keep=0.25):
    return Tails(Guard(trim=trim, keep=keep))


def end_of(samples, trim, keep):
    """The rule, of the whole: behind the last block within ``trim`` dB of the loudest."""
    padded = np.pad(samples, (0, -len(samples) % BLOCK))
    loud = librosa.feature.rms(y=padded.astype(np.float64), frame_length=BLOCK, hop_length=BLOCK, center=False)[0]
    voiced = np.flatnonzero(loud >= loud.max() * 10 ** (-trim / 20))
    return min(len(samples), (voiced[-1] + 1) * BLOCK + round(keep * RATE))


def noise(levels, seed=0):
    """Noise of so many blocks and dB each; of blocks that need not be whole."""
    generator = np.random.default_rng(seed)
    return np.concatenate(
        [10 ** (db / 20) * generator.standard_normal(round(blocks * BLOCK)) for blocks, db in levels] or [np.zeros(0)]
    ).astype(np.float32)


def test_a_tail():
    voice, breath = noise([(20.5, -20)]), noise([(30, -70)])
    ours = tails(keep=0.05)
    kept = ours.trimmed(np.concatenate([voice, breath]))
    assert len(kept) == 21 * BLOCK + 1200
    np.testing.assert_array_equal(kept[: len(voice)], voice)
    assert ours.counters.snapshot() == GuardCounts(trimmed=1, seconds=(20.5 * BLOCK + 30 * BLOCK - len(kept)) / RATE)


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(0, np.float32),
        np.zeros(5000, np.float32),  # nothing to compare to
        noise([(0.1, -20)]),
        noise([(3, -20)]),
        noise([(30, -30), (30, -69)]),  # within 40 dB
        noise([(30, -20), (10, -80)]),  # no longer than what is kept
        np.full(5000, np.nan, np.float32),
        np.stack([noise([(30, -20), (30, -80)])] * 2),  # several rows
    ],
)
def test_nothing_to_cut_off(samples):
    ours = tails()
    assert ours.trimmed(samples) is samples
    assert ours.counters.snapshot() == GuardCounts()


def test_what_is_no_number():
    """Is no silence, and nothing that others are compared to."""
    broken = np.full(BLOCK, np.nan, np.float32)
    samples = np.concatenate([broken, noise([(5, -20), (20, -90)])])
    assert len(tails(keep=0).trimmed(samples)) == 6 * BLOCK
    samples = np.concatenate([samples, broken, noise([(3, -90)])])
    assert len(tails(keep=0).trimmed(samples)) == 27 * BLOCK


def test_no_trimming():
    samples = noise([(3, -20), (90, -90)])
    ours = Tails(Guard(trim=None))
    assert ours.trimmed(samples) is samples
    chunk = torch.from_numpy(samples)
    assert list(ours.held_back([chunk])) == [chunk]


LEVELS = st.lists(st.tuples(st.floats(0.1, 6), st.integers(-90, 0)), max_size=8)


@settings(max_examples=300, deadline=None)
@given(
    levels=LEVELS,
    seed=st.integers(0, 99),
    cuts=st.lists(st.floats(0, 1), max_size=9),
    trim=st.floats(5, 70),
    keep=st.sampled_from([0.0, 0.013, 0.05]),
)
def test_chunks_are_the_whole(levels, seed, cuts, trim, keep):
    """The same bytes, however a stream is cut into chunks, as by the rule of the whole; and no voice waits."""
    samples = noise(levels, seed)
    places = sorted(int(cut * len(samples)) for cut in cuts)
    pieces = [torch.from_numpy(piece.copy()) for piece in np.split(samples, places)]
    ours = tails(trim, keep)
    heard, waited = [], []

    def chunks():
        for piece in pieces:
            waited.append(sum(map(len, heard)))  # given when the next is asked for
            yield piece

    for chunk in ours.held_back(chunks()):
        assert len(chunk)
        assert chunk.dtype == torch.float32
        heard.append(chunk)
    end = end_of(samples, trim, keep) if len(samples) else 0
    given = torch.cat(heard).numpy() if heard else np.zeros(0, np.float32)
    np.testing.assert_array_equal(given, samples[:end])
    np.testing.assert_array_equal(tails(trim, keep).trimmed(samples), samples[:end])
    cut_off = GuardCounts(trimmed=int(end < len(samples)), seconds=(len(samples) - end) / RATE)
    assert ours.counters.snapshot() == cut_off
    for place, sent in zip(places, waited[1:], strict=True):
        assert sent == (end_of(samples[:place], trim, keep) if place else 0)


def test_silence_waits_for_a_voice():
    """And chunks that are given whole are those that came."""
    voice, pause = torch.from_numpy(noise([(20, -20)])), torch.zeros(20 * BLOCK)
    stream, log = tails(keep=0), []

    def chunks():
        for name, chunk in [("voice", voice), ("pause", pause), ("again", voice), ("tail", pause)]:
            log.append(name)
            yield chunk

    given = []
    for chunk in stream.held_back(chunks()):
        log.append("given")
        given.append(chunk)
    assert log == ["voice", "given", "pause", "again", "given", "given", "tail"]
    assert given[0] is voice
    assert given[1] is pause
    assert given[2] is voice


def test_counters_of_many_threads():
    counters = GuardCounters()

    def count():
        for _ in range(500):
            counters.capped(retried=True, ended=True)
            counters.trimmed(0.5)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.snapshot() == GuardCounts(2000, 2000, 2000, 2000, 1000.0)


def test_report():
    report = Report(backend="cpu", precision="fp32", guard=GuardCounts(4, 3, 2, 17, 5.25))
    assert report.to_dict()["guard"] == {"capped": 4, "retried": 3, "ended": 2, "trimmed": 17, "seconds": 5.25}
    assert re.search(
        r"guard: capped +retried +then ended +trimmed +seconds cut off\n.*\n4 +3 +2 +17 +5\.250", str(report)
    )
    assert "<td>17</td><td>5.250</td>" in report._repr_html_()
    report = Report(backend="cpu", precision="fp32")
    assert report.to_dict()["guard"] is None
    assert "guard" not in str(report)
