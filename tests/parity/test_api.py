"""patch, unpatch, patched, is_patched and report: what they accept, change and give back."""

import copy
import gc
import importlib.metadata
import json
import logging
import pickle
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
import wrapt
from helpers import all_fallbacks, assert_identical, assert_same_speech, dicts, fallbacks, speak, stop_after, text_of
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

import neuron_xtts
from neuron_xtts import BucketPlan, ModelNotReadyError, UnsupportedVersionError
from neuron_xtts.coqui.find import check_versions
from neuron_xtts.coqui.models import load_tts, random_tts


def forms(tts):
    return {"TTS": tts, "Synthesizer": tts.synthesizer, "Xtts": tts.synthesizer.tts_model}


@pytest.mark.parametrize("form", ["TTS", "Synthesizer", "Xtts"])
def test_every_form_of_the_model(tts, voice, form):
    """Each names the same target."""
    model, xtts = forms(tts)[form], tts.synthesizer.tts_model
    theirs = speak(xtts, voice, max_new_tokens=15)
    before = dicts(tts)
    assert neuron_xtts.patch(model) is model
    assert all(neuron_xtts.is_patched(other) for other in forms(tts).values())
    assert_same_speech(speak(xtts, voice, max_new_tokens=15), theirs)
    assert neuron_xtts.report(model).routes["GPT.generate"].served == 1
    assert neuron_xtts.unpatch(model) is model
    assert not neuron_xtts.is_patched(model)
    assert dicts(tts) == before
    assert_identical(speak(xtts, voice, max_new_tokens=15), theirs)


def test_patch_twice_and_unpatch_twice(xtts):
    before = dicts(xtts)
    neuron_xtts.patch(xtts)
    first = xtts.gpt.__dict__["forward"]
    neuron_xtts.patch(xtts)
    assert not isinstance(xtts.gpt.__dict__["forward"].__wrapped__, wrapt.ObjectProxy)
    assert xtts.gpt.__dict__["forward"] is not first
    neuron_xtts.unpatch(xtts)
    neuron_xtts.unpatch(xtts)
    assert dicts(xtts) == before


def test_patched_is_undone_after_an_error(xtts):
    before = dicts(xtts)
    with neuron_xtts.patched(xtts) as model:
        assert model is xtts
        assert neuron_xtts.is_patched(xtts)
    assert dicts(xtts) == before
    with pytest.raises(KeyError), neuron_xtts.patched(xtts):
        raise KeyError
    assert dicts(xtts) == before


def test_two_models_never_meet(tts_original, voice):
    """Patched differently, with different weights."""
    one, other = (copy.deepcopy(tts_original.synthesizer.tts_model) for _ in range(2))
    with torch.no_grad():
        other.gpt.mel_head.weight.mul_(-1)
    expected = [speak(model, voice, max_new_tokens=15) for model in (one, other)]
    neuron_xtts.patch(one)
    neuron_xtts.patch(other, buckets=BucketPlan.static())
    for model, theirs in zip((one, other), expected, strict=True):
        assert_same_speech(speak(model, voice, max_new_tokens=15), theirs)
    neuron_xtts.unpatch(one)
    assert neuron_xtts.is_patched(other)
    assert neuron_xtts.report(other).routes["GPT.generate"].calls == 1


def test_deepcopy_is_unpatched_and_works(tts, voice):
    xtts = tts.synthesizer.tts_model
    theirs = speak(xtts, voice, max_new_tokens=15)
    neuron_xtts.patch(tts)
    twin = copy.deepcopy(tts)
    assert not neuron_xtts.is_patched(twin)
    assert_identical(speak(twin.synthesizer.tts_model, voice, max_new_tokens=15), theirs)
    assert neuron_xtts.report(xtts).routes["GPT.generate"].calls == 0  # the copy calls its own methods
    with torch.no_grad():
        twin.synthesizer.tts_model.gpt.mel_head.weight.mul_(-1)  # and computes with its own weights
    assert_same_speech(speak(xtts, voice, max_new_tokens=15), theirs)
    neuron_xtts.patch(twin)
    speak(twin.synthesizer.tts_model, voice, max_new_tokens=15)
    assert neuron_xtts.report(twin).routes["GPT.generate"].served == 1
    neuron_xtts.unpatch(twin)
    assert not neuron_xtts.is_patched(twin)


