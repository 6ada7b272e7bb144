"""Patched against unpatched coqui-tts, same seed, through the public API."""

import copy

import numpy as np
import pytest
import torch
from helpers import all_fallbacks, assert_same_speech, speak, stop_after, text_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import neuron_xtts
from neuron_xtts import BucketPlan
from neuron_xtts.coqui.models import random_tts

# More sizes than the default plan, so that buckets change within a sentence; 259 frames: the reference's 3 s.
LENGTHS = (128, 256, 512, 1044)
STATIC = BucketPlan(
    prefill=LENGTHS, decode=LENGTHS, slots=(1, 4), latents=LENGTHS, vocoder=(64, 128, 256), conditioning=(259,)
)
PLANS = {"exact": BucketPlan(), "static": STATIC}

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True}


def both(xtts, voice, plan, **options):
    """The same call on coqui-tts and patched."""
    theirs = speak(xtts, voice, **options)
    with neuron_xtts.patched(xtts, buckets=plan, strict=True):
        ours = speak(xtts, voice, **options)
        report = neuron_xtts.report(xtts)
    return ours, theirs, report


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tokens", [1, 2, 37, 128, 400])
def test_text_lengths(xtts, voice, plan, sampling, tokens):
    options = {"max_new_tokens": 30, **stop_after(xtts, None)}
    ours, theirs, _ = both(xtts, voice, PLANS[plan], text=text_of(tokens), **options, **sampling)
    assert_same_speech(ours, theirs)
    assert ours[0]["gpt_latents"].shape[1] == 30


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("codes", [1, 2, 3, 60, pytest.param(602, marks=pytest.mark.slow)])
def test_stop_token(xtts, voice, plan, codes):
    """Early, late, and on the very last code."""
    options = stop_after(xtts, codes)
    ours, theirs, _ = both(xtts, voice, PLANS[plan], **options)
    assert_same_speech(ours, theirs)
    assert ours[0]["gpt_latents"].shape[1] == codes


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_no_stop_token(xtts, voice, plan):
    """The model's own limit: 602 codes; and the most that coqui-tts can turn into latents: 603."""
    stop_after(xtts, None)
    ours, theirs, _ = both(xtts, voice, PLANS[plan])
    assert_same_speech(ours, theirs)
    assert ours[0]["gpt_latents"].shape[1] == 602
    ours, theirs, _ = both(xtts, voice, PLANS[plan], max_new_tokens=603)
    assert_same_speech(ours, theirs)


@pytest.mark.parametrize("codes", [604, 605])
def test_more_codes_than_positions(xtts, voice, codes):
    """Coqui-tts pads codes by five and has 608 positions: its error, not an invention of ours."""
    stop_after(xtts, None)
    with pytest.raises(IndexError) as theirs:
        speak(xtts, voice, max_new_tokens=codes)
    neuron_xtts.patch(xtts)
    with pytest.raises(IndexError) as ours:
        speak(xtts, voice, max_new_tokens=codes)
    assert str(ours.value) == str(theirs.value)
    assert all_fallbacks(xtts) == {"GPT.forward": {"more audio codes than the model has positions": 1}}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("speed", [0.7, 0.95, 1.3, 1.5])
def test_speed(xtts, voice, plan, speed):
    stop_after(xtts, None)
    ours, theirs, _ = both(xtts, voice, PLANS[plan], speed=speed, max_new_tokens=45)
    assert_same_speech(ours, theirs)


@pytest.mark.parametrize("plan", PLANS)
def test_text_splitting(xtts, voice, plan):
    stop_after(xtts, None)
    text = " ".join(f"This is sentence number {word} of a long story, told slowly." for word in ("one", "two") * 4)
    ours, theirs, report = both(xtts, voice, PLANS[plan], text=text, max_new_tokens=20, enable_text_splitting=True)
    assert_same_speech(ours, theirs)
    assert report.routes["GPT.generate"].served > 1


