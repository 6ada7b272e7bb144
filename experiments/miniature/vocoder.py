"""Train coqui-tts's HifiDecoder to speak the latents of the trained GPT.

    python experiments/miniature/vocoder.py WORK [--steps 2500] [--device cuda --workers 12 --batch 32]

Reads what data.py, codes.py and gpt.py wrote; writes WORK/vocoder.pt every 200 steps. What is there already is the
start. It follows WORK/gpt.pt while gpt.py still trains beside it.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from arguments import check_files, positive, whole
from data import HELD_OUT, RATE, VOICES
from gpt import Batch, Data, loader
from model import SOUNDS, START, STOP, STRIDE, VOCODER_CHANNELS, VOCODER_HIDDEN, latents, layers_of, make_gpt
from torch import Tensor, nn
from torch.nn import functional as F

OUTPUT_RATE = 24000
SEGMENT = 16  # latents of an example, 0.74 s
SAMPLES = int(SEGMENT * 4 * OUTPUT_RATE / RATE) * 256
RESOLUTIONS = ((2048, 300), (1024, 170), (512, 90), (256, 50), (128, 30))  # window and hop of spectrograms


class Speech:
    """Latents of the GPT, teacher-forced, and the audio that they stand for."""

    def __init__(self, work: Path, seed: int, device: str) -> None:
        check_files(work, "vocab.json", "gpt.pt")
        self.path = work / "gpt.pt"
        self.data = Data.load(work)
        self.references = {name: pool.to(device) for name, pool in self.data.references.items()}
        self.audio = np.load(work / "audio.npy", mmap_mode="r")
        self.starts = np.concatenate([[0], np.cumsum(np.load(work / "lengths.npy"))])
        self.gpt = make_gpt(self.data.tokenizer, layers_of(torch.load(self.path, map_location="cpu")["gpt"])).eval()
        self.gpt.to(device)
        self.random = np.random.default_rng(seed)
        self.upsample = torchaudio.transforms.Resample(RATE, OUTPUT_RATE).to(device)
        self.seed, self.device = seed, device
        self.changed = 0.0
        self.step = 0

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the GPT again if it has been trained on, and take other recordings of its voices."""
        if os.path.getmtime(self.path) != self.changed:
            self.changed = os.path.getmtime(self.path)
            saved = torch.load(self.path, map_location=self.device)
            self.gpt.load_state_dict(saved["gpt"])
            self.step = saved["step"]
        self.voices = torch.cat([self._voice(name) for name in VOICES])  # four of each

    def _voice(self, name: str) -> Tensor:
        pool = self.references[name]
        some = pool[self.random.integers(0, len(pool), 4).tolist()]
        style: Tensor = self.gpt.get_style_emb(some[..., : self.random.integers(172, 346)])
        return style.transpose(1, 2)

    def sentences(self, count: int, process: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Without end: ``count`` sentences, at which code (B,) an example of each begins, its audio (B, N)."""
        random, data = np.random.default_rng([self.seed, process]), self.data
        rows = [row for row in range(len(data.texts) - HELD_OUT) if len(data.codes[row]) >= SEGMENT]
        while True:
            some = random.choice(rows, count).tolist()
            # The ends of sentences are short and need as much care as all the rest.
            lasts = [len(data.codes[row]) + 1 - SEGMENT for row in some]
            starts = [last if random.random() < 0.1 else int(random.integers(0, last + 1)) for last in lasts]
            audio = torch.stack([self._audio(row, start) for row, start in zip(some, starts, strict=True)])
            yield data.batch(some), torch.tensor(starts), audio

    @torch.no_grad()
    def examples(self, batch: Batch, starts: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, D, SEGMENT) and audio (B, SAMPLES) at 24 kHz."""
        batch, starts, audio = batch.to(self.device), starts.to(self.device), audio.to(self.device)
        lengths = batch.lengths + 1
        codes = F.pad(batch.codes, (1, 0), value=START)
        voices = 4 * batch.whose + torch.randint(0, 4, batch.whose.shape, device=self.device)
        # Every other sentence has codes that the GPT draws, as every sentence will have in the end.
        others = (part[1::2] for part in (voices, batch.text, batch.text_lengths, codes, lengths))
        _, hidden = latents(self.gpt, self.voices, *others)
        logits = self.gpt.mel_head(hidden[:, :-1])[..., :SOUNDS] / 0.5
        drawn = torch.multinomial(logits.flatten(0, 1).softmax(1), 1).view(logits.shape[:2])
        codes[1::2, 1:] = torch.where(codes[1::2, 1:] == STOP, STOP, drawn)
        _, hidden = latents(self.gpt, self.voices, voices, batch.text, batch.text_lengths, codes, lengths)
        places = starts[:, None] + torch.arange(SEGMENT, device=self.device)
        segments = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2])).transpose(1, 2)
        return segments, self.upsample(audio)[:, :SAMPLES]

    def _audio(self, row: int, start: int) -> Tensor:
        """Samples at 22.05 kHz of a sentence from a code on, a few more than a segment has."""
        first = self.starts[row] + start * STRIDE
        samples = self.audio[first : min(first + SEGMENT * STRIDE + 64, self.starts[row + 1])]
        wave = torch.from_numpy(samples.astype(np.float32) / 32768)
        return F.pad(wave, (0, SEGMENT * STRIDE + 64 - len(wave)))


