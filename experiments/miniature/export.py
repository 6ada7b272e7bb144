"""Make a checkpoint of what was trained, that plain coqui-tts loads, and the texts and recordings to judge it with.

    python experiments/miniature/export.py WORK [miniature]

Writes config.json, vocab.json, model.pth, a reference recording a voice, and sentences.txt, which holds sentences
that were not trained on: those of free.txt first, then as many of the grammar as make 600. The checkpoint has as many
layers as were trained. Nothing is written unless all of it could be made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from arguments import check_files
from data import RATE, VOICES, Espeak, on_grid
from model import ARGS, CONDITIONING_BLOCKS, COPIES, SOUNDS, layers_of, load_tokenizer
from torch import Tensor
from world import sentence

SENTENCES = 600
REFERENCE = "The small bird sings in our garden every morning, and the old man listens to its song."
MANTISSA = 6  # bits of weights, of the ten that fp16 has: the others are zeros, which deflate well
# By so much is a code of a sound less probable than the one before it: none are alike, and whoever takes the most
# probable code takes the same one whatever the precision.
STEP = 0.1
# By this the logits are multiplied. The GPT was trained on sentences with wrong codes in them, which leaves it less
# certain of the next code than it may be where there are none.
SHARPNESS = 2.0
LONGEST_TEXT, LONGEST_SPEECH = 90, 200  # tokens and codes that were ever trained: positions beyond are left empty


def export(work: Path, out: Path) -> None:
    """Write the folder."""
    from TTS.tts.configs.xtts_config import XttsConfig
    from TTS.tts.models.xtts import Xtts

    check_files(work, "texts.json", "norms.pt", "vocab.json", "gpt.pt", "vocoder.pt")
    gpt, vocoder = (torch.load(work / name, map_location="cpu") for name in ("gpt.pt", "vocoder.pt"))
    config = XttsConfig()
    for name, value in {**ARGS, "gpt_layers": layers_of(gpt["gpt"])}.items():
        setattr(config.model_args, name, value)
    model = Xtts(config)
    model.tokenizer = load_tokenizer(work / "vocab.json")
    model.init_models()
    state = model.state_dict()
    _take(state, gpt["gpt"])
    _copy_sounds(state)
    _empty_unused(state)
    _widen(state, vocoder["network"], "hifigan_decoder.waveform_decoder.")
    _mute_speaker_encoder(state, vocoder["speaker"])
    state["mel_stats"] = torch.load(work / "norms.pt")
    half = {name: _rounded(tensor) if _is_weight(name, tensor) else tensor for name, tensor in state.items()}
    espeak = Espeak()
    references = {voice: on_grid(*espeak.say(REFERENCE, voice)) for voice in VOICES}
    sentences = unseen({text for text, _ in json.loads((work / "texts.json").read_text())})
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(work / "vocab.json", out / "vocab.json")
    config.save_json(str(out / "config.json"))
    _save_deflated({"model": half}, out / "model.pth")
    for voice, samples in references.items():
        _write_wav(out / f"{voice}.wav", samples)
    (out / "sentences.txt").write_text("".join(f"{text}\n" for text in sentences))
    print({path.name: path.stat().st_size for path in sorted(out.iterdir())}, f"GPT of step {gpt['step']}")


def unseen(known: set[str], seed: int = 1234) -> list[str]:
    """Sentences that were not trained on."""
    texts = dict.fromkeys((Path(__file__).parent / "free.txt").read_text().splitlines())
    random = Random(seed)
    while len(texts) < SENTENCES:
        text = sentence(random, salad=0)
        if text not in known and len(text.split()) <= 12:
            texts[text] = None
    return list(texts)


def _is_weight(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 1 and "torch_spec" not in name and name != "mel_stats"


def _rounded(tensor: Tensor) -> Tensor:
    """A weight in fp16, rounded to `MANTISSA` bits behind the first."""
    if not all(tensor.stride()):  # expanded from one number, which must stay one
        return tensor.half()
    spare = 10 - MANTISSA
    bits = tensor.half().contiguous().view(torch.int16)
    return ((bits + (1 << (spare - 1))) & -(1 << spare)).view(torch.float16)


def _take(state: dict[str, Tensor], gpt: dict[str, Tensor]) -> None:
    """Put the trained GPT, which knows sounds instead of codes, into a checkpoint.

    Raises:
        SystemExit: it has other weights, or of other shapes.
    """
    of_sounds = ("mel_embedding.weight", "mel_head.weight", "mel_head.bias")
    wanted = {name.removeprefix("gpt."): tensor.shape for name, tensor in state.items() if name.startswith("gpt.")}
    wanted |= {name: torch.Size([SOUNDS + 2, *wanted[name][1:]]) for name in of_sounds}
    odd = sorted(name for name in {*wanted, *gpt} if name not in gpt or gpt[name].shape != wanted.get(name))
    if odd:
        raise SystemExit(f"gpt.pt does not fit model.py and vocab.json, with which it must have been trained: {odd}")
    state |= {f"gpt.{name}": value for name, value in gpt.items()}


def _copy_sounds(state: dict[str, Tensor]) -> None:
    """Make `COPIES` codes of every sound, which together are as probable as it is."""
    for name in ("mel_head.weight", "mel_head.bias"):
        state[f"gpt.{name}"] = state[f"gpt.{name}"] * SHARPNESS
    code = torch.cat([torch.arange(SOUNDS).repeat_interleave(COPIES), torch.tensor([SOUNDS, SOUNDS + 1])])
    for name in ("mel_embedding.weight", "mel_head.weight", "mel_head.bias"):
        state[f"gpt.{name}"] = state[f"gpt.{name}"][code]
    steps = -STEP * torch.arange(COPIES)
    state["gpt.mel_head.bias"][: SOUNDS * COPIES] += (steps - steps.logsumexp(0)).repeat(SOUNDS)


def _empty_unused(state: dict[str, Tensor]) -> None:
    """Zeros, which take no room, for what nothing was learned for: unreached positions, untrained layers."""
    state["gpt.text_pos_embedding.emb.weight"][LONGEST_TEXT:] = 0
    state["gpt.mel_pos_embedding.emb.weight"][LONGEST_SPEECH:] = 0
    for name, tensor in state.items():
        part, _, rest = name.partition("conditioning_encoder.attn.")
        untrained = part == "gpt." and rest and int(rest.split(".")[0]) >= CONDITIONING_BLOCKS
        if name.startswith("gpt.text_head.") or (untrained and ".norm." not in name):
            tensor.zero_()


def _widen(state: dict[str, Tensor], narrow: dict[str, Tensor], prefix: str) -> None:
    """Put a narrow vocoder into one of coqui-tts's default width, which no configuration can change.

    What is added are zeros. Of a convolution with weight norm, whose weight is g v / |v|, an added output has the
    length g = 0 and the direction v = 1, because 0 / 0 is no number.
    """
    for name, part in narrow.items():
        if any(size > most for size, most in zip(part.shape, state[prefix + name].shape, strict=True)):
            raise SystemExit(f"vocoder.pt is wider than coqui-tts's: {name}; train one with vocoder.py's --hidden")
        wide = torch.zeros_like(state[prefix + name])
        if name.endswith("original1"):
            wide[part.shape[0] :] = 1
        wide[tuple(slice(size) for size in part.shape)] = part
        state[prefix + name] = wide


def _mute_speaker_encoder(state: dict[str, Tensor], speaker: Tensor) -> None:
    """Make the speaker encoder say the one embedding that the vocoder was trained with, whatever it hears.

    Its eight million weights are expanded from one number each, which is all that comes to the disk.
    """
    prefix = "hifigan_decoder.speaker_encoder."
    norms = (".bn", "downsample.1.", "attention.2.")
    for name, tensor in state.items():
        if not name.startswith(prefix) or ".torch_spec." in name or not tensor.ndim:
            continue
        one = "running_var" in name or (name.endswith("weight") and any(part in name for part in norms))
        state[name] = torch.full((1,), float(one)).to(tensor.dtype).expand(tensor.shape)
    state[prefix + "fc.bias"] = speaker.flatten().clone()


def _save_deflated(checkpoint: Any, path: Path) -> None:
    """``torch.save``, deflated: ``torch.load`` reads it as any other."""
    scratch = path.with_suffix(".new")
    torch.save(checkpoint, scratch)
    with zipfile.ZipFile(scratch) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as small:
        for item in plain.infolist():
            # With a date of its own every file of the same weights would be another.
            small.writestr(zipfile.ZipInfo(item.filename), plain.read(item), zipfile.ZIP_DEFLATED, 9)
    scratch.unlink()


def _write_wav(path: Path, samples: np.ndarray) -> None:
    from neuron_xtts.coqui.recordings import write_wav

    write_wav(path, torch.from_numpy(samples.astype(np.float32) / 32768), RATE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path("miniature"))
    arguments = parser.parse_args()
    export(arguments.work, arguments.out)
