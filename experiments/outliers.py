"""What int8 makes of models with a few channels much larger than the rest, as trained transformers have.

Four channels are made larger by a factor, in five ways. The first two change nothing of what the model computes:

norms      what every norm gives, and the weights behind it smaller
values     the values of attention, and the weights of its output projection smaller
residual   whatever writes into the residual stream; gains stay as they are, so that this is another model
constant   the first block's MLP adds constants to the residual stream, so many times its size; gains and biases
           behind it make up for that, so that the model computes nearly the same
hidden     what goes into the MLP's activation, and the weights behind it smaller; no longer the same, since the
           activation is no straight line

Each model is compared with itself in fp32: the latents and the likeliest codes of sentences, the same codes put in,
those that a checkpoint says, or random ones where weights are random; and how many codes are the same from the start
of a sentence if the likeliest one is always taken. The figures of int8 are those of the library as it is, and those
without the units of neuron_xtts/backends/host/smoothing.py.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

import neuron_xtts
from neuron_xtts import options
from neuron_xtts.backends.neuron.verification import correlation
from neuron_xtts.coqui.models import SENTENCES, load_or_make
from neuron_xtts.coqui.recordings import write_reference
from neuron_xtts.tables import markdown

VARIANTS = ("bf16", "int8 unsmoothed", "int8")


def four(channels: int) -> list[int]:
    """The channels that are made large."""
    return [channels * part // 16 for part in (1, 4, 7, 11)]


def norms(gpt: Any, factor: float) -> None:
    """Scale what norms give, and the weights behind them."""
    chosen = four(gpt.final_norm.weight.shape[0])
    for block in gpt.gpt.h:
        for norm, layer in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
            norm.weight[chosen] *= factor
            norm.bias[chosen] *= factor
            layer.weight[chosen] /= factor


def values(gpt: Any, factor: float) -> None:
    """Scale the values of attention, and the weights behind it."""
    channels = gpt.final_norm.weight.shape[0]
    chosen = four(channels)
    for block in gpt.gpt.h:
        made = [2 * channels + channel for channel in chosen]  # after queries and keys
        block.attn.c_attn.weight[:, made] *= factor
        block.attn.c_attn.bias[made] *= factor
        block.attn.c_proj.weight[chosen] /= factor


def residual(gpt: Any, factor: float) -> None:
    """Scale what is written into the residual stream."""
    chosen = four(gpt.final_norm.weight.shape[0])
    gpt.conditioning_perceiver.norm.gamma[chosen] *= factor
    for table in (gpt.text_embedding, gpt.text_pos_embedding.emb, gpt.mel_embedding, gpt.mel_pos_embedding.emb):
        table.weight[:, chosen] *= factor
    for block in gpt.gpt.h:
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            layer.weight[:, chosen] *= factor
            layer.bias[chosen] *= factor


def constant(gpt: Any, factor: float) -> None:
    """Have the first block add constants, so many deviations of the residual stream, that what follows makes up for."""
    channels = gpt.final_norm.weight.shape[0]
    behind: list[tuple[nn.LayerNorm, nn.Module | None]] = [
        pair for block in gpt.gpt.h[1:] for pair in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc))
    ]
    behind.append((gpt.gpt.ln_f, None))
    streams: list[Tensor] = []
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0])) for norm, _ in behind]
    codes = torch.arange(50)[None]  # any
    gpt(codes % 9, torch.tensor([50]), codes, torch.tensor([50 * gpt.code_stride_len]), cond_latents=_voiceless(gpt),
        return_latent=True)  # fmt: skip
    for hook in hooks:
        hook.remove()
    added = torch.zeros(channels)
    added[four(channels)] = factor * streams[0].std(-1).median() * torch.tensor([1.0, -1.0, 1.0, -1.0])
    gpt.gpt.h[0].mlp.c_proj.bias += added
    for (norm, layer), stream in zip(behind, streams, strict=True):
        size = (stream + added).std(-1).median()
        norm.weight *= size / stream.std(-1).median()
        moved = norm.weight * added / size  # what the constants are, behind the norm
        if layer is None:
            norm.bias -= moved
        else:
            layer.bias -= moved @ layer.weight


def hidden(gpt: Any, factor: float) -> None:
    """Scale what goes into the activation, and the weights behind it."""
    for block in gpt.gpt.h:
        chosen = four(block.mlp.c_fc.weight.shape[1])
        block.mlp.c_fc.weight[:, chosen] *= factor
        block.mlp.c_fc.bias[chosen] *= factor
        block.mlp.c_proj.weight[chosen] /= factor


def nothing(gpt: Any, factor: float) -> None:
    """Leave the model as it is."""


WAYS: dict[str, Callable[[Any, float], None]] = {
    way.__name__: way for way in (nothing, norms, values, residual, constant, hidden)
}


def _voiceless(gpt: Any) -> Tensor:
    """The conditioning latents of noise."""
    noise = torch.randn(1, 80, 100, generator=torch.Generator().manual_seed(0))
    latents: Tensor = gpt.get_style_emb(noise).transpose(1, 2)
    return latents


@contextmanager
def patched(xtts: Any, variant: str) -> Iterator[None]:
    """A patch of one of `VARIANTS`, or fp32."""
    precision, _, unsmoothed = variant.partition(" ")
    with mock.patch.object(options, "Sample", (lambda _: None) if unsmoothed else options.Sample):
        neuron_xtts.patch(xtts, backend="cpu", precision=precision, strict=True)
    try:
        yield
    finally:
        neuron_xtts.unpatch(xtts)


class Case:
    """What a model says in fp32, and how much of it a patch still says.

    Args:
        xtts: the model.
        reference: a recording.
        texts: sentences.
        codes: of each sentence, at random; None for those that the model says.
        greedy: codes to take greedily for each sentence.
    """

    def __init__(self, xtts: Any, reference: Path, texts: list[str], codes: int | None, greedy: int) -> None:
        self.gpt = gpt = xtts.gpt
        self.voice = xtts.get_conditioning_latents(str(reference))[0]
        self.greedy = greedy
        self.texts = [torch.tensor(xtts.tokenizer.encode(text.lower(), lang="en"))[None] for text in texts]
        generator = torch.Generator().manual_seed(1)
        if codes is not None:
            self.codes = [torch.randint(gpt.start_audio_token, (1, codes), generator=generator) for _ in texts]
        with patched(xtts, "fp32") if codes is None or greedy else nullcontext():
            if codes is None:
                torch.manual_seed(1)
                self.codes = [self._generate(text, do_sample=True, top_k=50, top_p=0.85, temperature=0.75)
                              for text in self.texts]  # fmt: skip
            self.taken = self._take()
        self.latents = self._latents()
        self.likeliest = gpt.mel_head(self.latents).argmax(-1)

    def figures(self) -> tuple[str, ...]:
        """Correlation of the latents, share of equal likeliest codes, and how many greedy ones are equal."""
        latents = self._latents()
        same = (self.gpt.mel_head(latents).argmax(-1) == self.likeliest).double().mean()
        first = [int((ours == theirs).cumprod(-1).sum()) for ours, theirs in zip(self._take(), self.taken, strict=True)]
        alike = (f"{sum(first) / len(first):.0f}",) if first else ()
        return f"{correlation(latents, self.latents):.6f}", f"{100 * same:.1f} %", *alike

    def _latents(self) -> Tensor:
        """Latents (codes of all sentences, channels), teacher-forced."""
        found = []
        for text, codes in zip(self.texts, self.codes, strict=True):
            lengths = torch.tensor([text.shape[1]]), torch.tensor([codes.shape[1] * self.gpt.code_stride_len])
            found.append(self.gpt(text, lengths[0], codes, lengths[1], cond_latents=self.voice, return_latent=True)[0])
        return torch.cat(found)

    def _take(self) -> list[Tensor]:
        """The likeliest codes of each sentence; none if none were asked for."""
        length = {"min_new_tokens": self.greedy, "max_new_tokens": self.greedy}
        return [self._generate(text, do_sample=False, **length) for text in self.texts if self.greedy]

    def _generate(self, text: Tensor, **arguments: Any) -> Tensor:
        codes: Tensor = self.gpt.generate(self.voice, text, repetition_penalty=10.0, **arguments)
        return codes


@torch.inference_mode()
def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="folder of a checkpoint; default: random weights")
    parser.add_argument("--small", action="store_true", help="a small model with random weights")
    parser.add_argument("--reference", type=Path, help="a recording to clone; default: noises")
    parser.add_argument("--texts", type=Path, help="sentences, one per line; default: one of ours")
    parser.add_argument("--codes", type=int, help="random ones; default: those that a checkpoint says, or 100")
    parser.add_argument("--greedy", type=int, default=40, help="codes of each sentence (default: 40)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--factors", type=float, nargs="+", default=[10, 30, 100])
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    from TTS.tts.layers.xtts.hifigan_decoder import HifiDecoder

    texts = arguments.texts.read_text().splitlines() if arguments.texts else SENTENCES[:1]
    codes = arguments.codes or (None if arguments.checkpoint else 100)
    xtts = load_or_make(arguments.checkpoint, arguments.small).synthesizer.tts_model
    # Nothing is vocoded, and a narrow vocoder is converted in no time.
    xtts.hifigan_decoder = HifiDecoder(
        decoder_input_dim=xtts.gpt.final_norm.weight.shape[0], upsample_initial_channel_decoder=64
    ).eval()
    original = {name: tensor.clone() for name, tensor in xtts.gpt.state_dict().items()}
    figures = ("PCC", "likeliest", *((f"of {arguments.greedy}",) if arguments.greedy else ()))
    header = ("large", "times", *(f"{variant}: {figure}" for variant in arguments.variants for figure in figures))
    print("\n".join(markdown(header, [header]).splitlines()[:2]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        reference = arguments.reference or Path(folder) / "reference.wav"
        if not arguments.reference:
            write_reference(reference)
        cases = [(way, factor) for way in arguments.ways for factor in (arguments.factors if way != "nothing" else [1])]
        for way, factor in cases:
            xtts.gpt.load_state_dict(original)
            WAYS[way](xtts.gpt, factor)
            case = Case(xtts, reference, texts, codes, arguments.greedy)
            cells = []
            for variant in arguments.variants:
                with patched(xtts, variant):
                    cells += case.figures()
            print(markdown(header, [(way, f"{factor:g}", *cells)]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
