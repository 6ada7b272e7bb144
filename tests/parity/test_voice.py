"""Known voices: found by content, bounded, counted, never stale; always what coqui-tts itself would return."""

import copy
import os
import shutil
import threading

import pytest
import torch
from helpers import all_fallbacks, fallbacks

import neuron_xtts
from neuron_xtts.coqui.recordings import write_reference

LATENTS, EMBEDDING = "Xtts.get_conditioning_latents", "Xtts.get_speaker_embedding"


@pytest.fixture
def recording(tmp_path):
    """A short one that a test may overwrite."""
    path = tmp_path / "voice.wav"
    write_reference(path, seconds=2)
    return path


@pytest.fixture
def plain(xtts):
    """The same model, never patched."""
    return copy.deepcopy(xtts)


def assert_same_voice(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.is_inference() == b.is_inference()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def counts(model, route=LATENTS):
    """Voices handed over, and computed."""
    route = neuron_xtts.report(model).routes[route]
    return route.handed_over, route.served - route.handed_over


def test_through_the_public_call(tts, reference):
    """``tts.tts`` with the same recording again, and with the voice it gave a name to."""
    options = {"language": "en", "split_sentences": False, "max_new_tokens": 5}
    torch.manual_seed(1)
    theirs = tts.tts("hello", speaker_wav=str(reference), **options)
    neuron_xtts.patch(tts, strict=True)
    for _ in range(3):
        torch.manual_seed(1)
        ours = tts.tts("hello", speaker_wav=str(reference), **options)
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-5)
    assert counts(tts) == (2, 1)
    report = neuron_xtts.report(tts)
    assert report.routes["GPT.get_style_emb"].served == 1
    assert sum(bucket.runs for bucket in report.graphs["conditioning"].values()) == 1
    assert all_fallbacks(tts) == {}


