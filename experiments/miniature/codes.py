"""The code tokenizer: coqui-tts's DVAE, trained on spectrograms, and the sounds of every sentence.

    python experiments/miniature/codes.py WORK [--processes 2]

Writes WORK/mels.npy ((F, 80) in fp16, of all sentences, `FRAMES` for each code), WORK/norms.pt ((80,), what XTTS calls
mel_stats), WORK/dvae.pt and WORK/codes.npy (of all sentences, one after another). What is there already is
taken as it is: the tokenizer and the norms of other sentences fit more of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import check_files, whole
from model import COPIES, FRAMES, SOUNDS, STRIDE, make_dvae
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

WINDOW = 64  # frames of a training example
_function: Callable[[int], np.ndarray]  # of the processes of a pool


class Speech:
    """The audio of a data set, of which each process of a pool makes spectrograms."""

    def __init__(self, work: Path) -> None:
        from TTS.tts.layers.tortoise.arch_utils import TorchMelSpectrogram

        self.audio = np.load(work / "audio.npy", mmap_mode="r")
        self.lengths = np.load(work / "lengths.npy")
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.spectrogram = TorchMelSpectrogram(mel_norm_file=None, sampling_rate=22050)

    def mel(self, row: int) -> np.ndarray:
        """The spectrogram (T, 80) of a sentence in fp16."""
        samples = self.audio[self.starts[row] : self.starts[row] + self.lengths[row]]
        wave = torch.from_numpy(samples.astype(np.float32) / 32768)
        mel: Tensor = self.spectrogram(F.pad(wave, (0, -len(wave) % STRIDE))[None])[0, :, :-1]
        return mel.t().half().numpy()


def spectrograms(work: Path, processes: int) -> Tensor:
    """Spectrograms (F, 80) of all sentences, each channel divided by its mean size."""
    speech = Speech(work)
    together = torch.from_numpy(
        np.concatenate(in_processes("spectrograms", speech.mel, len(speech.lengths), processes))
    )
    if (work / "norms.pt").exists():
        norms = torch.load(work / "norms.pt")
    else:
        norms = together[::7].float().abs().mean(0)
        torch.save(norms, work / "norms.pt")
    for part in together.split(100_000):
        part.copy_(part.float() / norms)
    np.save(work / "mels.npy", together.numpy())
    return together


def in_processes(what: str, function: Callable[[int], np.ndarray], count: int, processes: int) -> list[np.ndarray]:
    """What a function makes of the numbers below ``count``, in processes that are forked and so know what it knows."""
    global _function
    _function = function
    with get_context("fork").Pool(processes, torch.set_num_threads, (1,)) as pool:
        return list(tqdm(pool.imap(_call, range(count), 50), what, count, mininterval=10))


def _call(number: int) -> np.ndarray:
    return _function(number)


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


def main(work: Path, steps: tuple[int, int], processes: int) -> None:
    """Make spectrograms, tokenizer and codes."""
    check_files(work, "texts.json", "audio.npy", "lengths.npy")
    start = time.time()
    mels = (
        torch.from_numpy(np.load(work / "mels.npy")) if (work / "mels.npy").exists() else spectrograms(work, processes)
    )
    if (work / "dvae.pt").exists():
        dvae = make_dvae().eval()
        dvae.load_state_dict(torch.load(work / "dvae.pt"))
    else:
        dvae = train(mels, steps=steps)
        torch.save(dvae.state_dict(), work / "dvae.pt")
    sizes = -(-np.load(work / "lengths.npy") // STRIDE)
    parts = mels.split((sizes * FRAMES).tolist())
    codes = in_processes("codes", lambda row: encode(dvae, parts[row]), len(parts), processes)
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
    parser.add_argument("--steps", type=whole(1), nargs=2, default=(400, 1500), help="without and with codes")
    parser.add_argument("--processes", type=whole(1), default=2)
    main(**vars(parser.parse_args()))
