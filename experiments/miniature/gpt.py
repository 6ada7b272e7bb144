"""Train coqui-tts's GPT on the sounds of espeak-ng's speech.

    python experiments/miniature/gpt.py WORK [--steps 7500] [--device cuda --workers 12 --positions 8000]

Reads what data.py and codes.py wrote; writes WORK/vocab.json and, every 250 steps, WORK/gpt.pt. What is there already
is the start.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from arguments import check_files, fraction, positive, whole
from data import HELD_OUT, RATE, VOICES
from model import (
    ARGS,
    FRAMES,
    SOUNDS,
    START,
    STOP,
    STRIDE,
    conditioning_mel,
    latents,
    layers_of,
    load_tokenizer,
    make_gpt,
    write_vocabulary,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

# Of input codes, at most, that are replaced by others, a share of its own for each sentence. With less a model so small
# continues the codes it has seen and does not listen to its text.
CORRUPTION = 0.4
GUIDED = (1, 2)  # layers, from 0, whose first head is shown the text
SPREAD = 0.08  # of the sentence, by which a token may be said sooner or later than its place among the letters
REFERENCE = (172, 345)  # frames of a reference recording: 2 to 4 s


class Batch(NamedTuple):
    """Sentences that are learned together, padded."""

    whose: Tensor  # (B,) which of `VOICES` speaks
    text: Tensor  # (B, T) tokens between start and stop token
    text_lengths: Tensor  # (B,)
    places: Tensor  # (B, T) where in the sentence a token is said, from 0 to 1; 9 for padding
    codes: Tensor  # (B, M) sounds
    lengths: Tensor  # (B,) sounds of each
    mels: Tensor  # (sounds of all, FRAMES * 80) in fp16

    def to(self, device: str) -> Batch:
        """The same on a device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


