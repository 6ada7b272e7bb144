"""Voices as files: what is spoken with one is what is spoken with its recording, and other weights are noticed."""

import copy
import json
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import neuron_xtts
from neuron_xtts import Voice, VoiceError
from neuron_xtts.coqui.recordings import write_reference
from neuron_xtts.coqui.voices import voice_of
from neuron_xtts.tools.cli import main
from neuron_xtts.voice import VoiceFolder


@pytest.fixture(scope="module")
def kept(tts_original, reference, tmp_path_factory):
    """A file with the reference's voice."""
    return Voice.of(tts_original, reference).save(tmp_path_factory.mktemp("voice") / "ann")


@pytest.fixture
def other(xtts):
    """A model whose encoders are others."""
    model = copy.deepcopy(xtts)
    with torch.no_grad():
        model.gpt.conditioning_encoder.init.weight *= 1.5
    return model


@pytest.mark.parametrize("patched", [False, True])
def test_the_same_audio(tts, reference, kept, patched):
    """Through ``tts.tts``, by name; and chunk by chunk."""
    options = {"language": "en", "split_sentences": False, "max_new_tokens": 30}

    def say(**voice):
        torch.manual_seed(3)
        return np.array(tts.tts("an old song.", **voice, **options))

    expected = say(speaker_wav=str(reference))
    voice = Voice.load(kept)
    voice.add_to(tts, "ann")
    if patched:
        neuron_xtts.patch(tts, backend="cpu")
    np.testing.assert_allclose(say(speaker="ann"), say(speaker_wav=str(reference)), rtol=0, atol=1e-5)
    np.testing.assert_allclose(say(speaker="ann"), expected, rtol=0, atol=1e-5)
    xtts = tts.synthesizer.tts_model
    torch.manual_seed(3)
    said = xtts.inference("an old song.", "en", **voice.arguments, max_new_tokens=30)
    torch.manual_seed(3)
    chunks = list(xtts.inference_stream("an old song.", "en", **voice.arguments, max_new_tokens=30))
    assert np.isfinite(said["wav"]).all()
    assert sum(map(len, chunks)) > 0


def test_a_file(tts_original, reference, kept):
    """Everything that was kept comes back, whatever the file is called; it is safe to read, and readable by others."""
    made, loaded = Voice.of(tts_original, reference), Voice.load(kept)
    for ours, theirs in ((loaded.latents, made.latents), (loaded.embedding, made.embedding)):
        assert torch.equal(ours, theirs)
        assert not ours.is_inference()
    assert loaded.weights == made.weights
    assert loaded.recordings == {reference.name: reference.read_bytes()}
    assert loaded.made["recordings"].keys() == {reference.name}
    assert loaded.made["settings"] == made.made["settings"]
    size = struct.unpack("<Q", kept.read_bytes()[:8])[0]
    header = json.loads(kept.read_bytes()[8 : 8 + size])
    assert header["gpt_cond_latent"]["shape"] == [1, 32, 64]
    other = kept.with_name("other")
    other.touch()
    assert kept.stat().st_mode == other.stat().st_mode  # as that of any file that one makes


def test_several_recordings(tts_original, tmp_path):
    """Of the same name, from different folders, and again from what was kept."""
    paths = [tmp_path / str(number) / "voice.wav" for number in range(2)]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        write_reference(path, seconds=2 + number)
    voice = Voice.of(tts_original, paths)
    assert list(voice.recordings) == ["0-voice.wav", "1-voice.wav"]
    theirs, _ = voice_of(tts_original.synthesizer.tts_model, speaker_wav=[str(path) for path in paths])
    assert torch.equal(voice.latents, theirs)