class Distance(nn.Module):
    """How far speech is from other speech, by its spectrograms."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.windows = {size: torch.hann_window(size, device=device) for size, _ in RESOLUTIONS}
        self.mel = torchaudio.transforms.MelSpectrogram(
            OUTPUT_RATE, 1024, 1024, 256, n_mels=100, f_max=12000, power=1, norm="slaney"
        ).to(device)

    def forward(self, made: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The whole distance, and that of log mel spectrograms alone."""
        total = torch.zeros((), device=made.device)
        for size, hop in RESOLUTIONS:
            a, b = (
                torch.stft(x, size, hop, window=self.windows[size], return_complex=True).abs() for x in (made, real)
            )
            floor = 1e-3 * size**0.5
            total = total + (torch.log(a + floor) - torch.log(b + floor)).abs().mean()
            total = total + (a - b).pow(2).sum().sqrt() / (b.pow(2).sum().sqrt() + 1e-3)
        mel = (torch.log(self.mel(made) + 1e-4) - torch.log(self.mel(real) + 1e-4)).abs().mean()
        return total / len(RESOLUTIONS) + mel, mel


def upsampled(segments: Tensor) -> Tensor:
    """Latents (B, D, N) at the frame rate of the vocoder, as ``HifiDecoder.forward`` makes them."""
    frames = F.interpolate(segments, scale_factor=[4.0], mode="linear")
    return F.interpolate(frames, scale_factor=[OUTPUT_RATE / RATE], mode="linear")


