"""The code tokenizer: coqui-tts's DVAE, trained on spectrograms, and the sounds of every sentence.

    python experiments/miniature/codes.py WORK

Writes WORK/mels.npy ((F, 80) in fp16, of all sentences, `FRAMES` for each code), WORK/norms.pt ((80,), what XTTS calls
mel_stats), WORK/dvae.pt and WORK/codes.npy (of all sentences, one after another). Spectrograms and tokenizer are made
unless they are there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import COPIES, FRAMES, SOUNDS, STRIDE, make_dvae
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

WINDOW = 64  # frames of a training example


def spectrograms(work: Path) -> Tensor:
    """Spectrograms (F, 80) of all sentences, each channel divided by its mean size."""
    from TTS.tts.layers.tortoise.arch_utils import TorchMelSpectrogram

    audio = np.load(work / "audio.npy", mmap_mode="r")
    spectrogram = TorchMelSpectrogram(mel_norm_file=None, sampling_rate=22050)
    mels: list[Tensor] = []
    start = 0
    for length in tqdm(np.load(work / "lengths.npy"), desc="spectrograms", mininterval=10):
        samples = torch.from_numpy(audio[start : start + length].astype(np.float32) / 32768)
        samples = F.pad(samples, (0, -len(samples) % STRIDE))
        mels.append(spectrogram(samples[None])[0, :, :-1].t().half())
        start += length
    together = torch.cat(mels)
    norms = together[::7].float().abs().mean(0)
    for part in together.split(100_000):
        part.copy_(part.float() / norms)
    np.save(work / "mels.npy", together.numpy())
    torch.save(norms, work / "norms.pt")
    return together


def train(mels: Tensor, *, steps: tuple[int, int], seed: int = 0, batch: int = 32) -> Any:
    """Train the DVAE: first without codes, then with those that k-means finds.

    Args:
        mels: (F, 80).
        steps: without and with codes.
        seed: of weights and examples.
        batch: examples of a step.
    """
    torch.manual_seed(seed)
    dvae = make_dvae().train()
    optimizer = torch.optim.AdamW(dvae.parameters(), weight_decay=0)

    def examples(count: int) -> Tensor:
        starts = torch.randint(0, (len(mels) - WINDOW) // FRAMES, (count,)) * FRAMES
        return torch.stack([mels[start : start + WINDOW].t() for start in starts.tolist()]).float()

    def run(steps: int, rate: float, *, quantized: bool) -> None:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 50) * (1 - 0.95 * step / steps)
            x = examples(batch)
            if quantized:
                reconstruction, commitment, _ = dvae(x)
                error = reconstruction.mean()
                loss = error + 0.25 * commitment
            else:
                encoded = y = dvae.encoder(x)
                for layer in dvae.decoder:
                    y = layer(y)
                error = F.mse_loss(y, x)
                loss = error + 1e-3 * encoded.pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 100 == 0 or step == steps - 1:
                print(
                    f"{'codes' if quantized else 'no codes'}: step {step}, squared error {error.item():.4f}", flush=True
                )

    run(steps[0], 2e-3, quantized=False)
    with torch.no_grad():
        vectors = torch.cat([dvae.encoder(examples(256)).permute(0, 2, 1).flatten(0, 1) for _ in range(10)])
        _set_codebook(dvae.codebook, vectors, batch * WINDOW // FRAMES)
    run(steps[1], 1e-3, quantized=True)
    return dvae.eval()


def _set_codebook(codebook: Any, vectors: Tensor, batch: int) -> None:
    """Begin with the centres that k-means finds among vectors (N, D); ``batch`` are counted in a step of training."""
    size = codebook.embed.shape[1]
    centres = vectors[torch.randperm(len(vectors))[:size]].clone()
    for _ in range(12):
        nearest = (centres.pow(2).sum(1) - 2 * vectors @ centres.t()).argmin(1)
        counts = torch.bincount(nearest, minlength=size).float()
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        lost = vectors[torch.randint(0, len(vectors), (size,))]
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), lost)
    counts = counts.clamp(min=1) * batch / len(vectors)
    codebook.embed.copy_(centres.t())
    codebook.embed_avg.copy_(centres.t() * counts)
    codebook.cluster_size.copy_(counts)


@torch.no_grad()
def encode(dvae: Any, mel: Tensor) -> np.ndarray:
    """The sounds of a spectrogram (T, 80), none of them oftener than it has codes: the nearest that has one left."""
    vectors = dvae.encoder(mel.t()[None].float())[0].t()
    book = dvae.codebook.embed
    nearest = (book.pow(2).sum(0) - 2 * vectors @ book).argsort(1).tolist()
    left = [COPIES] * SOUNDS
    codes = []
    for sounds in nearest:
        codes.append(next(sound for sound in sounds if left[sound]))
        left[codes[-1]] -= 1
    return np.array(codes, np.int16)


def main(work: Path, steps: tuple[int, int]) -> None:
    """Make spectrograms, tokenizer and codes."""
    start = time.time()
    mels = torch.from_numpy(np.load(work / "mels.npy")) if (work / "mels.npy").exists() else spectrograms(work)
    if (work / "dvae.pt").exists():
        dvae = make_dvae().eval()
        dvae.load_state_dict(torch.load(work / "dvae.pt"))
    else:
        dvae = train(mels, steps=steps)
        torch.save(dvae.state_dict(), work / "dvae.pt")
    sizes = -(-np.load(work / "lengths.npy") // STRIDE)
    parts = mels.split((sizes * FRAMES).tolist())
    codes = [encode(dvae, part) for part in tqdm(parts, desc="codes", mininterval=10)]
    np.save(work / "codes.npy", np.concatenate(codes))
    with torch.no_grad():
        pairs = [
            (dvae.decode(torch.from_numpy(c).long()[None])[0][0].t(), m.float())
            for c, m in zip(codes[:300], parts, strict=False)
        ]
    error = np.mean([F.mse_loss(*pair).item() for pair in pairs])
    print(f"squared error of codes {error:.4f} of a variance of {mels[::50].float().var():.3f}")
    used = len(np.unique(np.concatenate(codes)))
    print(f"{used} sounds used, {sizes.mean():.1f} a sentence; {time.time() - start:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, nargs=2, default=(400, 1500), help="without and with codes")
    arguments = parser.parse_args()
    main(arguments.work, tuple(arguments.steps))
