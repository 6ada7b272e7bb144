"""What bf16 makes of the graphs that are compiled for Neuron, computed on the host.

Three ways to have bf16, of which the first is ``precision="bf16"`` on Neuron, and the last "bf16-all":

weights    the trunk's linear layers multiply by weights in bf16: the very layers that are traced
matmult    as the compiler's ``--auto-cast=matmult``: what is multiplied in the GPT is rounded, sums are in fp32
all        the first, and whatever GPT and vocoder compute is rounded, as with ``--auto-cast=all``

Each is compared with fp32 on the same codes, those that a checkpoint says, or random ones where weights are random:
correlation of the latents, share of equal likeliest codes, and correlation of the magnitudes of the audio's short-time
Fourier transform. Then each graph as it is verified where there is a device, on random inputs: what limits have to let
pass. With ``--hear`` sentences are also spoken, with the same seeds, and recognized: word error rate, and
its difference from fp32 with a 95 % interval.

What a compiler makes of rounding beside that, such as the order of sums, is not in these figures.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import neuron_xtts
from neuron_xtts.backends.neuron.tracing import traceable
from neuron_xtts.backends.neuron.verification import correlation, deviations
from neuron_xtts.buckets import bucket_name
from neuron_xtts.coqui.models import SENTENCES, load_or_make
from neuron_xtts.coqui.recognise import make_graphs
from neuron_xtts.coqui.recordings import write_reference
from neuron_xtts.coqui.surface import Networks
from neuron_xtts.graphs.catalogue import CATALOGUE
from neuron_xtts.graphs.operators import states_of
from neuron_xtts.graphs.transformer import RoundedLinear
from neuron_xtts.tables import markdown
from neuron_xtts.tools.bench.accuracy import magnitudes
from neuron_xtts.tools.judge.intervals import Sums, difference, estimate
from neuron_xtts.tools.judge.listening import RECOGNIZERS, hear_all
from neuron_xtts.tools.judge.speaking import speak
from neuron_xtts.tools.judge.words import normalize, word_errors

VARIANTS = ("weights", "matmult", "all")
# In which graphs are compared as they are where there is a device.
BUCKETS = {"prefill": (128, 512), "decode": (1, 512), "latents": (256,), "vocoder": (96,)}
aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default,
}  # fmt: skip


def rounded(tensor: Any) -> Any:
    """A tensor of fp32 as bf16 holds it; anything else as it is."""
    return tensor.bfloat16().float() if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 else tensor


class Casts(TorchDispatchMode):
    """Rounds what is multiplied, or everything that is computed.

    Args:
        everything: the latter.
    """

    def __init__(self, *, everything: bool) -> None:
        super().__init__()
        self.everything = everything

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            args = tuple(rounded(argument) for argument in args)
        result = func(*args, **(kwargs or {}))
        if self.everything and isinstance(result, Tensor) and result.dtype == torch.float32 and not func.is_view:
            if any(result is argument for argument in args):
                result.copy_(rounded(result))
            else:
                result = rounded(result)
        return result


@contextmanager
def computing(xtts: Any, variant: str) -> Iterator[None]:
    """Have a model compute in one of `VARIANTS`, or in fp32."""
    original = [(part, name, module) for block in xtts.gpt.gpt.h for part in (block.attn, block.mlp)
                for name, module in part.named_children() if name in ("c_attn", "c_fc", "c_proj")]  # fmt: skip
    mode = Casts(everything=variant == "all")
    patched: list[Any] = []
    try:
        if variant in ("weights", "all"):
            known: dict[int, Tensor] = {}
            for part, name, module in original:
                setattr(part, name, RoundedLinear(module, known))
        if variant in ("matmult", "all"):
            methods = [(xtts.gpt, "forward"), (xtts.gpt, "generate")]
            methods += [(xtts.hifigan_decoder, "forward")] if variant == "all" else []
            for owner, name in methods:
                patched.append((owner, name))
                setattr(owner, name, _under(mode, getattr(owner, name)))
        yield
    finally:
        for owner, name in patched:
            delattr(owner, name)
        for part, name, module in original:
            setattr(part, name, module)


def _under(mode: Casts, method: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return method(*args, **kwargs)

    return run


class Case:
    """Sentences and their codes, what fp32 makes of them, and how far another way is off.

    Args:
        xtts: the model.
        voice: conditioning latents and speaker embedding.
        texts: sentences.
        codes: of each sentence, at random; None for those that the model says.
    """

    def __init__(self, xtts: Any, voice: tuple[Tensor, Tensor], texts: list[str], codes: int | None) -> None:
        self.xtts, self.voice = xtts, voice
        self.texts = [torch.tensor(xtts.tokenizer.encode(text.lower(), lang="en"))[None] for text in texts]
        generator = torch.Generator().manual_seed(1)
        if codes is None:
            torch.manual_seed(1)
            with neuron_xtts.patched(xtts, backend="cpu"):  # the same codes, sooner
                self.codes = [xtts.gpt.generate(voice[0], text, do_sample=True, top_k=50, top_p=0.85, temperature=0.75,
                                                repetition_penalty=10.0)
                              for text in tqdm(self.texts, desc="codes")]  # fmt: skip
        else:
            self.codes = [torch.randint(xtts.gpt.start_audio_token, (1, codes), generator=generator) for _ in texts]
        self.latents, self.spectra = self._compute()

    def figures(self) -> tuple[str, str, str]:
        """Correlation of the latents, share of equal likeliest codes, correlation of the spectra."""
        latents, spectra = self._compute()
        choices = [
            torch.cat([self.xtts.gpt.mel_head(x)[0] for x in found]).argmax(-1) for found in (latents, self.latents)
        ]
        pcc = correlation(*(torch.cat(found, 1) for found in (latents, self.latents)))
        heard = correlation(*(torch.cat(found, 1) for found in (spectra, self.spectra)))
        return f"{pcc:.6f}", f"{100 * (choices[0] == choices[1]).double().mean():.2f} %", f"{heard:.6f}"

    def _compute(self) -> tuple[list[Tensor], list[Tensor]]:
        gpt, latents, spectra = self.xtts.gpt, [], []
        for text, codes in zip(self.texts, self.codes, strict=True):
            lengths = torch.tensor([text.shape[1]]), torch.tensor([codes.shape[1] * gpt.code_stride_len])
            latents.append(gpt(text, lengths[0], codes, lengths[1], cond_latents=self.voice[0], return_latent=True))
            spectra.append(magnitudes(self.xtts.hifigan_decoder(latents[-1], g=self.voice[1])))
        return latents, spectra


class OnHost:
    """A graph with its state, which `deviations` takes for a compiled one.

    Args:
        module: in the form that is traced.
        mode: what it runs under.
    """

    def __init__(self, module: nn.Module, mode: AbstractContextManager[object]) -> None:
        self.module = module
        self.mode = mode

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Run it."""
        with self.mode:
            outputs: Sequence[Tensor] = self.module(*inputs)
        state = states_of(self.module)
        self.write(outputs[len(outputs) - len(state) :])
        return outputs

    def write(self, contents: Sequence[Tensor]) -> None:
        """Replace the state."""
        for state, content in zip(states_of(self.module), contents, strict=True):
            state.copy_(content)

    def read(self) -> list[Tensor]:
        """The state."""
        return states_of(self.module)


