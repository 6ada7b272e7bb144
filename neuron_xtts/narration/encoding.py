"""Audio as bytes: WAV and raw samples by Python itself, what is compressed by PyAV; one encoder for each stream."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from neuron_xtts.errors import ExtraMissingError

#: Samples of audio, as XTTS makes it: floats in [-1, 1].
Samples = NDArray[np.float32]
#: The same as 16-bit integers.
Pcm = NDArray[np.int16]


@dataclass(frozen=True)
class Format:
    """How audio is written.

    Attributes:
        media_type: by which HTTP and browsers know it.
        container: that PyAV writes; None: Python does.
        codec: in it.
        bit_rate: bits per second; None where nothing is lost.
    """

    media_type: str
    container: str | None = None
    codec: str = ""
    bit_rate: int | None = None


FORMATS = {
    "wav": Format("audio/wav"),
    "pcm": Format("audio/pcm"),
    "flac": Format("audio/flac", "flac", "flac"),
    "mp3": Format("audio/mpeg", "mp3", "libmp3lame", 64_000),
    "opus": Format("audio/ogg", "ogg", "libopus", 32_000),
    "aac": Format("audio/aac", "adts", "aac", 64_000),
}

_UNKNOWN = 0xFFFFFFFF  # a length, in the header of a WAV file that is sent before it ends, or too long for it
# Of what is sent, which cannot be mended afterwards. A page of Ogg holds a second unless told otherwise, which would be
# a second that nobody hears yet.
_SENT = {"ogg": {"page_duration": "60000"}, "mp3": {"write_xing": "0", "id3v2_version": "0"}}


def to_int16(samples: Samples | Pcm) -> Pcm:
    """Samples as 16-bit integers; what is beyond [-1, 1] is clipped. Such integers stay what they are."""
    if np.issubdtype(samples.dtype, np.integer):
        return samples.astype("<i2")
    return (np.clip(samples, -1, 1) * 32767).astype("<i2")


def wav_header(rate: int, samples: int | None = None) -> bytes:
    """The header of a 16-bit mono WAV file.

    Args:
        rate: samples per second.
        samples: how many there are; None: until the end, for readers of streams.
    """
    known = samples is not None and 2 * samples + 36 < _UNKNOWN  # 24 hours of speech are longer
    size = 2 * samples if samples is not None and known else _UNKNOWN
    whole = size + 36 if known else _UNKNOWN
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", whole, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", size
    )


def check_format(name: str) -> Format:
    """The format of a name.

    Raises:
        ValueError: there is none.
        ExtraMissingError: it needs PyAV, which is not installed.
    """
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is not known; expected one of {', '.join(FORMATS)}")
    found = FORMATS[name]
    if found.container:
        _pyav()
    return found


class Encoder:
    """Encodes one stream of audio, as far as it is given.

    Args:
        name: of the format, of `FORMATS`.
        rate: samples per second.
        file: empty, that it is written into, so that its header says in the end how long it is. None: what there is of
            it is returned, to be sent.

    Raises:
        ValueError, ExtraMissingError: as `check_format` does.
    """

    def __init__(self, name: str, rate: int, file: IO[bytes] | None = None) -> None:
        self.format = check_format(name)
        self._rate = rate
        self._head = wav_header(rate) if name == "wav" else b""
        self._file = file
        self._written = _Sink()
        self._container: Any = None
        if self.format.container:
            options = {"flush_packets": "1"}
            if file is None:
                options |= _SENT.get(self.format.container, {})
            self._container = _pyav().open(
                file or self._written, "w", format=self.format.container, container_options=options
            )
            self._stream = self._container.add_stream(self.format.codec, rate=rate, layout="mono")
            if self.format.bit_rate:
                self._stream.bit_rate = self.format.bit_rate
        self._given = 0

    def encode(self, samples: Samples | Pcm) -> bytes:
        """Encode what comes next; returns what can be sent of it, at first with the header."""
        if not self.format.container:
            head, self._head = self._head, b""
            self._given += len(samples)
            return self._put(head + to_int16(samples).tobytes())
        if len(samples):
            frame = _pyav().AudioFrame.from_ndarray(to_int16(samples)[None], format="s16", layout="mono")
            frame.sample_rate = self._rate
            frame.pts = self._given
            self._given += len(samples)
            self._mux(frame)
        return self._written.take()

    def finish(self) -> bytes:
        """The rest, where no more samples come."""
        if not self.format.container:
            head, self._head = self._head, b""
            rest = self._put(head)
            if self._file is not None and self.format is FORMATS["wav"]:
                self._file.seek(0)
                self._file.write(wav_header(self._rate, self._given))
                self._file.seek(0, io.SEEK_END)
            return rest
        self._mux(None)
        self.close()
        return self._written.take()

    def close(self) -> None:
        """Let go of the encoder; what was not finished is lost. May be called again."""
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def _put(self, data: bytes) -> bytes:
        if self._file is None:
            return data
        self._file.write(data)
        return b""

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)


def encoded(samples: Samples | Pcm, name: str, rate: int) -> bytes:
    """A whole file. Its header says how long it is, where the format can."""
    file = io.BytesIO()
    encoder = Encoder(name, rate, file)
    encoder.encode(samples)
    encoder.finish()
    return file.getvalue()


class _Sink(io.RawIOBase):
    """Takes what PyAV writes. It cannot seek, as nothing can that was sent."""

    def __init__(self) -> None:
        self._data = bytearray()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data: Any) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        data = bytes(self._data)
        self._data.clear()
        return data


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ExtraMissingError(
            'Formats but for wav and pcm are encoded by PyAV, which is not installed: pip install "neuron-xtts[audio]"'
        ) from error
    return av
