"""The voice and the settings that ``tts.tts`` would speak with, for whatever calls the methods beneath it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor, nn

from neuron_xtts.coqui.surface import Xtts
from neuron_xtts.coqui.weights import Digester, tensor_digest, tensors_of

# Arguments of ``Xtts.inference``, by which ``Xtts.synthesize`` is told by the configuration of a checkpoint.
_INFERENCE = ("temperature", "length_penalty", "repetition_penalty", "top_k", "top_p")
# Arguments of ``Xtts.get_conditioning_latents``, by their names in that configuration.
_CONDITIONING = {
    "gpt_cond_len": "gpt_cond_len",
    "gpt_cond_chunk_len": "gpt_cond_chunk_len",
    "max_ref_len": "max_ref_length",
    "sound_norm_refs": "sound_norm_refs",
}


def settings_of(xtts: Any) -> dict[str, Any]:
    """The arguments of ``Xtts.inference`` that a checkpoint was made for."""
    return {name: xtts.config[name] for name in _INFERENCE}


def conditioning_of(xtts: Any) -> dict[str, Any]:
    """The arguments of ``Xtts.get_conditioning_latents`` that a checkpoint was made for."""
    return {argument: xtts.config[name] for name, argument in _CONDITIONING.items()}


def encoders_of(xtts: Xtts) -> tuple[list[nn.Module], list[Tensor]]:
    """The modules that make a voice, those inside included, and their weights."""
    parts = _encoders(xtts)
    tensors = [xtts.mel_stats, *(tensor for part in parts for tensor in tensors_of(part))]
    return [module for part in parts for module in part.modules()], tensors


def encoders_digest(xtts: Any) -> str:
    """SHA-256 of what makes a voice of a recording: the encoders' layers and weights."""
    digester = Digester()
    found = [digester.digest(part) for part in _encoders(xtts)]
    return hashlib.sha256(json.dumps([*found, tensor_digest(xtts.mel_stats)]).encode()).hexdigest()


def _encoders(xtts: Xtts) -> list[Any]:
    gpt = xtts.gpt
    perceiver = [gpt.conditioning_perceiver] if gpt.use_perceiver_resampler else []
    return [gpt.conditioning_encoder, xtts.hifigan_decoder.speaker_encoder, *perceiver]


def voice_of(
    xtts: Any, *, speaker: str | None = None, speaker_wav: Any = None, voice_dir: Any = None
) -> tuple[Tensor, Tensor]:
    """Conditioning latents (1, 32, D) and speaker embedding (1, G, 1) of a voice.

    Args:
        xtts: the model, patched or not.
        speaker: the name of a voice of the checkpoint's, or of one in ``voice_dir``; or that a recording is to be kept
            by there.
        speaker_wav: a recording, or several of one voice.
        voice_dir: folder of voices that coqui-tts keeps.

    Raises:
        ValueError: it is neither.
    """
    known = getattr(xtts.speaker_manager, "speakers", {})
    if speaker is not None and speaker in known:
        latents, embedding = known[speaker].values()
        return latents, embedding
    if speaker_wav is None and (speaker is None or voice_dir is None):
        there = ", ".join(map(repr, known)) or "none"
        raise ValueError(
            f"speaker={speaker!r} and no speaker_wav; expected a recording to speak like, a speaker in a voice_dir, or "
            f"one of the checkpoint's speakers, of which there are: {there}"
        )
    voice = xtts.clone_voice(speaker_wav, speaker, voice_dir, **conditioning_of(xtts))
    return voice["gpt_conditioning_latents"], voice["speaker_embedding"]
