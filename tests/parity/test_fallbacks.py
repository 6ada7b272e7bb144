"""Every named fallback: reached, answered by coqui-tts bit for bit, and counted with its reason."""

import ast
import copy
import logging
import pathlib
import re

import numpy as np
import pytest
import torch
import transformers
from helpers import all_fallbacks, assert_identical, assert_same_speech, failing, fallbacks, speak, stop_after
from torch import nn

import neuron_xtts
from neuron_xtts import BucketPlan
from neuron_xtts.backends.host.backend import CpuBackend, HostState
from neuron_xtts.backends.host.rows import Rows
from neuron_xtts.patching.dispatch import DISABLE_VARIABLE
from neuron_xtts.runner import Runner

TEXT = torch.arange(1, 10)[None]
CODES = torch.arange(100, 120)[None]


def generate(xtts, voice, *, cond=None, text=TEXT, **options):
    return xtts.gpt.generate(voice[0] if cond is None else cond, text, **{"max_new_tokens": 12, **options})


def latents(xtts, voice, *, lengths=(9,), samples=(20 * 1024,), grad=False, **options):
    options = {"cond_latents": voice[0], "return_latent": True, **options}
    with torch.set_grad_enabled(grad):
        return xtts.gpt(TEXT, torch.tensor(lengths), CODES, torch.tensor(samples), **options)