@pytest.mark.parametrize("plan", PLANS)
def test_tts_api(tts, reference, plan):
    """Several sentences and a voice cloned from a file, as users call it."""

    def say():
        torch.manual_seed(5)
        return tts.tts("Hello there. How are you?", speaker_wav=str(reference), language="en", max_new_tokens=25)

    theirs = say()
    neuron_xtts.patch(tts, buckets=PLANS[plan], strict=True)
    np.testing.assert_allclose(say(), theirs, rtol=0, atol=1e-5)
    report = neuron_xtts.report(tts)
    assert report.routes["GPT.generate"].served == report.routes["HifiDecoder.forward"].served == 2
    neuron_xtts.unpatch(tts)
    np.testing.assert_array_equal(say(), theirs)


def test_stream(xtts, voice):
    """The chunks of `inference_stream`; test_stream.py has the rest."""
    stop_after(xtts, None)

    def chunks():
        torch.manual_seed(2)
        return list(xtts.inference_stream("hello there", "en", *voice, stream_chunk_size=10, max_new_tokens=35))

    theirs = chunks()
    neuron_xtts.patch(xtts, strict=True)
    ours = chunks()
    assert [chunk.shape for chunk in ours] == [chunk.shape for chunk in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


SIZES = {
    "full width": {"gpt_layers": 3, "gpt_n_model_channels": 1024, "gpt_n_heads": 16, "decoder_input_dim": 1024},
    "one layer": {"gpt_layers": 1, "gpt_n_model_channels": 32, "gpt_n_heads": 1, "decoder_input_dim": 32},
    "three layers": {"gpt_layers": 3, "gpt_n_model_channels": 96, "gpt_n_heads": 4, "decoder_input_dim": 96},
    "xtts v1": {
        "gpt_use_perceiver_resampler": False,
        "gpt_num_audio_tokens": 8194,
        "gpt_start_audio_token": 8192,
        "gpt_stop_audio_token": 8193,
    },
    "no resampling": {"output_sample_rate": 22050},
}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_model_sizes(tmp_path, reference, size):
    xtts = random_tts(tmp_path, small=size != "full width", seed=7, **SIZES[size]).synthesizer.tts_model
    voice = xtts.get_conditioning_latents(str(reference))
    stop_after(xtts, None)
    for plan in PLANS.values():
        ours, theirs, _ = both(xtts, voice, plan, max_new_tokens=40)
        assert_same_speech(ours, theirs)


def sizes(largest):
    """Bucket sizes that hold everything: a random choice below ``largest``, and ``largest``."""
    return st.lists(st.integers(1, largest - 1), max_size=4).map(lambda some: (*some, largest))


plans = st.builds(
    BucketPlan,
    prefill=sizes(440),
    decode=sizes(1044),
    slots=st.sampled_from([(1,), (3,), (2, 5)]),
    latents=sizes(1044),
    vocoder=st.lists(st.integers(29, 300), min_size=1, max_size=3).map(tuple),
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    plan=plans,
    tokens=st.integers(1, 400),
    codes=st.integers(2, 80),  # of a single latent coqui-tts cannot change the speed
    speed=st.floats(0.7, 1.5),
    seed=st.integers(0, 99),
    do_sample=st.booleans(),
)
@example(plan=STATIC, tokens=400, codes=500, speed=1.0, seed=0, do_sample=True)
@example(plan=BucketPlan(vocoder=(29,)), tokens=9, codes=14, speed=0.7, seed=0, do_sample=True)
def test_padding_never_changes_the_audio(tts_original, voice, plan, tokens, codes, speed, seed, do_sample):
    xtts = copy.deepcopy(tts_original.synthesizer.tts_model)
    options = {"text": text_of(tokens), "seed": seed, "speed": speed, "do_sample": do_sample}
    ours, theirs, _ = both(xtts, voice, plan, **options, **stop_after(xtts, codes))
    assert_same_speech(ours, theirs)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    temperature=st.floats(0.1, 2.0),
    top_k=st.integers(0, 1026),
    top_p=st.floats(0.05, 1.0),
    repetition_penalty=st.floats(1.0, 20.0),
    length_penalty=st.floats(-2.0, 2.0),
    min_new_tokens=st.integers(0, 12),
    num_return_sequences=st.integers(1, 3),
    seed=st.integers(0, 10_000),
    static=st.booleans(),
)
def test_same_codes(tts_original, voice, seed, static, **options):
    """`GPT.generate` draws the same codes under every setting of the sampler, and leaves the same random state."""
    gpt = copy.deepcopy(tts_original.synthesizer.tts_model).gpt
    xtts_copy = copy.deepcopy(tts_original.synthesizer.tts_model)
    text = torch.randint(1, 60, (1, 9), generator=torch.Generator().manual_seed(seed))
    results = []
    for model in (gpt, neuron_xtts.patch(xtts_copy, buckets=STATIC if static else None, strict=True).gpt):
        torch.manual_seed(seed)
        results.append((model.generate(voice[0], text, do_sample=True, max_new_tokens=30, **options), torch.rand(3)))
    (theirs, their_next), (ours, our_next) = results
    assert torch.equal(ours, theirs)
    assert ours.dtype == theirs.dtype
    assert torch.equal(our_next, their_next)