def verified(xtts: Any, variant: str) -> list[tuple[str, ...]]:
    """What the comparison of compiled graphs with the host would find: the largest error, the smallest correlation."""
    graphs, _ = make_graphs(Networks.of(xtts))
    weights = [name for name in graphs if CATALOGUE[name].family == "transformer" and variant != "matmult"]
    traced = traceable(graphs, rounded=weights)
    mode: AbstractContextManager[object] = nullcontext() if variant == "weights" else Casts(everything=variant == "all")
    rows = []
    for name, bucket in BUCKETS.items():
        if name != "vocoder" or variant == "all":
            found = list(deviations(OnHost(traced[name].in_bucket(*bucket), mode), graphs[name], bucket))
            error, pcc = max(each.error for each in found), min(each.pcc for each in found)
            rows.append((variant, f"{name} {bucket_name(bucket)}", f"{error:.1e}", f"{pcc:.6f}"))
    return rows


def errors(xtts: Any, voice: Any, texts: list[str], folder: Path) -> dict[str, Sums]:
    """Word errors of spoken sentences, by recognizer."""
    folder.mkdir()
    files = [folder / f"{number}.wav" for number in range(len(texts))]
    for number, (text, file) in enumerate(zip(tqdm(texts, desc=folder.name), files, strict=True)):
        speak(xtts, text, voice, (1, number), file)
    heard = hear_all(files, list(RECOGNIZERS))
    counted = {name: [word_errors(normalize(text), normalize(heard[file].words[name]))
                      for text, file in zip(texts, files, strict=True)] for name in RECOGNIZERS}  # fmt: skip
    return {name: Sums(*np.array(found, dtype=float).T) for name, found in counted.items()}


