"""Recordings that strangers send: decoded by a process of its own, which bounds what they can do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from neuron_xtts.narration.encoding import wav_header

_PATIENCE = 120  # seconds for a recording
_DECODER = Path(__file__).with_name("decoder.py")


def as_wav(recording: bytes) -> bytes:
    """The first two minutes of a recording as a 16-bit mono WAV file, of its own rate up to 48 kHz.

    Raises:
        ValueError: it is no audio that is read here.
    """
    # Neither the server's folder nor that of the decoder, which has a socket.py, is where modules are looked for.
    command = [sys.executable, "-c", _DECODER.read_text(encoding="utf-8")]
    try:
        done = subprocess.run(command, input=recording, capture_output=True, timeout=_PATIENCE, cwd="/")
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"it takes longer than {_PATIENCE} s to decode") from error
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"it cannot be decoded: {reason or f'status {done.returncode}'}")
    rate, samples = int.from_bytes(done.stdout[:4], "little"), done.stdout[4:]
    return wav_header(rate, len(samples) // 2) + samples