@pytest.mark.parametrize("rows", [1, 3])
def test_batch_of_texts(xtts, voice, rows):
    """`GPT.generate` and `GPT.forward` of several texts at once."""
    text = torch.randint(1, 60, (rows, 9), generator=torch.Generator().manual_seed(0))
    cond = voice[0].repeat(rows, 1, 1)

    def run():
        torch.manual_seed(0)
        with torch.inference_mode():
            codes = xtts.gpt.generate(cond, text, do_sample=True, max_new_tokens=25)
            lengths = torch.full((rows,), codes.shape[1] * 1024)
            latents = xtts.gpt(text, torch.tensor([9] * rows), codes, lengths, cond_latents=cond, return_latent=True)
            return codes, latents, xtts.hifigan_decoder(latents, g=voice[1])

    theirs = run()
    for plan in PLANS.values():
        with neuron_xtts.patched(xtts, buckets=plan, strict=True):
            ours = run()
            assert neuron_xtts.report(xtts).routes["GPT.forward"].handed_over == 1
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("copies", [1, 2])
def test_return_dict(xtts, voice, copies):
    """The pair that `return_dict_in_generate` gives, with the cache as transformers keeps it."""
    options = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": copies, "return_dict_in_generate": True}
    text = torch.randint(1, 60, (1, 9))

    def run():
        torch.manual_seed(0)
        return xtts.gpt.generate(voice[0], text, **options)

    theirs, their_output = run()
    neuron_xtts.patch(xtts, strict=True)
    ours, our_output = run()
    assert torch.equal(ours, theirs)
    assert torch.equal(our_output.sequences, their_output.sequences)
    assert our_output.past_key_values.get_seq_length() == their_output.past_key_values.get_seq_length()
    for ours, theirs in zip(our_output.past_key_values.layers, their_output.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=1e-5)


def test_gpt_inference(xtts, voice):
    """`GPT.inference`, another name of `generate`."""
    text = torch.randint(1, 60, (1, 9))
    theirs = xtts.gpt.inference(voice[0], text, max_new_tokens=9)
    neuron_xtts.patch(xtts, strict=True)
    assert torch.equal(xtts.gpt.inference(voice[0], text, max_new_tokens=9), theirs)
    assert neuron_xtts.report(xtts).routes["GPT.generate"].served == 1


