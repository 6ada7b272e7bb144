"""Recordings that strangers send: decoded here, by a decoder that their first bytes choose.

Left to itself FFmpeg takes a playlist for audio, too, and opens whatever files it names.
"""

from __future__ import annotations

import io

import numpy as np

from neuron_xtts.narration.encoding import wav_header

_LONGEST = 600  # seconds; XTTS takes 30 of them, and a small file may hold days
_RATES = range(8000, 192_001)  # samples per second
#: FFmpeg's demuxers, by what files begin with: bytes, and from where on.
_KINDS = {
    "wav": ((b"RIFF", 0), (b"WAVE", 8)),
    "aiff": ((b"FORM", 0), (b"AIF", 8)),
    "flac": ((b"fLaC", 0),),
    "ogg": ((b"OggS", 0),),
    "matroska": ((b"\x1aE\xdf\xa3", 0),),  # WebM, which browsers record
    "mp4": ((b"ftyp", 4),),  # M4A, which Safari and telephones record
    "mp3": ((b"ID3", 0),),
}


def as_wav(recording: bytes) -> bytes:
    """A recording as a 16-bit mono WAV file of the rate that it has.

    Raises:
        ValueError: it is no audio that is read here, or too long.
    """
    import av

    kind = _kind(recording)
    try:
        with av.open(io.BytesIO(recording), format=kind) as container:
            if not container.streams.audio:
                raise ValueError("it has no audio")
            rate = container.streams.audio[0].rate
            if rate not in _RATES:
                raise ValueError(f"it has {rate} samples per second")
            resampler = av.AudioResampler("s16", "mono", rate)
            parts, count = [], 0
            for frame in container.decode(audio=0):
                for part in resampler.resample(frame):
                    parts.append(part.to_ndarray().reshape(-1))
                    count += parts[-1].size
                if count > _LONGEST * rate:
                    raise ValueError(f"it is longer than {_LONGEST} s")
            parts += [part.to_ndarray().reshape(-1) for part in resampler.resample(None)]
    except av.FFmpegError as error:
        raise ValueError(f"it cannot be read as {kind}: {error}") from error
    samples = np.concatenate(parts) if parts else np.zeros(0, np.int16)
    return wav_header(rate, len(samples)) + samples.astype("<i2").tobytes()


def _kind(recording: bytes) -> str:
    for kind, marks in _KINDS.items():
        if all(recording[place : place + len(mark)] == mark for mark, place in marks):
            return kind
    if recording[:1] == b"\xff" and len(recording) > 1 and recording[1] & 0xE0 == 0xE0:  # a frame of MPEG's
        return "aac" if recording[1] & 0x06 == 0 else "mp3"
    raise ValueError("it begins as no audio file does that is read here")