def test_other_weights(tts_original, other, reference, kept):
    """It is made again, as that model makes it; without recordings it is refused, by both digests."""
    voice = Voice.load(kept)
    assert voice.fits(tts_original)
    assert voice.on(tts_original) is voice
    assert not voice.fits(other)
    again = voice.on(other)
    expected, _ = voice_of(other, speaker_wav=str(reference))
    assert torch.equal(again.latents, expected)
    assert not torch.equal(again.latents, voice.latents)
    assert again.fits(other)
    forgotten = Voice.of(tts_original, reference, keep=False)
    assert forgotten.recordings == {}
    with pytest.raises(
        VoiceError, match=rf"other weights \(encoders {voice.weights[:12]}, the model has {again.weights[:12]}\)"
    ):
        forgotten.add_to(other, "ann")
    assert other.speaker_manager is None or "ann" not in other.speaker_manager.speakers


def test_what_does_not_make_a_voice_does_not_matter(xtts, kept):
    """Of the GPT's trunk, which may be trained on, voices know nothing."""
    with torch.no_grad():
        xtts.gpt.gpt.h[0].mlp.c_fc.weight *= 2
    assert Voice.load(kept).fits(xtts)


def test_a_speaker_of_the_checkpoint(tts, kept):
    """A voice as any other; it has no recordings."""
    Voice.load(kept).add_to(tts, "Claribel")
    voice = Voice.of(tts, speaker="Claribel")
    assert torch.equal(voice.latents, Voice.load(kept).latents)
    assert (voice.recordings, voice.made["speaker"]) == ({}, "Claribel")
    with pytest.raises(ValueError, match="there are: 'Claribel'"):
        Voice.of(tts, speaker="Nobody")


@pytest.mark.parametrize("arguments", [{}, {"recordings": "a.wav", "speaker": "b"}])
def test_neither_or_both(tts_original, arguments):
    with pytest.raises(ValueError, match="expected one of both"):
        Voice.of(tts_original, **arguments)