def test_by_content(xtts, plain, recording, tmp_path):
    """Neither path nor time stamp matters: a copy is known, and a file that was overwritten is new."""
    first = plain.get_conditioning_latents(str(recording))
    neuron_xtts.patch(xtts, strict=True)
    assert_same_voice(xtts.get_conditioning_latents(str(recording)), first)
    twin = shutil.copy(recording, tmp_path / "copy.wav")
    assert_same_voice(xtts.get_conditioning_latents(audio_path=twin), first)
    assert_same_voice(xtts.get_conditioning_latents([recording]), first)
    assert counts(xtts) == (2, 1)

    stamp = os.stat(recording)
    data = bytearray(recording.read_bytes())
    data[-8000:] = bytes(8000)
    recording.write_bytes(data)
    os.utime(recording, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    theirs = plain.get_conditioning_latents(str(recording))
    assert not torch.equal(theirs[0], first[0])
    assert_same_voice(xtts.get_conditioning_latents(str(recording)), theirs)
    assert counts(xtts) == (2, 2)


def test_by_parameters(xtts, plain, recording, reference):
    """What coqui-tts makes of the same file with other parameters, and of several files."""
    neuron_xtts.patch(xtts, strict=True)
    calls = [
        (recording, {}),
        (recording, {"gpt_cond_len": 1}),
        (recording, {"gpt_cond_chunk_len": 1}),
        (recording, {"max_ref_length": 1}),
        (recording, {"sound_norm_refs": True}),
        (recording, {"librosa_trim_db": None, "load_sr": 16000}),
        ([recording, reference], {}),
        ([reference, recording], {}),
    ]
    for _ in range(2):
        for path, options in calls:
            assert_same_voice(
                xtts.get_conditioning_latents(path, **options), plain.get_conditioning_latents(path, **options)
            )
    assert counts(xtts) == (len(calls), len(calls))
    xtts.get_conditioning_latents(recording, 30, gpt_cond_len=6)  # the defaults, said
    assert counts(xtts) == (len(calls) + 1, len(calls))


def test_speaker_embedding(xtts, plain):
    """By the samples; those of `get_conditioning_latents` with other parameters are the same."""
    neuron_xtts.patch(xtts, strict=True)
    samples = 0.1 * torch.randn(1, 22050)
    theirs = plain.get_speaker_embedding(samples, 22050)
    for audio in (samples, samples.clone()):
        assert_same_voice([xtts.get_speaker_embedding(audio, 22050)], [theirs])
    assert counts(xtts, EMBEDDING) == (1, 1)
    other = plain.get_speaker_embedding(samples, 24000)
    assert_same_voice([xtts.get_speaker_embedding(samples, sr=24000)], [other])
    samples[0, 0] += 0.5
    theirs = plain.get_speaker_embedding(samples, 22050)
    assert_same_voice([xtts.get_speaker_embedding(samples, 22050)], [theirs])
    assert counts(xtts, EMBEDDING) == (1, 3)


def test_the_caller_may_write_into_a_voice(xtts, plain, recording):
    theirs = plain.get_conditioning_latents(recording)
    neuron_xtts.patch(xtts)
    for _ in range(3):
        ours = xtts.get_conditioning_latents(recording)
        assert_same_voice(ours, theirs)
        with torch.inference_mode():
            for tensor in ours:
                tensor.zero_()


CHANGES = {
    "conditioning encoder": lambda xtts: xtts.gpt.conditioning_encoder.init.weight.mul_(1.5),
    "perceiver": lambda xtts: xtts.gpt.conditioning_perceiver.latents.add_(0.5),
    "speaker encoder": lambda xtts: xtts.hifigan_decoder.speaker_encoder.fc.bias.add_(torch.arange(512.0)),
    "mel_stats": lambda xtts: xtts.mel_stats.mul_(1.5),
    "new tensor": lambda xtts: setattr(
        xtts.gpt.conditioning_encoder.init, "weight", torch.nn.Parameter(xtts.gpt.conditioning_encoder.init.weight * 2)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights(xtts, plain, recording, change):
    neuron_xtts.patch(xtts)
    first = xtts.get_conditioning_latents(recording)
    with torch.no_grad():
        for model in (xtts, plain):
            CHANGES[change](model)
    theirs = plain.get_conditioning_latents(recording)
    assert any(not torch.equal(a, b) for a, b in zip(theirs, first, strict=True))
    assert_same_voice(xtts.get_conditioning_latents(recording), theirs)


def test_a_file_that_is_written_to_meanwhile(xtts, plain, recording, tmp_path, monkeypatch):
    """What was computed of it is not kept under the content it had before."""
    before = shutil.copy(recording, tmp_path / "before.wav")
    write_reference(tmp_path / "after.wav", seconds=3)
    original = xtts.get_gpt_cond_latents

    def overwrite(*args, **kwargs):
        shutil.copy(tmp_path / "after.wav", recording)
        return original(*args, **kwargs)

    neuron_xtts.patch(xtts)
    monkeypatch.setattr(xtts, "get_gpt_cond_latents", overwrite)
    xtts.get_conditioning_latents(recording)
    for path in (before, recording):
        assert_same_voice(xtts.get_conditioning_latents(path), plain.get_conditioning_latents(path))
    assert counts(xtts) == (0, 3)


def test_bound(xtts, tmp_path):
    """The least recently asked for is forgotten."""
    paths = [tmp_path / f"{i}.wav" for i in range(3)]
    for i, path in enumerate(paths):
        write_reference(path, seconds=1 + 0.1 * i)
    neuron_xtts.patch(xtts, voice_cache=2)
    for path in (paths[0], paths[1], paths[0], paths[2], paths[0]):
        xtts.get_conditioning_latents(path)
    assert counts(xtts) == (2, 3)
    xtts.get_conditioning_latents(paths[1])
    assert counts(xtts) == (2, 4)


def test_off(xtts, plain, recording):
    neuron_xtts.patch(xtts, voice_cache=0)
    for _ in range(2):
        assert_same_voice(xtts.get_conditioning_latents(recording), plain.get_conditioning_latents(recording))
    assert counts(xtts) == counts(xtts, EMBEDDING) == (0, 0)
    assert neuron_xtts.report(xtts).routes["GPT.get_style_emb"].served == 2


@pytest.mark.parametrize("value", [-1, 1.5, True, "16", None])
def test_wrong_bound(xtts, value):
    with pytest.raises(ValueError, match=f"voice_cache={value!r}; expected how many"):
        neuron_xtts.patch(xtts, voice_cache=value)
    assert not neuron_xtts.is_patched(xtts)


def test_what_is_not_remembered(xtts, plain, recording, caplog):
    """coqui-tts computes it every time; with strict=True, too, since no graph was passed over."""
    neuron_xtts.patch(xtts, strict=True)
    theirs = plain.get_conditioning_latents(recording)
    with recording.open("rb") as file:
        assert_same_voice(xtts.get_conditioning_latents(file), theirs)
    assert_same_voice(
        [xtts.get_speaker_embedding(audio=torch.ones(1, 9000), sr=16000)],
        [plain.get_speaker_embedding(torch.ones(1, 9000), 16000)],
    )
    hook = xtts.hifigan_decoder.speaker_encoder.register_forward_hook(lambda *_: None)
    assert_same_voice(xtts.get_conditioning_latents(recording), theirs)
    hook.remove()
    for model in (xtts, plain):
        model.hifigan_decoder.speaker_encoder.train()
    assert_same_voice(xtts.get_conditioning_latents(recording), plain.get_conditioning_latents(recording))
    for model in (xtts, plain):
        model.hifigan_decoder.speaker_encoder.eval()
    with torch.autocast("cpu"):
        ours, autocast = (model.get_speaker_embedding(torch.ones(1, 9000), 16000) for model in (xtts, plain))
    assert torch.equal(ours, autocast)
    assert fallbacks(xtts, LATENTS) == {"a reference that is not a file": 1, "forward hooks": 1, "training mode": 1}
    assert fallbacks(xtts, EMBEDDING) == {"forward hooks": 1, "training mode": 1, "autocast": 1}
    assert caplog.text.count(f"{LATENTS}: a voice is not remembered: forward hooks") == 1


def chain(error):
    """The kinds of errors that one was raised in the handling of."""
    kinds = []
    while error := error.__context__:
        kinds.append(type(error))
    return kinds


def test_errors_are_coqui_s_own(xtts, plain, recording, tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"no recording")
    write_reference(tmp_path / "short.wav", seconds=0.2)
    calls = [
        lambda model: model.get_conditioning_latents(str(tmp_path / "missing.wav")),
        lambda model: model.get_conditioning_latents(str(tmp_path / "noise.wav")),
        lambda model: model.get_conditioning_latents(str(tmp_path / "short.wav")),
        lambda model: model.get_conditioning_latents(str(recording), gpt_cond_chunk_len=6.0),
        lambda model: model.get_conditioning_latents(),
        lambda model: model.get_conditioning_latents(str(recording), nothing=1),
        lambda model: model.get_speaker_embedding([1.0], 22050),
    ]
    neuron_xtts.patch(xtts)
    xtts.get_conditioning_latents(str(recording))
    for call in calls:
        errors = []
        for model in (plain, xtts):
            with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever coqui-tts raises
                call(model)
            errors.append((caught.type, str(caught.value), chain(caught.value)))
        assert errors[0] == errors[1]
    reasons = fallbacks(xtts, LATENTS) | fallbacks(xtts, EMBEDDING)
    assert {"arguments that the method does not take", "a reference that is not a tensor"} <= reasons.keys()
    assert counts(xtts)[0] == 0


def test_a_pipe_is_left_for_coqui(xtts, plain, recording):
    neuron_xtts.patch(xtts)
    reader, writer = os.pipe()
    thread = threading.Thread(target=lambda: os.fdopen(writer, "wb").write(recording.read_bytes()))
    thread.start()
    voice = xtts.get_conditioning_latents(f"/dev/fd/{reader}")
    thread.join()
    os.close(reader)
    assert_same_voice(voice, plain.get_conditioning_latents(recording))
    assert fallbacks(xtts, LATENTS) == {"a reference that is not a file": 1}


def test_replaced_modules(xtts, plain, recording):
    """Those of another model: its voices, not ours."""
    neuron_xtts.patch(xtts)
    xtts.get_conditioning_latents(recording)
    with torch.no_grad():
        plain.gpt.conditioning_encoder.init.weight.mul_(2)
    xtts.gpt = plain.gpt
    assert_same_voice(xtts.get_conditioning_latents(recording), plain.get_conditioning_latents(recording))
    assert fallbacks(xtts, LATENTS) == {"the model's modules were replaced after patch()": 1}
    assert {LATENTS, EMBEDDING, "GPT.generate"} <= set(neuron_xtts.report(xtts).gone)


def test_disabled(xtts, plain, recording, monkeypatch):
    neuron_xtts.patch(xtts)
    xtts.get_conditioning_latents(recording)
    monkeypatch.setenv("NEURON_XTTS_DISABLE", "1")
    assert_same_voice(xtts.get_conditioning_latents(recording), plain.get_conditioning_latents(recording))
    assert fallbacks(xtts, LATENTS) == {"NEURON_XTTS_DISABLE is set": 1}
    assert counts(xtts) == (0, 1)


def test_threads(xtts, plain, recording):
    """They compute a voice once."""
    neuron_xtts.patch(xtts, strict=True)
    voices = []
    threads = [
        threading.Thread(target=lambda: voices.append(xtts.get_conditioning_latents(recording))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for voice in voices:
        assert_same_voice(voice, plain.get_conditioning_latents(recording))
    assert len(voices) == 4
    assert counts(xtts) == (3, 1)


def test_a_wrapper_that_hides_the_arguments(xtts, recording):
    """Its voices are computed each time, and the report says why."""
    own = xtts.get_conditioning_latents
    theirs = own(str(recording))
    xtts.get_conditioning_latents = lambda *args, **kwargs: own(*args, **kwargs)
    neuron_xtts.patch(xtts)
    for _ in range(2):
        for ours, expected in zip(xtts.get_conditioning_latents(str(recording)), theirs, strict=True):
            torch.testing.assert_close(ours, expected)
    assert fallbacks(xtts, LATENTS) == {"a reference that is not a file": 2}


def test_a_method_wrapped_before_the_patch(xtts, recording):
    """The defaults and the arguments are those of what is really called."""
    own = xtts.get_conditioning_latents

    def longer(audio_path, gpt_cond_len=2, loud=False):
        latents, speaker = own(audio_path, gpt_cond_len=gpt_cond_len)
        return latents * (2 if loud else 1), speaker

    xtts.get_conditioning_latents = longer
    arguments = ({}, {"gpt_cond_len": 1}, {"loud": True}, {"gpt_cond_len": 2})
    theirs = [longer(str(recording), **options)[0] for options in arguments]
    neuron_xtts.patch(xtts)
    for options, expected in zip(arguments, theirs, strict=True):
        torch.testing.assert_close(xtts.get_conditioning_latents(str(recording), **options)[0], expected)
    counts = neuron_xtts.report(xtts).routes["Xtts.get_conditioning_latents"]
    assert (counts.served, counts.handed_over) == (4, 1)  # the last is the first
    assert not counts.fallbacks
