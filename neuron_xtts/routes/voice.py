"""The routes ``Xtts.get_conditioning_latents`` and ``.get_speaker_embedding``: a known voice is not computed again.

``tts.tts(..., speaker_wav=...)`` computes the voice of a recording at every call. Here it is found by the content of
the recording, so that neither a copied file is new nor a changed one known.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuron_xtts.engine import DISABLE_VARIABLE, Engine, disabled
from neuron_xtts.errors import Fallback
from neuron_xtts.hooks import check_unhooked
from neuron_xtts.store import file_digest
from neuron_xtts.weights import stamp, tensor_digest, tensors_of

logger = logging.getLogger(__name__)

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class VoiceRoute:
    """What a method of ``Xtts`` makes of a recording, remembered by the recording's content.

    coqui-tts computes what is not known, through whatever other routes lead to graphs. A call that cannot be
    remembered is no error with ``strict=True``: no graph was passed over.

    Args:
        xtts: the model; no reference to it is kept.
        engine: of the patched model.
        voices: how many results to remember; 0 for none.
    """

    name: str
    recording: str  # the argument with the recording

    def __init__(self, xtts: Any, engine: Engine, voices: int) -> None:
        self._xtts = weakref.ref(xtts)
        self._engine = engine
        self._voices = voices
        self._known: OrderedDict[Any, tuple[Tensor, ...] | Tensor] = OrderedDict()
        self._lock = threading.RLock()

    def identify(self, recording: Any) -> Any:
        """What stands for a recording's content. Raises `Fallback` if nothing does."""
        raise NotImplementedError

    def __call__(self, wrapped: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """Serve the method: with a copy of what is known, or with the method itself."""
        if not self._voices:
            return wrapped(*args, **kwargs)
        counters = self._engine.counters
        with self._lock:  # threads that ask for the same voice compute it once
            start = time.perf_counter()
            try:
                key, reason = self._key(wrapped, args, kwargs)
                if reason:
                    if counters.count_fallback(self.name, reason):
                        logger.warning("%s: a voice is not remembered: %s", self.name, reason)
                    return wrapped(*args, **kwargs)
                voice, same = self._known.pop(key, None), True
                if voice is not None:
                    counters.count_handed_over(self.name)
                else:
                    voice = wrapped(*args, **kwargs)
                    same = self._key(wrapped, args, kwargs) == (key, None)  # or was the file written to meanwhile?
                counters.count_served(self.name)
                if same:
                    self._known[key] = voice
                    if len(self._known) > self._voices:
                        self._known.popitem(last=False)
                return copy_of(voice)
            finally:
                counters.add_seconds(self.name, time.perf_counter() - start)

    def _key(
        self, wrapped: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, str | None]:
        """Everything that the result depends on; or nothing, and why it cannot be said."""
        try:
            if disabled():
                raise Fallback(f"{DISABLE_VARIABLE} is set")
            modules, tensors = self._encoders()
            if any(module.training for module in modules):
                raise Fallback("training mode")
            if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
                raise Fallback("autocast")
            check_unhooked(modules)
            try:
                call = inspect.signature(wrapped).bind(*args, **kwargs)
            except TypeError:
                raise Fallback("arguments that the method does not take") from None
            call.apply_defaults()
            recording = self.identify(call.arguments.pop(self.recording))
        except Fallback as fallback:
            return None, str(fallback)
        # By repr: 6 is not 6.0, with which coqui-tts raises.
        return (recording, repr(call.arguments), tuple(map(id, modules)), stamp(tensors)), None

    def _encoders(self) -> tuple[list[nn.Module], list[Tensor]]:
        """The modules that make a voice, and their weights."""
        xtts, engine = self._xtts(), self._engine
        if xtts is None or xtts.gpt is not engine.gpt or xtts.hifigan_decoder is not engine.decoder:
            raise Fallback("the model's modules were replaced after patch()")
        gpt = xtts.gpt
        parts = [gpt.conditioning_encoder, xtts.hifigan_decoder.speaker_encoder]
        if gpt.use_perceiver_resampler:
            parts.append(gpt.conditioning_perceiver)
        tensors = [xtts.mel_stats, *(tensor for part in parts for tensor in tensors_of(part))]
        return [module for part in parts for module in part.modules()], tensors


class ConditioningLatentsRoute(VoiceRoute):
    """Conditioning latents and speaker embedding of one file or several."""

    name = "Xtts.get_conditioning_latents"
    recording = "audio_path"

    def identify(self, recording: Any) -> tuple[str, ...]:
        """See `VoiceRoute.identify`: the digests of the files."""
        paths = recording if isinstance(recording, list) else [recording]
        # A pipe is none: reading it here would leave nothing for coqui-tts.
        if not all(isinstance(path, (str, os.PathLike)) and os.path.isfile(path) for path in paths):
            raise Fallback("a reference that is not a file")
        return tuple(file_digest(Path(path)) for path in paths)


class SpeakerEmbeddingRoute(VoiceRoute):
    """Speaker embedding of samples."""

    name = "Xtts.get_speaker_embedding"
    recording = "audio"

    def identify(self, recording: Any) -> tuple[Any, ...]:
        """See `VoiceRoute.identify`: the digest of the samples."""
        if not isinstance(recording, Tensor):
            raise Fallback("a reference that is not a tensor")
        return tensor_digest(recording), recording.device


@torch.inference_mode()  # as coqui-tts makes them
def copy_of(voice: Any) -> Any:
    """A voice that the caller may write into."""
    return voice.clone() if isinstance(voice, Tensor) else tuple(tensor.clone() for tensor in voice)
