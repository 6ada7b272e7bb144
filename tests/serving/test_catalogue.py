"""Models, voices, health, figures, keys; and the calls of servers that are no longer maintained."""

import asyncio
import contextlib
import copy
import io
import re
import struct
import subprocess
import sys
import wave
from pathlib import Path

import av
import httpx
import numpy as np
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from test_speech import JSON, alike, same, samples_of, settings
from torchaudio.functional import resample

import neuron_xtts
from neuron_xtts.coqui.recordings import write_reference
from neuron_xtts.narration.encoding import to_int16
from neuron_xtts.serving import decoder
from neuron_xtts.serving.app import create_app
from neuron_xtts.serving.recordings import as_wav
from neuron_xtts.serving.studio import Settings
from neuron_xtts.tools.cli import main
from neuron_xtts.voice import VoiceFolder


def test_models(server):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    models = client.models.list().data
    assert [model.id for model in models][:2] == ["xtts-v2", "tts-1"]
    assert {(model.object, model.owned_by) for model in models} == {("model", "neuron_xtts")}
    assert client.models.retrieve("tts-1").id == "tts-1"
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-9'"):
        client.models.retrieve("gpt-9")
    assert httpx.get(server.url + "/v1/audio/models").json()["models"][0]["id"] == "xtts-v2"
    voices = httpx.get(server.url + "/v1/audio/voices", params={"aliases": False}).json()["data"]
    assert [voice["id"] for voice in voices] == server.studio.voices()


def test_voices(serve, miniature):
    """Listed, added, spoken with at once, refused twice."""
    with serve() as server:
        url = server.url + "/v1/audio/voices"

        def names():
            return [voice["id"] for voice in httpx.get(url).json()["data"]]

        assert names()[:2] == ["f5", "klatt"]
        recording = (miniature / "f5.wav").read_bytes()
        form, files = {"name": "ann", "consent": "cons_1"}, {"audio_sample": ("../a.wav", recording, "audio/wav")}
        made = httpx.post(url, data=form, files=files, timeout=60)
        assert made.status_code == 200
        assert (made.json()["object"], made.json()["name"]) == ("audio.voice", "ann")
        assert names()[:3] == ["ann", "f5", "klatt"]
        body = {"model": "x", "input": "a fox.", "response_format": "pcm", "seed": 7}
        heard = [
            httpx.post(server.url + "/v1/audio/speech", json=body | {"voice": voice}, timeout=60).content
            for voice in ("ann", "f5")
        ]
        assert same(*(np.frombuffer(data, np.int16) for data in heard))
        again = httpx.post(url, data={"name": "ann"}, files={"audio_sample": recording}, timeout=60)
        assert (again.status_code, again.json()["error"]["param"]) == (409, "name")
        noise = httpx.post(url, data={"name": "bob"}, files={"audio_sample": b"no audio"}, timeout=60)
        assert (noise.status_code, noise.json()["error"]["param"]) == (400, "audio_sample")
        evil = httpx.post(url, data={"name": "../../etc/bob"}, files={"audio_sample": recording}, timeout=60)
        assert (evil.status_code, evil.json()["error"]["param"]) == (400, "name")
        lacking = httpx.post(url, data={"name": "bob"})
        assert (lacking.status_code, lacking.json()["error"]["param"]) == (400, "audio_sample")
        for answer in (again, noise, evil, lacking):
            assert str(server.folder.root) not in answer.text
            assert "/tmp" not in answer.text
        assert names()[:3] == ["ann", "f5", "klatt"]
        # A voice whose file is broken, and one that goes.
        server.folder.path("klatt").write_bytes(b"nothing")
        broken = httpx.post(server.url + "/v1/audio/speech", json=body | {"voice": "klatt"}, timeout=60)
        assert broken.status_code == 400
        assert str(server.folder.root) not in broken.text
        server.folder.remove("ann")
        gone = httpx.post(server.url + "/v1/audio/speech", json=body | {"voice": "ann"}, timeout=60)
        assert gone.json()["error"]["code"] == "voice_not_found"