@pytest.mark.slow
def test_pickle(xtts, voice):
    """What can be pickled unpatched can be pickled patched, and is unpatched in the pickle."""
    from TTS.tts.layers.xtts.hifigan_decoder import HifiDecoder

    # A new one: removing a parametrization changes its class, which a deepcopy shares with the original.
    decoder = HifiDecoder(decoder_input_dim=64, upsample_initial_channel_decoder=64).eval()
    xtts.hifigan_decoder = decoder
    with pytest.raises(AttributeError, match="weight_norm"):
        pickle.dumps(decoder)  # weight norm stands in the way of coqui-tts itself
    for module in decoder.modules():
        if is_parametrized(module, "weight"):
            remove_parametrizations(module, "weight")
        module._load_state_dict_pre_hooks.clear()  # weight norm leaves a local function behind
    latents = torch.randn(1, 9, 64)
    with torch.inference_mode():
        theirs = decoder(latents, voice[1])
    neuron_xtts.patch(xtts)
    script = (
        "import pickle, sys, torch; decoder, x, g = pickle.load(sys.stdin.buffer); torch.set_num_threads(2)\n"
        "with torch.inference_mode(): pickle.dump(decoder(x, g), sys.stdout.buffer)\n"
        "assert 'neuron_xtts' not in sys.modules"
    )
    pickled = pickle.dumps((decoder, latents, voice[1]))
    output = subprocess.run([sys.executable, "-c", script], input=pickled, capture_output=True, check=True).stdout
    torch.testing.assert_close(pickle.loads(output), theirs, rtol=0, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(copy.copy(decoder.forward)(latents, voice[1]), theirs)


def test_state_dict_is_untouched(xtts):
    names = list(xtts.state_dict())
    modules = [name for name, _ in xtts.named_modules()]
    neuron_xtts.patch(xtts)
    assert list(xtts.state_dict()) == names
    assert [name for name, _ in xtts.named_modules()] == modules


def test_wrapper_from_before_comes_back(xtts, voice):
    calls = []
    original = xtts.gpt.generate

    def theirs(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    xtts.gpt.generate = theirs
    neuron_xtts.patch(xtts, buckets=BucketPlan.none())
    speak(xtts, voice, max_new_tokens=5)
    assert calls == [1]  # a fallback goes through it
    neuron_xtts.unpatch(xtts)
    assert xtts.gpt.__dict__["generate"] is theirs


def test_wrapper_on_top_stays(xtts, voice, caplog):
    """With ours underneath switched off, and a warning."""
    expected = speak(xtts, voice, max_new_tokens=15)
    neuron_xtts.patch(xtts)
    ours, calls = xtts.gpt.generate, []

    def on_top(*args, **kwargs):
        calls.append(1)
        return ours(*args, **kwargs)

    xtts.gpt.generate = on_top
    speak(xtts, voice, max_new_tokens=5)
    assert neuron_xtts.report(xtts).routes["GPT.generate"].served == 1
    with caplog.at_level(logging.WARNING, logger="neuron_xtts"):
        neuron_xtts.unpatch(xtts)
    assert "GPT.generate was wrapped again after patch()" in caplog.text
    assert xtts.gpt.__dict__["generate"] is on_top
    assert_identical(speak(xtts, voice, max_new_tokens=15), expected)
    assert len(calls) == 2
    neuron_xtts.patch(xtts)  # on top of theirs
    assert_same_speech(speak(xtts, voice, max_new_tokens=15), expected)
    assert neuron_xtts.report(xtts).routes["GPT.generate"].served == 1
    neuron_xtts.unpatch(xtts)
    assert xtts.gpt.__dict__["generate"] is on_top


def test_eval_on_a_patched_model(xtts, voice):
    """It rebuilds `gpt_inference`, which the routes do not lean on."""
    theirs = speak(xtts, voice, max_new_tokens=15)
    neuron_xtts.patch(xtts, strict=True)
    xtts.eval()
    assert_same_speech(speak(xtts, voice, max_new_tokens=15), theirs)
    assert neuron_xtts.report(xtts).gone == []


ROUTES = [
    "GPT.get_style_emb",
    "GPT.generate",
    "GPT.forward",
    "HifiDecoder.forward",
    "HifiDecoder.inference",
    "GPT.compute_embeddings",
    "GPT.get_generator",
    "Xtts.get_conditioning_latents",
    "Xtts.get_speaker_embedding",
]


def test_load_checkpoint_on_a_patched_model(tmp_path, reference):
    """It replaces the patched modules: the report says so, and patch() restores the routes."""
    tts = random_tts(tmp_path, small=True)
    xtts = tts.synthesizer.tts_model
    voice = xtts.get_conditioning_latents(str(reference))
    theirs = speak(xtts, voice, max_new_tokens=15)
    neuron_xtts.patch(tts)
    decoder = xtts.hifigan_decoder
    xtts.load_checkpoint(xtts.config, checkpoint_dir=str(tmp_path), eval=True)
    xtts.hifigan_decoder.waveform_decoder = decoder.waveform_decoder  # narrow, which no checkpoint can say
    assert not neuron_xtts.is_patched(tts)
    report = neuron_xtts.report(tts)
    assert report.gone == ROUTES
    assert "patch(model) restores them" in str(report)
    assert_identical(speak(xtts, voice, max_new_tokens=15), theirs)
    neuron_xtts.patch(tts, strict=True)
    assert neuron_xtts.report(tts).gone == []
    assert_same_speech(speak(xtts, voice, max_new_tokens=15), theirs)
    neuron_xtts.unpatch(tts)
    left = set(vars(xtts.gpt)) | set(vars(decoder))
    assert not {"forward", "generate", "inference", "get_style_emb", "get_generator"} & left


CHANGES = {
    "load_state_dict": lambda model, other: model.load_state_dict(other.state_dict()),
    "in place": lambda model, other: torch._foreach_copy_(list(model.parameters()), list(other.parameters())),
    "data": lambda model, other: [
        setattr(ours, "data", theirs.data) for ours, theirs in zip(model.parameters(), other.parameters(), strict=True)
    ],
    "there and back": lambda model, other: (model.load_state_dict(other.state_dict()), model.double(), model.float()),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_weights_change_under_a_patch(xtts, voice, change):
    other = copy.deepcopy(xtts)
    generator = torch.Generator().manual_seed(1)
    for parameter in other.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    theirs = speak(other, voice, max_new_tokens=15)
    neuron_xtts.patch(xtts, strict=True)
    speak(xtts, voice, max_new_tokens=15)
    CHANGES[change](xtts, other)
    assert_same_speech(speak(xtts, voice, max_new_tokens=15), theirs)


@torch.inference_mode()
def test_latents_are_never_stale(xtts, voice):
    """Weights, text, codes or conditioning that changed since they were made: computed anew."""
    text = torch.randint(1, 60, (1, 9))
    neuron_xtts.patch(xtts, strict=True)
    with torch.inference_mode(False):
        plain = copy.deepcopy(xtts)

    def latents(model, text, codes, cond):
        lengths = torch.tensor([codes.shape[1] * 1024])
        return model.gpt(text, torch.tensor([9]), codes, lengths, cond_latents=cond, return_latent=True)

    def check(text, codes, cond, handed_over):
        before = neuron_xtts.report(xtts).routes["GPT.forward"].handed_over
        ours = latents(xtts, text, codes, cond)
        torch.testing.assert_close(ours, latents(plain, text, codes, cond), rtol=0, atol=1e-5)
        assert neuron_xtts.report(xtts).routes["GPT.forward"].handed_over - before == handed_over

    cond = voice[0].clone()
    codes = xtts.gpt.generate(cond, text, do_sample=True, max_new_tokens=15)
    check(text, codes, cond, 1)
    latents(xtts, text, codes, cond).zero_()  # what was handed over belongs to the caller
    check(text, codes, cond, 1)
    check(text, codes[:, :-1], cond, 0)
    check(text + 1, codes, cond, 0)
    check(text, codes, cond * 1.5, 0)
    cond.mul_(2)  # in place, in the very tensor that was handed to generate
    check(text, codes, cond, 0)
    with torch.inference_mode(False), torch.no_grad():
        for model in (xtts, plain):
            model.gpt.final_norm.weight.mul_(1.1)
    check(text, codes, voice[0], 0)


def test_two_threads(xtts, voice):
    """Each gets its own correct audio, in turns."""
    texts = {"short": text_of(5), "long": text_of(60)}
    options = {"do_sample": False, "max_new_tokens": 25, **stop_after(xtts, None)}
    expected = {name: speak(xtts, voice, text=text, **options)[0] for name, text in texts.items()}
    neuron_xtts.patch(xtts, strict=True)
    results, barrier = {name: [] for name in texts}, threading.Barrier(len(texts))

    def work(name):
        barrier.wait()
        for _ in range(6):
            results[name].append(xtts.inference(texts[name], "en", *voice, **options))

    threads = [threading.Thread(target=work, args=(name,)) for name in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, theirs in expected.items():
        assert len(results[name]) == 6
        for ours in results[name]:
            np.testing.assert_allclose(ours["wav"], theirs["wav"], rtol=0, atol=1e-5)
    assert neuron_xtts.report(xtts).routes["GPT.forward"].handed_over == 12


def test_a_patch_does_not_keep_the_model(tts_original, voice):
    xtts = copy.deepcopy(tts_original.synthesizer.tts_model)
    neuron_xtts.patch(xtts)
    speak(xtts, voice, max_new_tokens=5)
    held = [weakref.ref(module) for module in (xtts, xtts.gpt, xtts.hifigan_decoder)]
    del xtts
    gc.collect()
    assert [reference() for reference in held] == [None, None, None]


def test_normal_and_inference_tensors(xtts, voice):
    """What comes out belongs to the caller's mode, whatever mode the work before ran in."""
    text = torch.randint(1, 60, (1, 9))
    neuron_xtts.patch(xtts, strict=True)
    with torch.inference_mode():
        codes = xtts.gpt.generate(voice[0], text, do_sample=True, max_new_tokens=9)
    with torch.no_grad():
        lengths = torch.tensor([codes.shape[1] * 1024])
        latents = xtts.gpt(text, torch.tensor([9]), codes, lengths, cond_latents=voice[0], return_latent=True)
        assert not latents.is_inference()
        latents += 1
        assert not xtts.hifigan_decoder(latents, g=voice[1]).is_inference()
        assert xtts.hifigan_decoder.inference(latents, voice[1]).is_inference()
    assert neuron_xtts.report(xtts).routes["GPT.forward"].handed_over == 1


# Bad input


@pytest.mark.parametrize("model", [None, "xtts_v2", torch.nn.Linear(2, 2), object])
def test_wrong_type(model):
    for verb in (neuron_xtts.patch, neuron_xtts.unpatch, neuron_xtts.is_patched, neuron_xtts.report):
        with pytest.raises(TypeError, match=f"got a {type(model).__name__}"):
            verb(model)


def test_tts_without_a_model():
    from TTS.api import TTS

    with pytest.raises(ModelNotReadyError, match="its synthesizer is None"):
        neuron_xtts.patch(TTS())


def test_synthesizer_without_a_model(tts):
    tts.synthesizer.tts_model = None
    with pytest.raises(ModelNotReadyError, match="its tts_model is None"):
        neuron_xtts.patch(tts)


def test_another_model(tts):
    tts.synthesizer.tts_model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="got a TTS holding a Linear"):
        neuron_xtts.patch(tts)


def test_half_built(tts_original):
    from TTS.tts.models.xtts import Xtts

    xtts = Xtts(tts_original.synthesizer.tts_model.config)
    with pytest.raises(ModelNotReadyError, match="eval"):
        neuron_xtts.patch(xtts)
    xtts.gpt = None
    with pytest.raises(ModelNotReadyError, match="no GPT"):
        neuron_xtts.patch(xtts)
    assert not neuron_xtts.is_patched(xtts)


def test_unknown_options(xtts):
    before = dicts(xtts)
    with pytest.raises(ValueError, match="backend='gpu' does not exist; choose one of 'auto', 'cpu', 'neuron'"):
        neuron_xtts.patch(xtts, backend="gpu")
    with pytest.raises(ValueError, match="precision='fp8' does not exist on the host; choose one of 'fp32'"):
        neuron_xtts.patch(xtts, precision="fp8")
    with pytest.raises(TypeError, match=r"buckets must be a neuron_xtts\.BucketPlan or None, got a dict"):
        neuron_xtts.patch(xtts, buckets={})
    with pytest.raises(ValueError, match="a window of 26 frames; this vocoder needs more than 26"):
        neuron_xtts.patch(xtts, buckets=BucketPlan(vocoder=(40, 26)))
    assert dicts(xtts) == before


def test_a_failed_patch_leaves_the_old_one(xtts, voice):
    neuron_xtts.patch(xtts)
    with pytest.raises(ValueError, match="backend"):
        neuron_xtts.patch(xtts, backend="gpu")
    speak(xtts, voice, max_new_tokens=5)
    assert neuron_xtts.report(xtts).routes["GPT.generate"].served == 1


@pytest.mark.parametrize(
    ("package", "version"),
    [("coqui-tts", "0.27.2"), ("coqui-tts", "0.29.0"), ("transformers", "4.56.1"), ("torch", None)],
)
def test_unsupported_versions(xtts, monkeypatch, package, version):
    """Checked before anything is touched."""
    real, before = importlib.metadata.version, dicts(xtts)

    def installed(name):
        if name != package:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(UnsupportedVersionError) as error:
        neuron_xtts.patch(xtts)
    assert (f"{package} {version} is installed" if version else "torch is not installed") in str(error.value)
    assert "pip install" in str(error.value)
    assert dicts(xtts) == before


def test_versions_that_do_not_go_together(monkeypatch, miniature):
    """Which pip lets be: coqui-tts 0.27 could not be imported."""
    versions = {"coqui-tts": "0.27.5", "transformers": "5.0.0", "torch": "2.9.0"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    with pytest.raises(UnsupportedVersionError, match=r"coqui-tts 0\.27\.5 cannot .* with transformers 5\.0\.0"):
        load_tts(miniature)
    for versions["coqui-tts"], versions["transformers"] in (("0.28.0", "5.0.0"), ("0.27.5", "4.57.6")):
        check_versions()


def test_bad_input_leaves_the_model_usable(xtts, voice):
    """The error that coqui-tts gives, and the next sentence as if nothing had happened."""
    plain = copy.deepcopy(xtts)
    neuron_xtts.patch(xtts)
    bad = {
        "too long": {"text": text_of(402)},
        "language": {"text": "hello", "language": "xx"},
        "temperature": {"text": "hello", "temperature": -1.0},
        "single latent": {"text": "hello", "speed": 1.5, "max_new_tokens": 1},
        "shape": {"text": "hello", "gpt_cond_latent": torch.zeros(1, 32, 7)},
        "no text": {"text": None},
    }
    for options in bad.values():
        options = {"language": "en", "gpt_cond_latent": voice[0], "speaker_embedding": voice[1], **options}
        errors = []
        for model in (plain, xtts):
            with pytest.raises(Exception) as error:  # noqa: PT011 - whatever coqui-tts raises
                model.inference(**options)
            errors.append((type(error.value), str(error.value)))
        assert errors[0] == errors[1]
    theirs = speak(plain, voice, text="", max_new_tokens=15)  # empty text is a language tag, and is spoken
    assert_same_speech(speak(xtts, voice, text="", max_new_tokens=15), theirs)
    assert list(fallbacks(xtts, "GPT.forward")) == []


# Report


def test_report(xtts, voice):
    assert str(neuron_xtts.report(xtts)) == "neuron_xtts: not patched"
    plan = BucketPlan(prefill=(128,), decode=(128, 256), slots=(1, 4), latents=(128,), vocoder=(64, 128, 256))
    neuron_xtts.patch(xtts, buckets=plan)
    stop_after(xtts, None)
    speak(xtts, voice, text=text_of(30), max_new_tokens=100)
    text = torch.ones(1, 5, dtype=torch.long)
    xtts.gpt.generate(voice[0], text, num_return_sequences=3, do_sample=True, max_new_tokens=4)
    with torch.no_grad():
        for _ in range(2):
            xtts.gpt(
                text, torch.tensor([5]), torch.ones(1, 8, dtype=torch.long), torch.tensor([8 * 1024]),
                cond_latents=voice[0], cond_lens=torch.tensor([2048]), return_latent=True,
            )  # fmt: skip
    report = neuron_xtts.report(xtts)
    assert (report.backend, report.precision, report.gone, report.missing) == ("cpu", "fp32", [], {})
    assert {name: counts.calls for name, counts in report.routes.items()} == {
        "GPT.get_style_emb": 0,
        "GPT.generate": 2,
        "GPT.forward": 3,
        "HifiDecoder.forward": 1,
        "HifiDecoder.inference": 0,
        "GPT.get_generator": 0,
        "Xtts.get_conditioning_latents": 0,
        "Xtts.get_speaker_embedding": 0,
    }
    runs = {name: {bucket: counts.runs for bucket, counts in graph.items()} for name, graph in report.graphs.items()}
    # A prefix of 32 + 30 + 2 + 1 positions: the first 128 slots serve positions 65 to 127, the next bucket the rest.
    assert runs == {
        "prefill": {"128": 2},
        "decode": {"1x128": 63, "1x256": 36, "4x128": 3},
        "vocoder": {"256": 2},
    }
    frames = int(100 * 4 * 24000 / 22050)
    assert report.graphs["vocoder"]["256"].waste == pytest.approx(1 - frames / 512)
    assert report.graphs["prefill"]["128"].waste == pytest.approx(1 - (65 + 40) / 256)
    text, html = str(report), report._repr_html_()
    for part in ("argument cond_lens", "1x256", "GPT.generate", "backend cpu, precision fp32"):
        assert part in text
        assert part in html
    data = json.loads(json.dumps(report.to_dict()))
    assert data["routes"]["GPT.forward"]["fallbacks"] == {"argument cond_lens": 2}
    assert data["routes"]["GPT.forward"]["calls"] == 3
    assert data["graphs"]["prefill"]["128"]["waste"] == pytest.approx(1 - (65 + 40) / 256)
    assert data["buckets"]["slots"] == [1, 4]
    assert report.routes["GPT.generate"].seconds > 0
    neuron_xtts.patch(xtts)
    assert neuron_xtts.report(xtts).routes["GPT.generate"].calls == 0
    assert all_fallbacks(xtts) == {}


def test_report_escapes_html(xtts, voice):
    neuron_xtts.patch(xtts)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever coqui-tts raises
        xtts.gpt.generate(voice[0], torch.ones(1, 5, dtype=torch.long), **{"<b>": 1})
    assert "argument &lt;b&gt;" in neuron_xtts.report(xtts)._repr_html_()


# Import


def test_import_touches_nothing():
    script = (
        "import sys, neuron_xtts; "
        "print([name for name in ('TTS', 'torch_neuronx', 'transformers', 'wrapt') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_public_names():
    assert set(neuron_xtts.__all__) <= set(dir(neuron_xtts))
    assert importlib.metadata.version("neuron-xtts") == neuron_xtts.__version__