@dataclass
class Data:
    """The data set: texts and voices, codes and spectrograms by sentence, and reference recordings by voice."""

    texts: list[str]
    voices: list[str]
    codes: list[Tensor]
    starts: np.ndarray  # of the codes of each sentence among those of all
    mels: np.ndarray  # (codes of all, FRAMES * 80) in fp16, left on the disk
    references: dict[str, Tensor]
    tokenizer: Any
    ranks: dict[tuple[str, str], int]  # of the tokenizer's merges: the lowest comes first

    @classmethod
    def load(cls, work: Path) -> Data:
        """Read what data.py and codes.py wrote; make the vocabulary unless it is there."""
        check_files(work, "texts.json", "audio.npy", "lengths.npy", "mels.npy", "norms.pt", "codes.npy")
        texts, voices = map(list, zip(*json.loads((work / "texts.json").read_text()), strict=True))
        if not (work / "vocab.json").exists():
            write_vocabulary(work / "vocab.json", texts)
        tokenizer = load_tokenizer(work / "vocab.json")
        lengths = np.load(work / "lengths.npy")
        sizes = -(-lengths // STRIDE)
        audio = np.load(work / "audio.npy", mmap_mode="r")
        norms = torch.load(work / "norms.pt")
        return cls(
            [tokenizer.preprocess_text(text, "en") for text in texts],
            voices,
            list(torch.from_numpy(np.load(work / "codes.npy")).long().split(sizes.tolist())),
            np.cumsum(sizes) - sizes,
            np.load(work / "mels.npy", mmap_mode="r").reshape(-1, FRAMES * 80),
            {name: _references(audio, lengths, voices, name, norms) for name in VOICES},
            tokenizer,
            {
                tuple(pair): rank
                for rank, pair in enumerate(json.loads(tokenizer.tokenizer.to_str())["model"]["merges"])
            },
        )

    def batch(
        self, rows: list[int], texts: list[int] | None = None, dropout: float = 0.0, random: Random | None = None
    ) -> Batch:
        """Sentences together.

        Args:
            rows: which.
            texts: rows whose texts are said to be theirs; None for their own.
            dropout: of merges of the text tokenizer.
            random: what they are drawn with; None to leave out none.
        """
        tokens = [self.tokens(row, dropout, random) for row in texts or rows]
        parts = [(self.starts[row], self.starts[row] + len(self.codes[row])) for row in rows]
        return Batch(
            torch.tensor([list(VOICES).index(self.voices[row]) for row in rows]),
            nn.utils.rnn.pad_sequence([torch.tensor(row) for row in tokens], True, 0),
            torch.tensor([len(row) for row in tokens]),
            nn.utils.rnn.pad_sequence([self.places(row) for row in tokens], True, 9.0),
            nn.utils.rnn.pad_sequence([self.codes[row] for row in rows], True, STOP),
            torch.tensor([len(self.codes[row]) for row in rows]),
            torch.from_numpy(np.concatenate([self.mels[start:end] for start, end in parts])),
        )

    def tokens(self, row: int, dropout: float = 0.0, random: Random | None = None) -> list[int]:
        """The text of a sentence as tokens between start and stop token."""
        tokenizer = self.tokenizer.tokenizer
        if random is None:
            ids: list[int] = tokenizer.encode("[en]" + self.texts[row].replace(" ", "[SPACE]")).ids
            return [tokenizer.token_to_id("[START]"), *ids, 0]
        pieces = ["[START]", "[en]"]
        for number, word in enumerate(self.texts[row].split(" ")):
            pieces += ["[SPACE]"] * (number > 0)
            for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(word):
                pieces += self._merged(part, dropout, random)
        return [*map(tokenizer.token_to_id, pieces), 0]

    def _merged(self, word: str, dropout: float, random: Random) -> list[str]:
        """The pieces of a word by BPE with dropout: any merge that is possible is left out with that probability.

        The generator of `tokenizers`, which can do this, too, cannot be seeded.
        """
        pieces = list(word)
        while True:
            possible = [(self.ranks[pair], place) for place, pair in enumerate(pairwise(pieces)) if pair in self.ranks]
            kept = [merge for merge in possible if random.random() >= dropout]
            if not kept:
                return pieces
            place = min(kept)[1]
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]

    def places(self, tokens: list[int]) -> Tensor:
        """Where in a sentence its tokens (T,) are said, from 0 to 1, if every letter takes as long."""
        pieces = [self.tokenizer.tokenizer.id_to_token(token) for token in tokens]
        sizes = np.array([{"[SPACE]": 1.0}.get(piece, 0.0 if piece[0] == "[" else len(piece)) for piece in pieces])
        return torch.from_numpy(((sizes.cumsum() - sizes / 2) / sizes.sum()).astype(np.float32))