PLAYLIST = "#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10.0,\n{}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("before", [b"", b"ID3\4\0\0\0\0\0\0", b"ID3\4\0\0\0\0\0\1\0", b"\xff\xfb\x90\0", b"OggS"])
@pytest.mark.parametrize("ending", ["m3u8", "wav", "mp4"])
def test_a_recording_that_names_other_files(server, miniature, before, ending):
    """Is none: FFmpeg would read the files of this machine that a playlist names."""
    path = miniature / "f5.wav"
    data = before + PLAYLIST.format(path.as_uri()).encode()
    with pytest.raises(ValueError, match="it "):
        as_wav(data)
    files = {"audio_sample": (f"x.{ending}", data)}
    answer = httpx.post(server.url + "/v1/audio/voices", data={"name": "x"}, files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "audio_sample")
    assert "x" not in server.folder


def encoded(samples, rate, container, codec, **options):
    """A file of one channel, or of as many as there are rows of samples."""
    sent = io.BytesIO()
    with av.open(sent, "w", format=container, **options) as out:
        layout = "stereo" if len(samples) == 2 else "mono"
        stream = out.add_stream(codec, rate=48000 if codec == "libopus" else rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T.reshape(1, -1)), "s16", layout)
        frame.rate = rate
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return sent.getvalue()


def decoded(data):
    with wave.open(io.BytesIO(as_wav(data))) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        return np.frombuffer(file.readframes(10**9), np.int16), file.getframerate()


@pytest.fixture(scope="module")
def recorded(miniature):
    """Its samples (N,), and their rate."""
    with wave.open(str(miniature / "f5.wav")) as file:
        return np.frombuffer(file.readframes(10**9), np.int16), file.getframerate()


@pytest.mark.parametrize(
    ("container", "codec"),
    [("wav", "pcm_s16le"), ("w64", "pcm_s16le"), ("caf", "pcm_s16le"), ("aiff", "pcm_s16be"), ("flac", "flac"),
     ("ogg", "libopus"), ("webm", "libopus"), ("mp4", "aac"), ("adts", "aac"), ("mp3", "libmp3lame")],
)  # fmt: skip
def test_recordings(recorded, container, codec):
    """What is kept of one that a client sends is what it holds: exactly, or as its format rounds it."""
    samples, rate = recorded
    sent = encoded(samples[None], rate, container, codec)
    for data in (sent, b"ID3\4\0\0\0\0\0\5xxxxx" + sent):
        found, found_rate = decoded(data)
        if "pcm" in codec or codec == "flac":
            np.testing.assert_array_equal(found, samples)
        assert len(found) / found_rate == pytest.approx(len(samples) / rate, abs=0.2)
        found = resample(torch.from_numpy(found.astype(np.float32)), found_rate, rate).numpy()
        assert alike(found, samples) > 0.9
    for size in (60, len(sent) // 2):  # one that is cut off is short, or refused
        with contextlib.suppress(ValueError):
            found, found_rate = decoded(sent[:size])
            assert len(found) / found_rate < len(samples) / rate


def test_odd_recordings(recorded, monkeypatch):
    samples, rate = recorded
    stereo = np.stack([samples, -samples])
    assert np.abs(decoded(encoded(stereo, rate, "wav", "pcm_s16le"))[0]).max() <= 1
    assert decoded(encoded(np.repeat(samples, 4)[None], 4 * rate, "wav", "pcm_s16le"))[1] == 48000
    own = bytearray(encoded(samples[None], rate, "wav", "pcm_s16le"))
    own[20:22] = b"\x77\x77"  # a codec that there is not
    latin = b"LIST\x0e\0\0\0INFOIART\x02\0\0\0\xe9\0"
    for data, says in ((b"", "as no audio file does"), (bytes(own), "no audio that can be decoded")):
        with pytest.raises(ValueError, match=says):
            as_wav(data)
    plain = encoded(samples[None], rate, "wav", "pcm_s16le")
    assert len(decoded(plain[:36] + latin + plain[36:])[0])
    monkeypatch.setattr(decoder, "_LONGEST", 1)
    assert len(decoder.decode(plain)[1]) == 2 * rate


def test_a_recording_that_claims_more_than_there_is_memory(recorded):
    """648 bytes of M4A can have eighty million pieces, of which FFmpeg makes a list of 3 GB."""
    data = bytearray(encoded(recorded[0][None], recorded[1], "mp4", "aac"))
    sizes, chunks = data.index(b"stsz") + 8, data.index(b"stsc") + 16
    data[sizes : sizes + 8] = struct.pack(">II", 1, 80_000_000)
    data[chunks : chunks + 4] = struct.pack(">I", 80_000_000)
    with contextlib.suppress(ValueError):
        assert not len(decoded(bytes(data))[0])
    program = Path(decoder.__file__).read_text()
    program = program.replace("sys.exit(main())", "main(); sys.stderr.write(open('/proc/self/status').read())")
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, timeout=300)
    assert int(re.search(rb"VmPeak:\s*(\d+) kB", done.stderr)[1]) <= 2**19