LAYOUTS = {
    "as long as the codes": (9, [20 * 1024]),
    "shorter text": (4, [20 * 1024]),
    "codes cut": (9, [13 * 1024 - 5]),
    "codes padded": (9, [26 * 1024]),
    "one code": (9, [1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan", PLANS)
def test_latents_of_any_codes(xtts, voice, plan, layout):
    """`GPT.forward` on codes that nobody generated, with its own way of cutting and padding them."""
    text_length, samples = LAYOUTS[layout]
    text, codes = torch.randint(1, 60, (1, 9)), torch.randint(0, 1024, (1, 20))

    @torch.inference_mode()
    def run():
        return xtts.gpt(
            text, torch.tensor([text_length]), codes, torch.tensor(samples), cond_latents=voice[0], return_latent=True
        )

    theirs = run()
    neuron_xtts.patch(xtts, buckets=PLANS[plan], strict=True)
    ours = run()
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert neuron_xtts.report(xtts).graphs["latents"]


def test_latents_of_rows_of_different_length(xtts, voice):
    text, codes = torch.randint(1, 60, (3, 9)), torch.randint(0, 1024, (3, 20))
    arguments = (text, torch.tensor([9, 7, 8]), codes, torch.tensor([20, 11, 15]) * 1024)
    cond = voice[0].repeat(3, 1, 1)
    with torch.inference_mode():
        theirs = xtts.gpt(*arguments, cond_latents=cond, return_latent=True)
        neuron_xtts.patch(xtts, strict=True)
        ours = xtts.gpt(*arguments, cond_latents=cond, return_latent=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("length", [1, 2, 14, 30, 200])
@pytest.mark.parametrize("method", ["forward", "inference"])
def test_vocoder(xtts, voice, plan, length, method):
    latents = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        theirs = getattr(xtts.hifigan_decoder, method)(latents, voice[1])
    neuron_xtts.patch(xtts, buckets=PLANS[plan], strict=True)
    with torch.inference_mode():
        ours = getattr(xtts.hifigan_decoder, method)(latents, voice[1])
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_one_trunk_call_per_code(xtts, voice):
    """And none after: the latents are handed over. Counted on a layer of the trunk itself."""
    options = {"max_new_tokens": 17, **stop_after(xtts, None)}
    calls = []
    xtts.gpt.gpt.h[0].ln_1.register_forward_hook(lambda *_: calls.append(1))
    neuron_xtts.patch(xtts, strict=True)
    speak(xtts, voice, **options)
    report = neuron_xtts.report(xtts)
    assert len(calls) == 17
    assert sum(counts.runs for counts in report.graphs["decode"].values()) == 16
    assert sum(counts.runs for counts in report.graphs["prefill"].values()) == 1
    assert "latents" not in report.graphs
    assert report.routes["GPT.forward"].handed_over == 1


def test_hooks_of_positions(xtts, voice):
    """Nothing stands against graphs: embeddings are made on the host, by the model's own modules."""
    xtts.gpt.mel_pos_embedding.emb.register_forward_hook(lambda module, inputs, output: output * 1.5)
    theirs = speak(xtts, voice, max_new_tokens=15)
    neuron_xtts.patch(xtts, strict=True)
    assert_same_speech(speak(xtts, voice, max_new_tokens=15), theirs)


def hook(layer):
    layer.register_forward_hook(lambda module, inputs, output: output * 1.5)


def replace_forward(layer):
    own = layer.forward
    layer.forward = lambda x: own(x) * 1.5


@pytest.mark.parametrize("change", [hook, replace_forward])
@pytest.mark.parametrize("path", ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"])
def test_layers_with_code_of_somebody_else(xtts, voice, path, change):
    """A layer inside a block that computes something else does so on graphs, too."""
    before = speak(xtts, voice, max_new_tokens=15)[0]["gpt_latents"]
    change(xtts.gpt.gpt.h[1].get_submodule(path))
    theirs = speak(xtts, voice, max_new_tokens=15)
    assert not np.array_equal(theirs[0]["gpt_latents"], before)
    neuron_xtts.patch(xtts, strict=True)
    assert_same_speech(speak(xtts, voice, max_new_tokens=15), theirs)