def _references(
    audio: np.ndarray, lengths: np.ndarray, voices: list[str], voice: str, norms: Tensor, count: int = 80
) -> Tensor:
    """Spectrograms (count, 80, T) of recordings of one voice, each a few sentences long."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rows = [row for row in range(len(voices) - HELD_OUT) if voices[row] == voice]
    mels, sentence = [], iter(rows)
    for _ in range(count):
        samples = np.zeros(0, np.int16)
        while len(samples) < 4.2 * RATE:
            row = next(sentence)
            samples = np.concatenate([samples, audio[starts[row] : starts[row + 1]]])
        mels.append(conditioning_mel(torch.from_numpy(samples[: int(4.2 * RATE)].astype(np.float32) / 32768), norms))
    return torch.cat(mels)


def batches(data: Data, seed: int, short: float, positions: int) -> Iterator[list[int]]:
    """Rows of sentences of about one length, as many as have so many positions; first so many batches of short ones."""
    random = np.random.default_rng(seed)
    made = 0
    while True:
        rows = random.permutation(len(data.texts) - HELD_OUT)
        if made < short:
            rows = rows[[len(data.codes[row]) < 36 for row in rows]][:4000]
        together: list[list[int]] = []
        for some in np.array_split(rows, max(1, len(rows) // 1000)):
            batch: list[int] = []
            for row in sorted(some.tolist(), key=lambda row: len(data.codes[row])):
                size = len(data.codes[row]) + len(data.texts[row]) // 2
                if batch and (len(batch) + 1) * size > positions:
                    together.append(batch)
                    batch = []
                batch.append(row)
        for index in random.permutation(len(together)):
            made += 1
            yield together[index]


class Batches(IterableDataset[Any]):
    """Batches without end; each of a loader's processes makes its share of them.

    Args:
        made: calls with the number of a process and how many there are give what this one makes.
    """

    def __init__(self, made: Callable[[int, int], Iterator[Any]]) -> None:
        self.made = made

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        return self.made(info.id, info.num_workers) if info else self.made(0, 1)


def loader(made: Callable[[int, int], Iterator[Any]], workers: int) -> DataLoader[Any]:
    """What loads batches in so many processes, or in this one if 0."""
    return DataLoader(
        Batches(made), batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )


class Trainer:
    """The GPT, and a layer that reads spectrograms off its latents, so that a vocoder finds them there.

    Args:
        data: what is learned.
        layers: of the GPT.
        seed: of weights and examples.
        device: where.
    """

    def __init__(self, data: Data, layers: int, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.data = data
        self.device = device
        self.references = {name: pool.to(device) for name, pool in data.references.items()}
        self.gpt = make_gpt(data.tokenizer, layers).train().to(device)
        #: How often a sound (row) is taken for another, as the GPT has predicted so far.
        self.mistaken = torch.full((SOUNDS + 2, SOUNDS), 1 / SOUNDS, device=device)
        for module in self.gpt.modules():  # what is corrupted is regularized enough
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for block in self.gpt.gpt.h:
            block.mlp.act = nn.GELU(approximate="tanh")  # the same function, as one operator
        self._products: list[Tensor] = []  # of `GUIDED`, for the voices and then for the rows
        for number in GUIDED:
            attention = self.gpt.gpt.h[number].attn
            attention.c_attn.register_forward_hook(lambda module, args, product: self._products.append(product))
        width = self.gpt.final_norm.weight.numel()
        self.reader = nn.Linear(2 * width, FRAMES * 80).to(device)

    def loss(self, batch: Batch, *, guided: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cross entropy of sounds, error of spectrograms, error of guided attention or 0, and share of right sounds."""
        gpt, device = self.gpt, self.device
        batch = batch.to(device)
        lengths = batch.lengths + 1
        inputs = F.pad(batch.codes, (1, 0), value=START)
        targets = F.pad(batch.codes, (0, 1), value=STOP)
        if gpt.training:
            wrong = torch.rand(inputs.shape, device=device) < torch.rand(len(inputs), 1, device=device) * CORRUPTION
            wrong[:, 0] = False
            # Half of them by those that the GPT itself confuses them with, as it will when it hears itself.
            close = torch.multinomial(self.mistaken[inputs.flatten()], 1).view(inputs.shape)
            others = torch.randint(0, SOUNDS, inputs.shape, device=device)
            others = torch.where(torch.rand(inputs.shape, device=device) < 0.5, close, others)
            inputs = torch.where(wrong & (inputs < START), others, inputs)
        voices = torch.stack([self.voice(name) for name in VOICES])
        self._products.clear()
        _, hidden = latents(gpt, voices, batch.whose, batch.text, batch.text_lengths, inputs, lengths)
        real = torch.arange(hidden.shape[1], device=device) < lengths[:, None]
        logits = gpt.mel_head(hidden[real])
        spoken = real[:, 1:]
        read = self.reader(torch.cat([hidden[:, :-1], hidden[:, 1:]], -1)[spoken])
        wanted = targets[real]
        right = (logits.argmax(1) == wanted).float().mean()
        if gpt.training:
            seen = torch.zeros_like(self.mistaken).index_add_(0, wanted, logits.detach()[:, :SOUNDS].softmax(1))
            counts = torch.bincount(wanted, minlength=SOUNDS + 2)[:, None]
            mean = seen / counts.clamp(min=1)
            self.mistaken = torch.where(counts > 0, self.mistaken.lerp(mean, 0.02), self.mistaken)
        astray = self._astray(batch, lengths) if guided else torch.zeros((), device=device)
        return F.cross_entropy(logits, wanted), F.l1_loss(read, batch.mels.float()), astray, right

    def _astray(self, batch: Batch, lengths: Tensor) -> Tensor:
        """How far the first head of `GUIDED` layers looks from the token that is being said, when a code is drawn.

        Without a hint it takes thousands of steps to find out that there is a text to read.
        """
        size, codes = batch.text.shape[1], batch.codes.shape[1] + 1
        steps = torch.arange(codes, device=self.device)
        now = (steps + 0.5) / lengths[:, None]  # (B, M)
        near = torch.exp(-((now[..., None] - batch.places[:, None]) ** 2) / (2 * SPREAD**2))  # (B, M, T)
        late = steps > steps[:, None]  # (M, M)
        padded = (torch.arange(size, device=self.device) >= batch.text_lengths[:, None])[:, None]  # (B, 1, T)
        losses = []
        width = self.gpt.final_norm.weight.numel()
        head = width // self.gpt.gpt.config.n_head
        for voices, product in zip(*(self._products[k : k + len(GUIDED)] for k in (0, len(GUIDED))), strict=True):
            query = product[:, size:, :head]
            key = torch.cat([voices[batch.whose], product], 1)[..., width : width + head]
            scores = query @ key.transpose(1, 2) / head**0.5  # (B, M, 32 + T + M)
            voice, text, past = scores.split([voices.shape[1], size, codes], -1)
            text = text.masked_fill(padded, -1e4)
            weights = torch.cat([text, voice, past.masked_fill(late, -1e4)], -1).softmax(-1)
            mass = (weights[..., :size] * near).sum(-1)
            losses.append(-(mass + 1e-3).log()[steps < lengths[:, None]].mean())
        return torch.stack(losses).mean()

    def voice(self, name: str) -> Tensor:
        """Conditioning latents (32, D) of a recording of a voice: any one in training, else always the same."""
        pool = self.references[name]
        size = int(torch.randint(*REFERENCE, ())) if self.gpt.training else REFERENCE[1]
        number = int(torch.randint(len(pool), ())) if self.gpt.training else 0
        start = int(torch.randint(0, pool.shape[2] - size + 1, ())) if self.gpt.training else 0
        style: Tensor = self.gpt.get_style_emb(pool[number : number + 1, :, start : start + size])
        return style[0].t()

    @torch.no_grad()
    def held_out(self) -> str:
        """How well sentences that were not trained on are said: with their own texts, and with those of others."""
        self.gpt.eval()
        count = len(self.data.texts)
        rows = sorted(range(count - HELD_OUT, count), key=lambda row: len(self.data.codes[row]))
        figures = []
        for texts in (rows, rows[20:] + rows[:20]):
            parts = [(rows[k : k + 20], texts[k : k + 20]) for k in range(0, HELD_OUT, 20)]
            figures.append(torch.tensor([self.loss(self.data.batch(*part)) for part in parts]).mean(0).tolist())
        self.gpt.train()
        (own, mel, astray, right), (other, *_) = figures
        words = f"held out: {own:.3f}, {right:.1%} right, spectrogram {mel:.3f}, astray {astray:.3f}"
        return f"{words}; with other texts {other:.3f}"

    def state(self) -> dict[str, Any]:
        """What is saved."""
        return {"gpt": self.gpt.state_dict(), "reader": self.reader.state_dict()}


