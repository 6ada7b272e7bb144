"""A program that reads a recording of a stranger from standard input, and writes samples: rate, then 16-bit mono.

In a process of its own what a small file can ask of a decoder is bounded: memory, time, and what a flaw of it breaks.
It imports nothing of this package, so that it begins at once.
"""

from __future__ import annotations

import io
import itertools
import re
import resource
import sys

_MEMORY = 2**29  # bytes of addresses; an ordinary recording takes a quarter of them
_SECONDS = 20  # of a processor
_LONGEST = 120  # seconds of sound; XTTS takes 30
_RATES = range(4000, 384_001)  # samples per second
_FASTEST = 48_000  # that are kept: more says nothing about a voice
#: FFmpeg's demuxers, by what files begin with: bytes, and from where on. Left to itself FFmpeg takes a playlist for
#: audio, too, and opens whatever files it names.
_KINDS = {
    "wav": ((b"RIFF", 0), (b"WAVE", 8)),
    "w64": ((b"riff\x2e\x91\xcf\x11", 0),),
    "aiff": ((b"FORM", 0), (b"AIF", 8)),
    "caf": ((b"caff", 0),),
    "flac": ((b"fLaC", 0),),
    "ogg": ((b"OggS", 0),),
    "matroska": ((b"\x1aE\xdf\xa3", 0),),  # WebM, which browsers record
    "mp4": ((b"ftyp", 4),),  # M4A, which Safari and telephones record
}
_FRAME = re.compile(rb"\xff[\xe2-\xff]")  # of MPEG's audio
_ADTS = re.compile(rb"\xff[\xf0\xf1\xf8\xf9]")  # of AAC


def main() -> int:
    """Decode; returns 1, with the reason on standard error, where that cannot be."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    try:
        rate, samples = decode(sys.stdin.buffer.read())
    except Exception as error:  # whatever a decoder raises, it is no recording
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(rate.to_bytes(4, "little") + samples)
    return 0


def decode(recording: bytes) -> tuple[int, bytes]:
    """The rate and the 16-bit mono samples of the first two minutes of a recording.

    Raises:
        ValueError: it is no audio that is read here.
    """
    import av

    recording = without_tag(recording)
    with av.open(io.BytesIO(recording), format=kind_of(recording), metadata_errors="replace") as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None or stream.codec_context is None:
            raise ValueError("it has no audio that can be decoded")
        if stream.rate not in _RATES:
            raise ValueError(f"it has {stream.rate} samples per second")
        rate = min(stream.rate, _FASTEST)
        resampler = av.AudioResampler("s16", "mono", rate)
        samples, most = bytearray(), 2 * _LONGEST * rate
        for frame in itertools.chain(container.decode(stream), [None]):
            for part in resampler.resample(frame):
                samples += bytes(part.planes[0])[: 2 * part.samples]
            if len(samples) >= most:
                break
    return rate, bytes(samples[:most])


def without_tag(recording: bytes) -> bytes:
    """What comes behind ID3's tag, which any kind of file may begin with."""
    if recording[:3] != b"ID3" or len(recording) < 10:
        return recording
    size = sum((byte & 0x7F) << shift for byte, shift in zip(recording[6:10], (21, 14, 7, 0), strict=True))
    return recording[10 + size :]


def kind_of(recording: bytes) -> str:
    """The demuxer for a recording.

    Raises:
        ValueError: it begins as none does that is read here.
    """
    begin = recording[:12].replace(b"RF64", b"RIFF", 1)
    for kind, marks in _KINDS.items():
        if all(begin[place : place + len(mark)] == mark for mark, place in marks):
            return kind
    if _ADTS.match(recording):
        return "aac"
    if _FRAME.search(recording[:4096]):
        return "mp3"
    raise ValueError("it begins as no audio file does that is read here")


if __name__ == "__main__":
    sys.exit(main())