def test_a_recording_that_is_too_short(server, tmp_path, capsys):
    write_reference(path := tmp_path / "short.wav", seconds=0.2)
    files = {"audio_sample": path.read_bytes()}
    answer = httpx.post(server.url + "/v1/audio/voices", data={"name": "short"}, files=files)
    assert answer.status_code == 400
    assert "of 0.33 s at least" in answer.json()["error"]["message"]
    assert main(["voices", "add", "short", str(path), "--voices", str(tmp_path)]) == 1
    assert "short.wav is 0.20 s long; expected at least 0.33 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("headers", "welcome"),
    [
        ({}, True),
        ({"origin": "http://HERE"}, True),
        ({"origin": "https://tts.example", "sec-fetch-site": "same-origin"}, True),  # by a proxy of another name
        ({"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, True),  # a bookmark
        ({"referer": "http://HERE/ui/"}, True),
        ({"origin": "https://friend.example", "sec-fetch-site": "cross-site"}, True),
        ({"referer": "https://friend.example/a/b", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, True),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "audio"}, True),  # a friend's
        ({"origin": "https://evil.example"}, False),
        ({"origin": "http://[::1"}, False),
        ({"referer": "https://evil.example/"}, False),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}, False),
        ({"origin": "null", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, False),  # a form
        ({"referer": "https://evil.example/", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False),
    ],
)
def test_pages_of_elsewhere(serve_friend, headers, welcome):
    """Browsers send their forms, and play sounds, without asking this server first."""
    headers = {name: value.replace("HERE", serve_friend.url[7:]) for name, value in headers.items()}
    form = {"data": {"name": "../x"}, "files": {"audio_sample": b"x"}}
    answer = httpx.post(serve_friend.url + "/v1/audio/voices", headers=headers, **form)
    assert answer.status_code == (400 if welcome else 403)
    answer = httpx.get(serve_friend.url + "/tts_stream", params={"text": "*", "speaker_wav": "nobody"}, headers=headers)
    assert answer.status_code == (400 if welcome else 403)
    if "origin" not in headers:  # who follows a link comes from elsewhere
        assert httpx.get(serve_friend.url + "/", headers=headers).status_code == 200


@pytest.fixture(scope="module")
def serve_friend(serve):
    with serve(origins=("https://friend.example",)) as started:
        yield started