def go_on(gpt: Any, saved: dict[str, Tensor]) -> None:
    """Take saved weights, which may be those of fewer layers: what is added passes everything on at first."""
    known = layers_of(saved)
    if known > len(gpt.gpt.h):
        raise SystemExit(f"gpt.pt has {known} layers; --layers asks for {len(gpt.gpt.h)}, and none can be taken away")
    for block in gpt.gpt.h[known:]:
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    gpt.load_state_dict({**gpt.state_dict(), **saved})


def train(
    work: Path,
    *,
    steps: int,
    minutes: float | None,
    rate: float,
    layers: int,
    dropout: float,
    spectrograms: float,
    guidance: float,
    seed: int,
    device: str,
    workers: int,
    positions: int,
) -> None:
    """Train for so many steps, or minutes."""
    torch.set_float32_matmul_precision("high")
    data = Data.load(work)
    trainer = Trainer(data, layers, seed, device)
    gpt = trainer.gpt
    if (work / "gpt.pt").exists():
        saved = torch.load(work / "gpt.pt", map_location=device)
        go_on(gpt, saved["gpt"])
        trainer.reader.load_state_dict(saved["reader"])
        print(trainer.held_out(), flush=True)
    conditioning = [*gpt.conditioning_encoder.parameters(), *gpt.conditioning_perceiver.parameters()]
    conditioning = [parameter for parameter in conditioning if parameter.requires_grad]
    known = set(map(id, conditioning))
    others = [p for p in (*gpt.parameters(), *trainer.reader.parameters()) if p.requires_grad and id(p) not in known]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim > 1], "rate": rate, "weight_decay": 0.02},
            {"params": [p for p in others if p.ndim == 1], "rate": rate, "weight_decay": 0.0},
            {"params": conditioning, "rate": 2e-4, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.96),
        foreach=True,
    )
    short = 0.0 if (work / "gpt.pt").exists() else 0.1 * steps

    def made(process: int, processes: int) -> Iterator[Batch]:
        random = Random(f"{seed} {process}")
        for rows in islice(batches(data, seed, short, positions), process, None, processes):
            yield data.batch(rows, dropout=dropout, random=random)

    start, mean = time.time(), torch.zeros(4, device=device)
    for step, batch in enumerate(loader(made, workers), 1):
        share = (time.time() - start) / 60 / minutes if minutes else step / steps
        factor = min(1, step / 150) * (0.02 + 0.98 * (1 + math.cos(math.pi * min(1, share))) / 2)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        codes, mels, astray, right = trainer.loss(batch, guided=guidance > 0)
        optimizer.zero_grad()
        (codes + spectrograms * mels + guidance * (1 - share) * astray).backward()
        nn.utils.clip_grad_norm_(conditioning, 0.1)  # by themselves: they explode first
        nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        mean = mean.lerp(torch.stack([codes, mels, astray, right]).detach(), 1 / min(step, 50))
        if step % 50 == 0:
            words = "codes {:.3f}, spectrogram {:.3f}, astray {:.3f}, right {:.1%}".format(*mean.tolist())
            print(f"{step}, {(time.time() - start) / 60:.1f} min: {words}", flush=True)
        if step % 250 == 0 or share >= 1:
            print(trainer.held_out(), flush=True)
            torch.save({**trainer.state(), "step": step}, work / "gpt.new")
            os.replace(work / "gpt.new", work / "gpt.pt")
        if share >= 1:
            break


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=whole(1), default=7500)
    parser.add_argument("--minutes", type=positive, help="to train for, however many steps that are")
    parser.add_argument("--rate", type=positive, default=1.5e-3, help="of learning, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--layers",
        type=whole(max(GUIDED) + 1),
        default=ARGS["gpt_layers"],
        help="no fewer than what is there has (default: %(default)s)",
    )
    parser.add_argument("--dropout", type=fraction, default=0.15, help="of merges of the text tokenizer")
    parser.add_argument("--spectrograms", type=float, default=0.5, help="what their error weighs")
    parser.add_argument("--guidance", type=float, default=0.3, help="what it weighs to look astray, at first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=whole(0), default=0, help="processes that make batches")
    parser.add_argument("--positions", type=whole(1), default=1600, help="of a batch")
    train(**vars(parser.parse_args()))
