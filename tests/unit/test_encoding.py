"""Audio as bytes: however it comes, it is the same audio; what is sent and what is a file decode to it."""

import io
import itertools
import struct
import sys
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_xtts.errors import ExtraMissingError
from neuron_xtts.narration.encoding import FORMATS, Encoder, check_format, encoded, to_int16, wav_header

RATE = 24000
TIME = np.arange(RATE) / RATE
SIGNAL = (0.4 * np.sin(2 * np.pi * 220 * TIME) * np.sin(2 * np.pi * 1.5 * TIME)).astype(np.float32)
LOSSLESS = ("wav", "pcm", "flac")


def decoded(data, name):
    """The samples in bytes of a format, at 24 kHz."""
    if name == "pcm":
        return np.frombuffer(data, np.int16)
    av = pytest.importorskip("av")
    with av.open(io.BytesIO(data)) as file:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
        frames = [frame for found in file.decode(audio=0) for frame in resampler.resample(found)]
    return np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])


def sent(name, cuts):
    """What an encoder gives for pieces of the signal."""
    encoder = Encoder(name, RATE)
    bounds = [0, *sorted(cuts), len(SIGNAL)]
    pieces = [encoder.encode(SIGNAL[start:end]) for start, end in itertools.pairwise(bounds)]
    return b"".join([*pieces, encoder.finish()]), pieces


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(0, len(SIGNAL)), max_size=12))
def test_pieces(name, cuts):
    """Decoded, however they were cut, they are what is decoded of all at once."""
    found, once = (decoded(sent(name, these)[0], name) for these in (cuts, []))
    np.testing.assert_array_equal(found, once)


@pytest.mark.parametrize("name", FORMATS)
def test_files(name):
    """As long as the signal but for padding, and the same; what keeps everything keeps every sample."""
    found = decoded(encoded(SIGNAL, name, RATE), name)
    if name in LOSSLESS:
        np.testing.assert_array_equal(found, to_int16(SIGNAL))
        return
    assert abs(len(found) - len(SIGNAL)) <= (2048 if name == "aac" else 200)
    delay = 1024 if name == "aac" else 0  # a bare stream cannot say how much of it is not to be heard
    size = min(len(SIGNAL), len(found) - delay)
    assert np.corrcoef(found[delay : delay + size], SIGNAL[:size])[0, 1] > 0.99


def test_a_header_says_how_long_a_file_is():
    """Of WAV and FLAC, which hold it there; also if it is written in pieces."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    encoder = Encoder("wav", RATE, file)
    assert encoder.encode(SIGNAL[:100]) == b""
    assert len(file.getvalue()) == 244  # it grows
    encoder.encode(SIGNAL[100:])
    encoder.finish()
    assert file.getvalue() == encoded(SIGNAL, "wav", RATE)
    with wave.open(io.BytesIO(file.getvalue())) as read:
        assert (read.getnframes(), read.getframerate()) == (len(SIGNAL), RATE)
    with av.open(io.BytesIO(encoded(SIGNAL, "flac", RATE))) as read:
        assert read.duration == 1_000_000


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_sent_is_sent_early(name):
    """Half a second after it was given, at most."""
    _, pieces = sent(name, range(2400, RATE, 2400))
    pytest.importorskip("av")
    heard = decoded(b"".join(pieces[:5]), name) if name != "wav" else np.zeros(12000)
    assert len(heard) >= (6000 if name == "flac" else 8000)


def test_samples():
    np.testing.assert_array_equal(
        to_int16(np.array([-2, -1, 0, 0.5, 1, 2], np.float32)), [-32767] * 2 + [0, 16383] + [32767] * 2
    )
    whole = np.array([-32768, 5], np.int16)
    np.testing.assert_array_equal(to_int16(whole), whole)
    assert encoded(whole, "pcm", RATE) == whole.tobytes()


def test_wav_header():
    assert struct.unpack("<4sI", wav_header(RATE, 10)[:8]) == (b"RIFF", 56)
    for endless in (None, 2**31):  # a day of speech does not fit
        assert struct.unpack("<4sI", wav_header(RATE, endless)[:8]) == (b"RIFF", 2**32 - 1)


def test_nothing():
    """A file without a sample is one all the same."""
    with wave.open(io.BytesIO(encoded(SIGNAL[:0], "wav", RATE))) as read:
        assert read.getnframes() == 0
    assert encoded(SIGNAL[:0], "pcm", RATE) == b""


def test_check_format(monkeypatch):
    with pytest.raises(ValueError, match="format 'midi' is not known; expected one of wav, pcm, flac"):
        check_format("midi")
    monkeypatch.setitem(sys.modules, "av", None)
    assert check_format("wav") is FORMATS["wav"]
    with pytest.raises(ExtraMissingError, match=r'pip install "neuron-xtts\[audio\]"'):
        check_format("mp3")


def test_close():
    """May be called again, and nothing comes after it."""
    pytest.importorskip("av")
    encoder = Encoder("mp3", RATE)
    encoder.encode(SIGNAL)
    encoder.close()
    encoder.close()