def test_no_recording(tts_original, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
        Voice.of(tts_original, tmp_path / "missing.wav")


def spoil(path, change):
    """Rewrite the manifest of a file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    manifest = json.loads(header["__metadata__"]["neuron_xtts"])
    change(manifest)
    header["__metadata__"]["neuron_xtts"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_files_that_are_no_voices(kept, tmp_path):
    """Each says so in one line, and nothing of it is used."""
    path = tmp_path / "voice.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no voice"):
        Voice.load(path)
    for content in (b"", b"RIFF nonsense", kept.read_bytes()[:-5], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(VoiceError, match=r"voice.safetensors is no voice \(.*\); expected a file of Voice.save"):
            Voice.load(path)
    for change, says in (
        (lambda manifest: manifest.update(schema=2), "schema 2; this version of neuron_xtts reads 1"),
        (lambda manifest: manifest.pop("weights"), "is no voice"),
        (lambda manifest: manifest.update(kept=["a", "b"]), "is no voice"),
        (lambda manifest: manifest.update(kept=3), "is no voice"),
    ):
        path.write_bytes(kept.read_bytes())
        spoil(path, change)
        with pytest.raises(VoiceError, match=says):
            Voice.load(path)


def test_numbers_that_are_not_finite(kept, tmp_path):
    voice = Voice.load(kept)
    voice.latents[0, 0, 0] = torch.nan
    with pytest.raises(VoiceError, match="conditioning latents that are not finite"):
        Voice.load(voice.save(tmp_path / "voice"))


def test_a_name_in_a_file_leads_nowhere(other, kept, tmp_path, monkeypatch):
    """What is unpacked stays in a folder of its own."""
    voice = Voice.load(kept)
    (content,) = voice.recordings.values()
    evil = Voice(voice.latents, voice.embedding, voice.weights, {"../../../evil.wav": content}, {})
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(VoiceError, match=r"'../../../evil.wav', which is no name of a file"):
        Voice.load(evil.save(tmp_path / "voice"))


def test_a_full_disk(kept, tmp_path, monkeypatch):
    """What was there stays, and nothing half-made is left."""
    path = tmp_path / "ann.safetensors"
    path.write_bytes(kept.read_bytes())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("neuron_xtts.voice.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        Voice.load(path).save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["ann.safetensors"]
    assert path.read_bytes() == kept.read_bytes()


@pytest.mark.parametrize("name", ["", " ", "../ann", "a/b", ".ann", "ann.", "a" * 65, "a\nb", "-"])
def test_names_that_are_none(tmp_path, name):
    folder = VoiceFolder(tmp_path)
    assert name not in folder
    with pytest.raises(ValueError, match="cannot be the name of a voice"):
        folder.path(name)


def test_a_folder(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("NEURON_XTTS_VOICES", str(tmp_path / "voices"))
    folder, voice = VoiceFolder(), Voice.load(kept)
    assert list(folder) == []
    with pytest.raises(ValueError, match=r"there is no voice 'ann' in .*; there are: none"):
        folder.load("ann")
    folder.add("Zoë Smith-2", voice)
    folder.add("ann", voice)
    assert list(folder) == ["Zoë Smith-2", "ann"]
    assert torch.equal(folder.load("ann").latents, voice.latents)
    with pytest.raises(FileExistsError, match="there is a voice 'ann' already"):
        folder.add("ann", voice)
    folder.add("ann", voice, replace=True)
    folder.remove("ann")
    assert list(folder) == ["Zoë Smith-2"]
    with pytest.raises(ValueError, match="there are: Zoë Smith-2"):
        folder.remove("ann")


def test_the_command(miniature, tmp_path, capsys):
    """Add, list and remove, with the errors that one makes."""
    checkpoint, voices = ["--checkpoint", str(miniature)], ["--voices", str(tmp_path / "voices")]

    def run(*arguments):
        status = main(["voices", *map(str, arguments), *voices])
        return (status, *capsys.readouterr())

    assert run("list")[:2] == (0, "")
    recording = miniature / "f5.wav"
    status, out, _ = run("add", "eff", recording, *checkpoint)
    assert (status, out.strip()) == (0, str(tmp_path / "voices" / "eff.safetensors"))
    assert (
        run("add", "eff", recording, *checkpoint)[2]
        == "neuron-xtts: there is a voice 'eff' already: remove it, or --replace\n"
    )
    assert run("add", "eff", recording, *checkpoint, "--replace", "--forget", "--json")[0] == 0
    assert run("add", "other", tmp_path / "none.wav", *checkpoint)[2].startswith("neuron-xtts: there is no recording")
    assert "takes recordings, FILE ..., or --speaker NAME" in run("add", "other", *checkpoint)[2]
    _, out, _ = run("list", *checkpoint)
    assert "f5.wav" in out
    assert "yes" in out
    (found,) = json.loads(run("list", "--json")[1])
    assert (found["name"], found["recordings"]) == ("eff", [])
    (tmp_path / "voices" / "broken.safetensors").write_bytes(b"nonsense")
    assert "is no voice" in run("list")[1]
    assert run("remove", "eff")[1].startswith("removed ")
    assert run("remove", "eff")[2].startswith("neuron-xtts: there is no voice 'eff'")


def test_a_file_of_another_name(kept, tmp_path):
    """Such as a browser gives what is there already: it is nobody's voice, and harms none."""
    folder = VoiceFolder(tmp_path)
    folder.add("ann", Voice.load(kept))
    (tmp_path / "ann (1).safetensors").write_bytes(folder.path("ann").read_bytes())
    assert list(folder) == ["ann"]
    assert "ann (1)" not in folder
    for name in ("ann (1)", "\U0001d49c" * 64):  # of more bytes than the name of a file may have
        with pytest.raises(ValueError, match="cannot be the name of a voice"):
            folder.path(name)


def test_several_add_one(kept, tmp_path):
    """At the same time: one of them does, and keeps it."""
    folder, voice = VoiceFolder(tmp_path / "new"), Voice.load(kept)

    def add(number):
        try:
            return folder.add("ann", voice)
        except FileExistsError:
            return None

    with ThreadPoolExecutor(8) as pool:
        added = list(pool.map(add, range(32)))
    assert len(list(filter(None, added))) == 1
    assert list(folder) == ["ann"]