def make_vocoder(width: int, hidden: int = VOCODER_HIDDEN) -> tuple[Any, Tensor]:
    """The network of coqui-tts's HifiDecoder, narrow, and the speaker embedding (1, 512, 1) that it always gets.

    Args:
        width: of latents.
        hidden: channels in front of the first stage.
    """
    from TTS.tts.layers.xtts.hifigan_decoder import HifiDecoder

    decoder = HifiDecoder(decoder_input_dim=width, upsample_initial_channel_decoder=VOCODER_CHANNELS)
    network = decoder.waveform_decoder.train()
    up = network.ups[0]
    network.conv_pre = nn.Conv1d(width, hidden, 7, padding=3)
    network.cond_layer = nn.Conv1d(network.cond_layer.in_channels, hidden, 1)
    network.ups[0] = nn.utils.parametrizations.weight_norm(
        nn.ConvTranspose1d(hidden, up.out_channels, up.kernel_size[0], up.stride[0], padding=up.padding[0])
    )
    speaker = F.normalize(torch.randn(1, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    return network, speaker[..., None]


def flatten(network: Any) -> None:
    """Have convolutions over (B, C, T) computed as ones over (B, C, 1, T) with channels last, which oneDNN does faster.

    Also backwards.
    """

    def convolve(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = (tensor.unsqueeze(2).contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
        return F.conv2d(x, weight, bias, padding=(0, *conv.padding), dilation=(1, *conv.dilation)).squeeze(2)

    def expand(conv: Any, x: Tensor) -> Tensor:
        x, weight = (tensor.unsqueeze(2).contiguous(memory_format=torch.channels_last) for tensor in (x, conv.weight))
        return F.conv_transpose2d(x, weight, conv.bias, stride=(1, *conv.stride), padding=(0, *conv.padding)).squeeze(2)

    for module in network.modules():
        if isinstance(module, nn.Conv1d):
            module._conv_forward = partial(convolve, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.ConvTranspose1d):
            module.forward = partial(expand, module)  # type: ignore[method-assign]


def go_on(network: Any, saved: dict[str, Tensor]) -> None:
    """Take saved weights, which may have fewer channels in front of the first stage: others are unheard at first."""
    state = network.state_dict()
    known, hidden = len(saved["conv_pre.bias"]), len(state["conv_pre.bias"])
    if known > hidden:
        raise SystemExit(f"vocoder.pt has {known} channels; --hidden asks for {hidden}, and none can be taken away")
    for name, part in saved.items():
        if part.shape != state[name].shape and name.startswith(("ups.0.parametrizations.weight.original0", "cond_")):
            state[name].zero_()  # the lengths of weights of added channels, and what they are told of the speaker
        state[name][tuple(slice(size) for size in part.shape)] = part
    network.load_state_dict(state)


def train(
    work: Path,
    *,
    steps: int,
    minutes: float | None,
    rate: float,
    hidden: int,
    seed: int,
    device: str,
    workers: int,
    batch: int,
) -> None:
    """Train for so many steps of ``batch`` segments, or minutes."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    speech, distance = Speech(work, seed, device), Distance(device)
    network, speaker = make_vocoder(speech.gpt.final_norm.weight.numel(), hidden)
    network.to(device)
    if device == "cpu":
        flatten(network)
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.8, 0.99), weight_decay=0.0, foreach=True)
    if (work / "vocoder.pt").exists():
        saved = torch.load(work / "vocoder.pt", map_location=device)
        go_on(network, saved["network"])
        if "optimizer" in saved and saved["network"]["conv_pre.bias"].shape == network.conv_pre.bias.shape:
            optimizer.load_state_dict(saved["optimizer"])
    start, mean = time.time(), torch.zeros(2, device=device)
    for step, sentences in enumerate(loader(lambda process, _: speech.sentences(batch, process), workers), 1):
        if step % 100 == 1:
            speech.refresh()
        share = min(1, (time.time() - start) / 60 / minutes if minutes else step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, step / 50) * (0.03 + 0.97 * (1 + math.cos(math.pi * share)) / 2)
        segments, real = speech.examples(*sentences)
        made = network(upsampled(segments), g=speaker.to(device))[:, 0]
        loss, mel = distance(made[:, : real.shape[1]], real)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 20.0)
        optimizer.step()
        mean = mean.lerp(torch.stack([loss, mel]).detach(), 1 / min(step, 50))
        if step % 50 == 0:
            words = "distance {:.3f}, of log mels {:.3f}".format(*mean.tolist())
            print(
                f"{step}, {(time.time() - start) / 60:.1f} min: {words}; GPT of step {speech.step}",
                flush=True,
            )
        if step % 200 == 0 or share >= 1:
            saved = {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "speaker": speaker,
                "step": step,
            }
            torch.save(saved, work / "vocoder.new")
            os.replace(work / "vocoder.new", work / "vocoder.pt")
        if share >= 1:
            break


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=whole(1), default=2500)
    parser.add_argument("--minutes", type=positive, help="to train for, however many steps that are")
    parser.add_argument("--rate", type=positive, default=1.2e-3, help="of learning, at most")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument(
        "--hidden",
        type=whole(1, VOCODER_HIDDEN),
        default=VOCODER_HIDDEN,
        help="channels in front of the first stage, no fewer than what is there has (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=whole(0), default=0, help="processes that make batches")
    parser.add_argument("--batch", type=whole(1), default=4, help="segments of a step")
    train(**vars(parser.parse_args()))