def check_layers(xtts: Any) -> None:
    """Raise AssertionError unless the layers that are put into the model are those that are traced."""
    graph = traceable(make_graphs(Networks.of(xtts))[0], rounded=["latents"])["latents"]
    x = torch.randn(1, 5, xtts.gpt.final_norm.weight.shape[0])
    with computing(xtts, "weights"):
        for ours, theirs in zip(xtts.gpt.gpt.h, graph.trunk.h, strict=True):  # type: ignore[union-attr]
            assert torch.equal(ours.attn.c_attn(x), theirs.attn.c_attn(x))


@torch.inference_mode()
def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="folder of a checkpoint; default: random weights, full size")
    parser.add_argument("--small", action="store_true", help="a small model with random weights")
    parser.add_argument("--reference", type=Path, help="a recording to clone; default: noises")
    parser.add_argument("--texts", type=Path, help="sentences, one per line; default: one of ours")
    parser.add_argument("--codes", type=int, help="random ones; default: those that a checkpoint says, or 100")
    parser.add_argument("--hear", type=int, default=0, metavar="N", help="recognize the first N sentences, too")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    texts = arguments.texts.read_text().splitlines() if arguments.texts else list(SENTENCES[:1])
    xtts = load_or_make(arguments.checkpoint, arguments.small).synthesizer.tts_model
    xtts.gpt.gpt.config._attn_implementation = "eager"  # in whose products casts are seen
    check_layers(xtts)
    with tempfile.TemporaryDirectory() as folder:
        reference = arguments.reference or Path(folder) / "reference.wav"
        if not arguments.reference:
            write_reference(reference)
        voice = xtts.get_conditioning_latents(str(reference))
        case = Case(xtts, voice, texts, arguments.codes or (None if arguments.checkpoint else 100))
        print(f"{len(texts)} sentences, {sum(codes.shape[1] for codes in case.codes)} codes\n")
        rows = []
        for variant in arguments.variants:
            with computing(xtts, variant):
                rows.append((variant, *case.figures()))
        print(markdown(("bf16", "latents", "likeliest", "spectrum"), rows), flush=True)
        rows = [row for variant in arguments.variants for row in verified(xtts, variant)]
        print(markdown(("bf16", "graph", "error", "correlation"), rows), flush=True)
        if not arguments.hear:
            return
        rows, texts = [], texts[: arguments.hear]
        plain = errors(xtts, voice, texts, Path(folder) / "fp32")
        for variant in arguments.variants:
            with computing(xtts, variant):
                found = errors(xtts, voice, texts, Path(folder) / variant)
            for name, sums in found.items():
                both = [estimate(plain[name]), estimate(sums), difference(sums, plain[name])]
                rows.append(
                    (variant, name, *(f"{100 * e.value:.2f} ({100 * e.low:.2f} to {100 * e.high:.2f})" for e in both))
                )
        print(markdown(("bf16", "recognizer", "WER of fp32, %", "WER, %", "difference"), rows))


if __name__ == "__main__":
    main()