def test_no_uploads(serve):
    with serve(uploads=False) as server:
        answer = httpx.post(server.url + "/v1/audio/voices", data={"name": "a"}, files={"audio_sample": b"x"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")


def test_keys(serve):
    """Whoever has none gets nothing, but whether the server is there."""
    with serve(keys=("secret", "other")) as server:
        for path in ("/", "/v1/models", "/metrics", "/docs", "/nowhere"):
            answer = httpx.get(server.url + path)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert httpx.get(server.url + path, headers={"authorization": "Bearer secre"}).status_code == 401
            assert httpx.get(server.url + path, headers={"authorization": "Basic secret"}).status_code == 401
        assert httpx.get(server.url + "/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url + "/v1", api_key="wrong").models.list()
        for key in ("secret", "other"):
            assert openai.OpenAI(base_url=server.url + "/v1", api_key=key).models.list().data


def test_health(miniature_tts, voices):
    """Not ready before it has spoken; ready without any voice, too."""
    tts = copy.deepcopy(miniature_tts)
    with pytest.raises(ValueError, match="not patched"):
        create_app(tts, voices=voices)
    neuron_xtts.patch(tts)
    app = create_app(tts, voices=VoiceFolder(voices.root / "none"))

    async def look():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            before = await client.get("/health")
            await app.state.studio.warm_up()
            return before, await client.get("/health"), await client.get("/v1/audio/voices")

    before, after, listed = asyncio.run(look())
    assert (before.status_code, before.json()) == (503, {"status": "starting"})
    assert (after.status_code, after.json()) == (200, {"status": "ok"})
    assert listed.json()["data"] == []


def test_below_a_path(miniature_tts, voices):
    """Behind a proxy that has it at a path of its own, what holds for paths holds there."""
    tts = copy.deepcopy(miniature_tts)
    neuron_xtts.patch(tts)
    app = create_app(tts, voices=voices, settings=Settings(keys=("secret",)), page=True)

    async def ask():
        transport = httpx.ASGITransport(app=app, root_path="/tts")
        key = {"authorization": "Bearer secret"}
        async with httpx.AsyncClient(transport=transport, base_url="http://x/tts") as client:
            yield await client.get("/health"), 503, "starting"
            yield await client.get("/v1/models"), 401, "The API key is missing"
            yield await client.get("/v1/models", headers=key), 200, "xtts-v2"
            large = {"audio_sample": bytes(2 << 20)}
            yield (
                await client.post("/v1/audio/voices", data={"name": "a"}, files=large, headers=key), 400,
                "cannot be read as a recording",
            )  # fmt: skip
            yield (
                await client.post("/ui/gradio_api/upload", files={"files": b"x"}, headers=key),
                403,
                "That is no part of the page",
            )

    async def check():
        async for answer, status, says in ask():
            assert answer.status_code == status, answer.text
            assert says in answer.text

    asyncio.run(check())


def test_metrics(server):
    def figures():
        text = httpx.get(server.url + "/metrics").text
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = figures()
    body = {"model": "x", "voice": "f5", "input": "a fox.", "response_format": "pcm"}
    heard = httpx.post(server.url + "/v1/audio/speech", json=body, timeout=60).content
    httpx.get(server.url + "/made/up")
    server.wait_until_idle()
    after = figures()

    def more(*key):
        return after[key] - before.get(key, 0)

    assert more("neuron_xtts_ttfa_seconds_count") == 1
    assert more("neuron_xtts_rtf_count") == 1
    assert more("neuron_xtts_audio_seconds_total") == pytest.approx(len(heard) / 2 / 24000)
    assert more("neuron_xtts_requests_total", "/v1/audio/speech", "200") == 1
    assert more("neuron_xtts_requests_total", "other", "404") == 1
    assert more("neuron_xtts_calls_total") == 1
    assert after["neuron_xtts_slots",] == 16
    assert after["neuron_xtts_ready",] == 1
    assert after["neuron_xtts_active_requests",] == 0
    assert any(key[0] == "neuron_xtts_graph_runs_total" and "vocoder" in key for key in after)


def test_fallbacks_are_counted(serve, monkeypatch):
    with serve() as server:
        monkeypatch.setenv("NEURON_XTTS_DISABLE", "1")
        body = {"model": "x", "voice": "f5", "input": "a fox.", "response_format": "pcm"}
        assert httpx.post(server.url + "/v1/audio/speech", json=body, timeout=60).status_code == 200
        text = httpx.get(server.url + "/metrics").text
    found = re.search(
        r'neuron_xtts_fallbacks_total\{reason="NEURON_XTTS_DISABLE is set",route="GPT.get_generator"\} (\S+)', text
    )
    assert float(found[1]) == 1


def spoken(server, text):
    latents, embedding = server.folder.load("f5").arguments.values()
    stream = server.xtts.inference_stream(text, "en", latents, embedding, seed=7, **settings(server.xtts))
    return to_int16(np.concatenate([chunk.numpy() for chunk in stream]))


def test_a_voice_of_numbers(serve, miniature):
    """xtts-streaming-server's clients fetch a voice and send it with every text."""
    with serve() as server:
        server.folder.load("f5").add_to(server.tts, "Ana Florence")
        speakers = httpx.get(server.url + "/studio_speakers").json()
        assert list(speakers) == ["Ana Florence"]
        body = {"text": "a fox.", "language": "en", "add_wav_header": False, "stream_chunk_size": "20", "seed": 7}
        answer = httpx.post(server.url + "/tts_stream", json=body | speakers["Ana Florence"], timeout=60)
        assert answer.status_code == 200
        found, expected = np.frombuffer(answer.content, np.int16), spoken(server, "a fox.")
        assert abs(len(found) - len(expected)) < 8000  # its numbers are in fp16, and the last codes may differ
        odd = body | speakers["Ana Florence"] | {"gpt_cond_latent": [[1.0]]}
        wrong = httpx.post(server.url + "/tts_stream", json=odd)
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "gpt_cond_latent")
        assert "en" in httpx.get(server.url + "/languages").json()


def test_silly_tavern(server):
    """Its xtts provider: speakers by name, a stream by GET, whole files by POST, settings that it sends first."""
    assert httpx.post(server.url + "/set_tts_settings", json={"speed": 1, "stream_chunk_size": 100}).status_code == 200
    speakers = httpx.get(server.url + "/speakers").json()
    assert [(speaker["name"], speaker["voice_id"]) for speaker in speakers] == [("f5", "f5"), ("klatt", "klatt")]
    query = {"text": "a fox.", "speaker_wav": "f5", "language": "en"}
    for path in ("/tts_stream/", "/tts_stream"):
        streamed = httpx.get(server.url + path, params=query, timeout=60)
        assert streamed.headers["content-type"] == "audio/wav"
        assert np.abs(samples_of(streamed.content, "wav")).max() > 500
    whole = httpx.post(server.url + "/tts_to_audio/", json=query, timeout=60)
    assert np.abs(samples_of(whole.content, "wav")).max() > 500


PCM = {"model": "tts-1", "input": "a fox.", "response_format": "pcm"}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        # LiveKit: events for any model that is not one of the two oldest, and audio for those.
        (PCM | {"model": "gpt-4o-mini-tts", "voice": "ash", "speed": 1.0, "stream_format": "sse"}, "text/event-stream"),
        (PCM | {"voice": "ash", "speed": 1.0, "response_format": "mp3"}, "audio/mpeg"),
        # Pipecat: 24 kHz samples, one of OpenAI's names.
        (PCM | {"model": "gpt-4o-mini-tts", "voice": "alloy", "instructions": ""}, "audio/pcm"),
        # Open WebUI: no format, which is mp3.
        ({"model": "tts-1", "input": "a fox.", "voice": "f5"}, "audio/mpeg"),
        # wyoming_openai.
        (PCM | {"voice": "f5", "response_format": "wav", "speed": 1.0, "instructions": None}, "audio/wav"),
    ],
)
def test_what_apps_send(server, body, kind):
    """The bodies that LiveKit, Pipecat, Open WebUI and wyoming_openai make."""
    given = {name: value for name, value in body.items() if value is not None}
    answer = httpx.post(server.url + "/v1/audio/speech", json=given, headers=JSON, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["content-type"].partition(";")[0] == kind
    assert len(answer.content) > 2000


def test_before_apps_speak(server):
    """What they probe first: ``GET /``, health, and voices as Open WebUI reads them."""
    assert httpx.get(server.url + "/").json()["name"] == "neuron_xtts"
    assert httpx.get(server.url + "/health").status_code == 200
    voices = httpx.get(server.url + "/v1/audio/voices").json()["voices"]
    assert {"f5": "f5", "alloy": "alloy"}.items() <= {voice["id"]: voice["name"] for voice in voices}.items()


def test_three_at_once(server):
    """As wyoming_openai sends the sentences of one utterance, read in bits of 2048 bytes."""
    from concurrent.futures import ThreadPoolExecutor

    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")

    def say(text):
        with client.audio.speech.with_streaming_response.create(
            model="tts-1", voice="f5", input=text, response_format="wav", extra_body={"seed": 7}
        ) as answer:
            return samples_of(b"".join(answer.iter_bytes(2048)), "wav")

    texts = ["the band plays.", "a fox jumps.", "the dog is lazy."]
    with ThreadPoolExecutor(3) as pool:
        for text, heard in zip(texts, pool.map(say, texts), strict=True):
            assert same(heard, spoken(server, text))