def vocode(xtts, voice, *, rows=1, speaker=None, dtype=torch.float32, grad=False, value=None):
    x = torch.randn(rows, 7, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    if value is not None:
        x[0, 3, 3] = value
    with torch.set_grad_enabled(grad):
        return xtts.hifigan_decoder(x, g=voice[1] if speaker is None else speaker(voice[1]))


def call(function, **options):
    return lambda xtts, voice: function(xtts, voice, **options)


def condition(xtts, voice, *, frames=40, shape=None, dtype=torch.float32, grad=False, value=None, **options):
    mel = torch.randn(*(shape or (1, 80, frames)), generator=torch.Generator().manual_seed(0)).to(dtype)
    if value is not None:
        mel[0, 3, 3] = value
    with torch.set_grad_enabled(grad):
        return xtts.gpt.get_style_emb(mel, **options)


def no_perceiver(xtts):
    xtts.gpt.use_perceiver_resampler = False


def tortoise_norm(xtts):
    xtts.gpt.conditioning_encoder.attn[1].tortoise_norm = True


def pad_convolution(xtts):
    xtts.gpt.conditioning_encoder.init.padding = (1,)


def condition_norm(xtts):
    norm = xtts.gpt.conditioning_perceiver.norm
    norm.cond = True
    norm.to_gamma_beta = lambda cond: torch.ones(1, 128)


def causal_perceiver(xtts):
    xtts.gpt.conditioning_perceiver.layers[0][0].attend.causal = True


def other_mlp(xtts):
    xtts.gpt.conditioning_perceiver.layers[0][1].append(nn.Tanh())


def replace_query(xtts):
    attention = xtts.gpt.conditioning_perceiver.layers[1][0]
    attention.to_q = copy.deepcopy(attention.to_q)
    with torch.no_grad():
        attention.to_q.weight *= 2


def hook_perceiver(xtts):
    mlp = xtts.gpt.conditioning_perceiver.layers[0][1]
    mlp.register_forward_hook(lambda module, inputs, output: output * 1.5)


def set_generation_config(xtts):
    xtts.gpt.gpt_inference.generation_config.suppress_tokens = [3, 4]


def replace_trunk_class(xtts):
    trunk = xtts.gpt.gpt
    trunk.__class__ = type("OtherTrunk", (type(trunk),), {})


def replace_vocoder_class(xtts):
    generator = xtts.hifigan_decoder.waveform_decoder
    generator.__class__ = type("OtherGenerator", (type(generator),), {})


def add_linear_in_front(xtts):
    generator = xtts.hifigan_decoder.waveform_decoder
    generator.lin_pre = lambda x: x.transpose(-1, -2)  # what follows it permutes back


def hook_trunk(xtts):
    xtts.gpt.gpt.h[1].mlp.register_forward_hook(lambda module, inputs, output: output * 1.5)


def hook_vocoder(xtts):
    xtts.hifigan_decoder.waveform_decoder.register_forward_hook(lambda module, inputs, output: output * 0.5)


def hook_residual_block(xtts):
    xtts.hifigan_decoder.waveform_decoder.resblocks[4].register_forward_pre_hook(lambda module, inputs: inputs[0] * 0.5)


def replace_forward(xtts):
    attention = xtts.gpt.gpt.h[1].attn
    original = attention.forward

    def forward(*args, **kwargs):
        output, *rest = original(*args, **kwargs)
        return output * 1.5, *rest

    attention.forward = forward


def other_class(module):
    module.__class__ = type(f"My{type(module).__name__}", (type(module),), {})


def replace_conv(xtts):
    generator = xtts.hifigan_decoder.waveform_decoder
    generator.conv_post = copy.deepcopy(generator.conv_post)
    with torch.no_grad():
        generator.conv_post.weight *= 2


def double(xtts):
    xtts.double()


def to_meta(xtts):
    xtts.gpt.to("meta")


def poison(xtts):
    with torch.no_grad():
        xtts.gpt.mel_head.weight[5] = torch.nan


def poison_trunk(xtts):
    with torch.no_grad():
        xtts.gpt.final_norm.weight[0] = torch.inf


def replace_norm(xtts):
    xtts.gpt.gpt.ln_f = copy.deepcopy(xtts.gpt.gpt.ln_f)
    with torch.no_grad():
        xtts.gpt.gpt.ln_f.weight *= 2


def train(xtts):
    xtts.gpt.train()


class AlwaysSeven(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([7]), 0.0)


def sampled(**options):
    return call(generate, do_sample=True, **options)


# name: (done to the model before patch(), done after it, the call, its route, the reason)
CASES = {
    # Arguments of generate
    "beams": (None, None, call(generate, num_beams=3), "GPT.generate", "argument num_beams"),
    "processor": (
        None, None, call(generate, logits_processor=transformers.LogitsProcessorList([AlwaysSeven()])),
        "GPT.generate", "argument logits_processor",
    ),
    "typical_p": (None, None, sampled(typical_p=0.5), "GPT.generate", "argument typical_p"),
    "no value": (None, None, sampled(top_k=None), "GPT.generate", "argument top_k"),
    "hidden states": (None, None, call(generate, output_hidden_states=True), "GPT.generate",
                      "argument output_hidden_states"),
    "no cache": (None, None, sampled(use_cache=False), "GPT.generate", "argument use_cache"),
    "max_length": (None, None, call(generate, max_length=90), "GPT.generate", "argument max_length"),
    "no codes": (None, None, call(generate, max_new_tokens=0), "GPT.generate", "argument max_new_tokens below 1"),
    "copies of greedy": (None, None, call(generate, num_return_sequences=2), "GPT.generate",
                         "argument num_return_sequences without do_sample"),
    "dict that is none": (None, None, call(generate, return_dict_in_generate=False), "GPT.generate",
                          "argument return_dict_in_generate=False"),
    "generation config": (set_generation_config, None, sampled(), "GPT.generate", "generation_config.suppress_tokens"),
    "bad temperature": (None, None, sampled(temperature=-1.0), "GPT.generate", "ValueError: `temperature`"),
    "wrong arguments": (None, None, call(generate, cond_latents=1), "GPT.generate", "TypeError: "),
    "conditioning of float64": (
        None, None, lambda xtts, voice: generate(xtts, voice, cond=voice[0].double()),
        "GPT.generate", "conditioning latents of torch.float64",
    ),
    "text too long": (None, None, call(generate, text=torch.ones(1, 500, dtype=torch.long)), "GPT.generate",
                      "IndexError: "),
    "NaN weights": (poison, None, call(generate), "GPT.generate", "logits that are not finite"),
    # The state of the model
    "training": (train, None, sampled(), "GPT.generate", "training mode"),
    "hooks": (hook_trunk, None, sampled(), "GPT.generate", "forward hooks"),
    "hooks of the vocoder": (hook_vocoder, None, call(vocode), "HifiDecoder.forward", "forward hooks"),
    "hooks of a residual block": (hook_residual_block, None, call(vocode), "HifiDecoder.forward", "forward hooks"),
    "forward replaced": (None, replace_forward, sampled(), "GPT.generate", "a forward method that somebody replaced"),
    "another block": (lambda xtts: other_class(xtts.gpt.gpt.h[1]), None, sampled(), "GPT.generate",
                      "a MyGPT2Block where a GPT2Block belongs"),
    "another MLP": (lambda xtts: other_class(xtts.gpt.gpt.h[0].mlp), None, call(latents), "GPT.forward",
                    "a MyGPT2MLP where a GPT2MLP belongs"),
    "another residual block": (
        lambda xtts: other_class(xtts.hifigan_decoder.waveform_decoder.resblocks[0]), None, call(vocode),
        "HifiDecoder.forward", "a MyResBlock1 where a ResBlock1 or ResBlock2 belongs",
    ),
    "a convolution replaced": (None, replace_conv, call(vocode), "HifiDecoder.forward",
                               "the model's modules were replaced after patch()"),
    "float64": (double, None, lambda xtts, voice: generate(xtts, (voice[0].double(),), do_sample=True),
                "GPT.generate", "weights of torch.float64"),
    "another device": (to_meta, None, sampled(), "GPT.generate", "weights on meta"),
    "a module replaced": (None, replace_norm, sampled(), "GPT.generate",
                          "the model's modules were replaced after patch()"),
    "another trunk": (replace_trunk_class, None, sampled(), "GPT.generate",
                      "a OtherTrunk where a GPT2Model belongs"),
    "another vocoder": (replace_vocoder_class, None, call(vocode), "HifiDecoder.forward",
                        "a OtherGenerator where a HifiganGenerator belongs"),
    "a linear layer in front": (add_linear_in_front, None, call(vocode, rows=2), "HifiDecoder.forward",
                                "a HiFi-GAN without speaker conditioning, or with a linear layer in front"),
    # GPT.forward
    "losses": (None, None, call(latents, return_latent=False, cond_mels=torch.randn(1, 80, 32)), "GPT.forward",
               "losses were asked for"),
    "attentions": (None, None, call(latents, return_attentions=True), "GPT.forward", "argument return_attentions"),
    "mels": (None, None, call(latents, cond_latents=None, cond_mels=torch.ones(1, 80, 64)), "GPT.forward",
             "argument cond_mels"),
    "lens": (None, None, call(latents, cond_lens=torch.tensor([2048])), "GPT.forward", "argument cond_lens"),
    "no conditioning": (None, None, call(latents, cond_latents=None), "GPT.forward", "no conditioning latents"),
    "gradients": (None, None, call(latents, grad=True), "GPT.forward", "gradients are on"),
    "latents of float64": (
        None, None, lambda xtts, voice: latents(xtts, voice, cond_latents=voice[0].double()),
        "GPT.forward", "conditioning latents of torch.float64",
    ),
    "text lengths": (None, None, call(latents, lengths=(12,)), "GPT.forward", "text_lengths beyond text_inputs"),
    "no audio": (None, None, call(latents, samples=(0,)), "GPT.forward", "no audio codes"),
    "too much audio": (None, None, call(latents, samples=(604 * 1024,)), "GPT.forward",
                       "more audio codes than the model has positions"),
    "infinite latents": (poison_trunk, None, call(latents), "GPT.forward", "latents that are not finite"),
    # GPT.get_style_emb
    "style of a latent": (None, None, call(condition, return_latent=True), "GPT.get_style_emb",
                          "argument return_latent"),
    "gradients in conditioning": (None, None, call(condition, grad=True), "GPT.get_style_emb", "gradients are on"),
    "a flat spectrogram": (None, None, call(condition, shape=(80, 40)), "GPT.get_style_emb",
                           "a spectrogram of 2 dimensions"),
    "a spectrogram of float64": (
        None, None, lambda xtts, voice: condition(xtts, voice, dtype=torch.float64),
        "GPT.get_style_emb", "a spectrogram of torch.float64",
    ),
    "NaN spectrogram": (None, None, call(condition, value=torch.nan), "GPT.get_style_emb",
                        "conditioning latents that are not finite"),
    "conditioning in training": (train, None, call(condition), "GPT.get_style_emb", "training mode"),
    "hooks of the perceiver": (hook_perceiver, None, call(condition), "GPT.get_style_emb", "forward hooks"),
    "a layer of the perceiver replaced": (None, replace_query, call(condition), "GPT.get_style_emb",
                                          "the model's modules were replaced after patch()"),
    "no perceiver": (no_perceiver, None, call(condition), "GPT.get_style_emb", "a GPT without perceiver resampler"),
    "tortoise norm": (tortoise_norm, None, call(condition), "GPT.get_style_emb",
                      "a conditioning encoder with tortoise_norm or relative positions"),
    "a padded convolution": (pad_convolution, None, call(condition), "GPT.get_style_emb",
                             "a conditioning encoder with convolutions over time"),
    "a conditioned norm": (condition_norm, None, call(condition), "GPT.get_style_emb",
                           "a perceiver with a conditioned norm"),
    "a causal perceiver": (causal_perceiver, None, call(condition), "GPT.get_style_emb",
                           "a perceiver whose attention is causal, has dropout or leaves out the latents"),
    "another MLP of the perceiver": (other_mlp, None, call(condition), "GPT.get_style_emb",
                                     "a perceiver with another MLP"),
    # HifiDecoder.forward
    "gradients in the vocoder": (None, None, call(vocode, grad=True), "HifiDecoder.forward", "gradients are on"),
    "two dimensions": (
        None, None, lambda xtts, voice: xtts.hifigan_decoder(torch.ones(7, 64), g=voice[1]),
        "HifiDecoder.forward", "latents of 2 dimensions",
    ),
    "no speaker": (None, None, lambda xtts, voice: xtts.hifigan_decoder(torch.ones(1, 7, 64)), "HifiDecoder.forward",
                   "a speaker embedding that is not one per row"),
    "two speakers": (None, None, call(vocode, speaker=lambda g: torch.cat([g, -g])), "HifiDecoder.forward",
                     "a speaker embedding that is not one per row"),
    "half latents": (None, None, call(vocode, dtype=torch.float16), "HifiDecoder.forward", "latents of torch.float16"),
    "half a speaker": (None, None, call(vocode, speaker=lambda g: g.half()), "HifiDecoder.forward",
                       "speaker embedding of torch.float16"),
    "NaN latents": (None, None, call(vocode, value=torch.nan), "HifiDecoder.forward", "audio that is not finite"),
}  # fmt: skip


def outcome(function, xtts, voice):
    """What a call returns or raises, and the random state it leaves."""
    torch.manual_seed(11)
    try:
        with torch.no_grad():
            result = function(xtts, voice)
    except Exception as error:
        result = (type(error), str(error))
    return result, torch.get_rng_state()


def assert_equal(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    elif isinstance(theirs, (tuple, list)):
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_fallback(xtts, voice, name):
    before, after, function, route, reason = CASES[name]
    if before:
        before(xtts)
    theirs_model = copy.deepcopy(xtts)
    if after:
        after(theirs_model)
    theirs = outcome(function, theirs_model, voice)
    neuron_xtts.patch(xtts)
    if after:
        after(xtts)
    ours = outcome(function, xtts, voice)
    assert_equal(ours, theirs)
    (counted, count), *others = fallbacks(xtts, route).items()
    assert counted.startswith(reason)
    assert count == 1
    assert not others


def test_every_reason_is_tested():
    """The reasons in the source, with their variable parts cut, all begin a reason above or in another test."""
    reasons = {reason.partition("{}")[0] for reason in reasons_in_the_source()}
    tested = {reason for *_, reason in CASES.values()} | set(OTHER_REASONS)
    assert {reason for reason in reasons if not any(known.startswith(reason) for known in tested)} == set()
    tests = "".join(path.read_text() for path in pathlib.Path(__file__).parents[1].rglob("test_*.py"))
    assert all(f"def {name}(" in tests for name in OTHER_REASONS.values())


def test_an_id_that_comes_back(xtts):
    """A module that takes the place of one that is gone, and its id, is another all the same."""
    mlp = xtts.gpt.conditioning_perceiver.layers[0][1]
    neuron_xtts.patch(xtts)
    condition(xtts, None)
    for _ in range(20):  # every time at the address of the last one, or nearly
        mlp[1] = Halved()
        theirs = copy.deepcopy(xtts)
        neuron_xtts.unpatch(theirs)
        assert_equal(condition(xtts, None), condition(theirs, None))
    assert fallbacks(xtts, "GPT.get_style_emb") == {"the model's modules were replaced after patch()": 20}


class Halved(nn.Module):
    def forward(self, x):
        x, gates = x.chunk(2, dim=-1)
        return x * nn.functional.gelu(gates) / 2


def reasons_in_the_source():
    """What fallbacks say, with ``{}`` for what varies: ``Fallback("...")``, and what `check_fp32` makes of names."""
    found = set()
    for path in pathlib.Path(neuron_xtts.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id in ("Fallback", "NotFinite") and isinstance(node.args[0], (ast.Constant, ast.JoinedStr)):
                parts = getattr(node.args[0], "values", node.args)
                found.add("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts))
            if node.func.id == "check_fp32":
                found |= {f"{keyword.arg.replace('_', ' ')} of {{}}" for keyword in node.keywords}
    return found - {"{} of {}"}  # of `check_fp32` itself


def test_every_reason_is_in_the_manual():
    """The table of docs/usage.md has every reason of the source, and no other; in it capitals and dots vary."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "usage.md").read_text()
    table = page.partition("| reason | remedy |")[2].partition("\n\n")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    written = {reason for cell in cells for reason in re.findall("`([^`]+)`", cell)}
    patterns = {reason: re.sub(r"\b[A-Z]{4,}\b|\bN\b|\\\.\\\.\\\.", ".*", re.escape(reason)) for reason in written}
    reasons = reasons_in_the_source()
    matches = {(reason, found) for reason, pattern in patterns.items() for found in reasons if re.match(pattern, found)}
    assert {found for _, found in matches} == reasons
    assert {reason for reason, _ in matches} == written - {"NEURON_XTTS_DISABLE is set"}  # which the dispatcher says
    assert DISABLE_VARIABLE == "NEURON_XTTS_DISABLE"


OTHER_REASONS = {
    "a reference that is not a file": "test_what_is_not_remembered",
    "a reference that is not a tensor": "test_errors_are_coqui_s_own",
    "arguments that the method does not take": "test_errors_are_coqui_s_own",
    "no prefill graph": "test_no_graphs",
    "no vocoder graph": "test_no_graphs",
    "larger than the largest decode bucket": "test_larger_than_every_bucket",
    "autocast": "test_autocast",
    "not a length that there is a ": "test_a_length_that_cannot_be_padded",
    "weights changed": "test_weights_changed",
    "a stream of several rows": "test_arguments_that_fall_back",
    "ids that do not fit the prefix on the model": "test_states_that_fall_back",
    "a prefix of ": "test_states_that_fall_back",
    "another call took over the decode graph": "test_states_that_take_turns",
    "the thread that computed for it was interrupted": "test_whoever_computes_is_interrupted",
    "it began in another process, of which this one is a fork": "test_a_fork",
    "GPT-2 with activation_function='relu'": "test_other_gpt2",
    "a GPT without learned positions": "test_no_learned_positions",
    "embeddings of codes with a largest norm": "test_tables_of_another_kind",
    "a call from inside of a decode step": "test_a_call_from_inside_of_a_step",
}


@pytest.mark.parametrize("sampling", [{"do_sample": True}, {"do_sample": False}], ids=["sampled", "greedy"])
def test_no_graphs(xtts, voice, sampling):
    theirs = speak(xtts, voice, max_new_tokens=20, **sampling)
    neuron_xtts.patch(xtts, buckets=BucketPlan.none())
    assert_identical(speak(xtts, voice, max_new_tokens=20, **sampling), theirs)
    assert all_fallbacks(xtts) == {
        "GPT.generate": {"no prefill graph": 1},
        "GPT.forward": {"no latents graph": 1},
        "HifiDecoder.forward": {"no vocoder graph": 1},
    }


def test_no_prefill_graph(xtts, voice):
    theirs = speak(xtts, voice, max_new_tokens=20)
    neuron_xtts.patch(xtts, buckets=BucketPlan(prefill=()))
    ours = speak(xtts, voice, max_new_tokens=20)
    assert_same_speech(ours, theirs)
    assert all_fallbacks(xtts) == {"GPT.generate": {"no prefill graph": 1}}
    assert neuron_xtts.report(xtts).graphs["latents"]["exact"].runs == 1


def test_no_latents_graph(xtts, voice):
    """Decoding makes the latents: a plan may save the graph, and only foreign codes miss it."""
    theirs = speak(xtts, voice, max_new_tokens=20)
    neuron_xtts.patch(xtts, buckets=BucketPlan(latents=()))
    assert_same_speech(speak(xtts, voice, max_new_tokens=20), theirs)
    assert all_fallbacks(xtts) == {}
    latents(xtts, voice)
    assert all_fallbacks(xtts) == {"GPT.forward": {"no latents graph": 1}}


SMALL_PLANS = {
    "larger than the largest prefill bucket (16)": BucketPlan(prefill=(16,)),
    "larger than the largest decode bucket (70)": BucketPlan(decode=(70,)),  # reached in the middle of a sentence
}


@pytest.mark.parametrize("reason", SMALL_PLANS)
def test_larger_than_every_bucket(xtts, voice, reason):
    stop_after(xtts, None)
    theirs = speak(xtts, voice, max_new_tokens=40)
    neuron_xtts.patch(xtts, buckets=SMALL_PLANS[reason])
    assert_same_speech(speak(xtts, voice, max_new_tokens=40), theirs)
    assert all_fallbacks(xtts) == {"GPT.generate": {reason: 1}}


def test_more_rows_than_slots(xtts, voice):
    neuron_xtts.patch(xtts, buckets=BucketPlan(slots=(1, 2)))
    codes = sampled(num_return_sequences=3)(xtts, voice)
    assert codes.shape[0] == 3
    assert all_fallbacks(xtts) == {"GPT.generate": {"larger than the largest decode bucket (2)": 1}}


def test_a_length_that_cannot_be_padded(xtts, voice):
    neuron_xtts.patch(xtts, buckets=BucketPlan(conditioning=(39, 41)))
    with torch.no_grad():
        xtts.gpt.get_style_emb(torch.randn(1, 80, 40))
    assert all_fallbacks(xtts) == {"GPT.get_style_emb": {"not a length that there is a conditioning graph for": 1}}


def test_autocast(xtts, voice):
    def outcomes():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return [outcome(function, xtts, voice) for function in (sampled(), call(latents), call(vocode))]

    theirs = outcomes()
    neuron_xtts.patch(xtts)
    assert_equal(outcomes(), theirs)
    assert all_fallbacks(xtts) == {
        name: {"autocast": 1} for name in ("GPT.generate", "GPT.forward", "HifiDecoder.forward")
    }


def test_other_gpt2(xtts, voice):
    """A trunk that the graphs do not compute: the vocoder still runs as one."""
    xtts.gpt.gpt.config.activation_function = "relu"
    for block in xtts.gpt.gpt.h:
        block.mlp.act = nn.ReLU()
    theirs = speak(xtts, voice, max_new_tokens=15)
    neuron_xtts.patch(xtts)
    assert_same_speech(speak(xtts, voice, max_new_tokens=15), theirs)
    reason = "GPT-2 with activation_function='relu'"
    assert all_fallbacks(xtts) == {"GPT.generate": {reason: 1}, "GPT.forward": {reason: 1}}
    report = neuron_xtts.report(xtts)
    assert report.missing == dict.fromkeys(("prefill", "decode", "move", "latents"), reason)
    assert f"no decode graph: {reason}" in str(report)
    assert report.routes["HifiDecoder.forward"].served == 1


def test_no_learned_positions(xtts, voice):
    class NoPositions:
        def __call__(self, x):
            return torch.zeros(1, x.shape[1], 64)

        def get_fixed_embedding(self, index, device):
            return torch.zeros(1, 1, 64)

    positions = NoPositions()
    del xtts.gpt.mel_pos_embedding
    xtts.gpt.mel_pos_embedding = positions
    xtts.eval()
    del xtts.gpt.gpt_inference.pos_embedding
    xtts.gpt.gpt_inference.pos_embedding = positions
    theirs = speak(xtts, voice, max_new_tokens=15)
    neuron_xtts.patch(xtts)
    assert_same_speech(speak(xtts, voice, max_new_tokens=15), theirs)
    assert set(fallbacks(xtts, "GPT.generate")) == {"a GPT without learned positions"}


class BoomError(Exception):
    """A fault that no code of ours knows."""


FAULTS = {
    "prefill": (CpuBackend, "run", 0, "GPT.generate"),
    "fill": (Rows, "fill", 0, "GPT.generate"),
    "first step": (Runner, "step", 0, "GPT.generate"),
    "step 9": (Runner, "step", 9, "GPT.generate"),
    "last step": (Runner, "step", 18, "GPT.generate"),
    "vocoder": (CpuBackend, "run", 1, "HifiDecoder.forward"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("plan", [BucketPlan(), BucketPlan.static()], ids=["exact", "static"])
def test_fault_anywhere(xtts, voice, monkeypatch, caplog, fault, plan):
    """An exception at any step: coqui-tts's result, as if nothing had happened."""
    options = {"max_new_tokens": 20, **stop_after(xtts, None)}
    theirs = speak(xtts, voice, **options)
    owner, method, at, route = FAULTS[fault]
    if owner is Rows and plan.decode is not None:
        owner = HostState
    neuron_xtts.patch(xtts, buckets=plan)
    with monkeypatch.context() as patching, caplog.at_level(logging.WARNING, logger="neuron_xtts"):
        patching.setattr(owner, method, failing(getattr(owner, method), at, BoomError("the device is gone")))
        ours = speak(xtts, voice, **options)
    assert_same_speech(ours, theirs)
    assert all_fallbacks(xtts) == {route: {"BoomError: the device is gone": 1}}
    records = [record for record in caplog.records if record.name.startswith("neuron_xtts")]
    assert [record.exc_info is not None for record in records] == [True]  # with the traceback
    assert_same_speech(speak(xtts, voice, **options), theirs)  # and the model is as good as before


def test_nan_of_a_graph(xtts, voice, monkeypatch):
    """A graph that returns NaN where coqui-tts does not."""
    options = {"max_new_tokens": 20, **stop_after(xtts, None)}
    theirs = speak(xtts, voice, **options)
    step, run = Runner.step, CpuBackend.run
    neuron_xtts.patch(xtts)
    with monkeypatch.context() as patching:
        patching.setattr(Runner, "step", lambda *args: tuple(x * torch.nan for x in step(*args)))
        assert_same_speech(speak(xtts, voice, **options), theirs)
        assert fallbacks(xtts, "GPT.generate") == {"logits that are not finite": 1}
        patching.setattr(
            CpuBackend, "run", lambda self, name, *args: tuple(x * torch.nan for x in run(self, name, *args))
        )
        assert_identical(speak(xtts, voice, **options), theirs)
        assert fallbacks(xtts, "HifiDecoder.forward") == {"audio that is not finite": 1}


def test_logged_once(xtts, voice, caplog):
    neuron_xtts.patch(xtts)
    with caplog.at_level(logging.WARNING, logger="neuron_xtts"):
        for _ in range(3):
            latents(xtts, voice, grad=True)
    assert len([record for record in caplog.records if record.name.startswith("neuron_xtts")]) == 1


def test_disabled_by_environment(xtts, voice, monkeypatch):
    """Honoured per call."""
    theirs = speak(xtts, voice, max_new_tokens=15)
    neuron_xtts.patch(xtts, strict=True)
    monkeypatch.setenv("NEURON_XTTS_DISABLE", "1")
    assert_identical(speak(xtts, voice, max_new_tokens=15), theirs)
    report = neuron_xtts.report(xtts)
    assert report.routes["GPT.generate"].fallbacks == {"NEURON_XTTS_DISABLE is set": 1}
    assert not report.graphs
    monkeypatch.setenv("NEURON_XTTS_DISABLE", "0")
    assert_same_speech(speak(xtts, voice, max_new_tokens=15), theirs)
    assert neuron_xtts.report(xtts).routes["GPT.generate"].served == 1


def test_strict(xtts, voice):
    neuron_xtts.patch(xtts, strict=True)
    with pytest.raises(neuron_xtts.FallbackError, match=r"GPT\.generate .* argument num_beams") as error:
        generate(xtts, voice, num_beams=2)
    assert (error.value.route, error.value.reason) == ("GPT.generate", "argument num_beams")
    with pytest.raises(neuron_xtts.FallbackError, match="TypeError") as error:
        generate(xtts, voice, cond_latents=1)
    assert isinstance(error.value.__cause__, TypeError)
    speak(xtts, voice, max_new_tokens=5)


def test_an_error_of_coqui_is_its_own(xtts, voice):
    """Not chained to the exception that made us fall back."""
    neuron_xtts.patch(xtts)
    with pytest.raises(ValueError, match="temperature") as error:
        sampled(temperature=-1.0)(xtts, voice)
    assert error.value.__context__ is None


def test_nested_calls_are_not_routed_twice(xtts, voice):
    """`HifiDecoder.inference` calls `forward`: inside a fallback that is coqui-tts's own."""
    x = torch.randn(1, 7, 64)
    theirs = xtts.hifigan_decoder.inference(x, voice[1])
    neuron_xtts.patch(xtts, buckets=BucketPlan.none())
    np.testing.assert_array_equal(xtts.hifigan_decoder.inference(x, voice[1]), theirs)
    assert all_fallbacks(xtts) == {"HifiDecoder.inference": {"no vocoder graph": 1}}
