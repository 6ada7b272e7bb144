"""``POST /v1/audio/speech`` by the official client, over a real port."""

import asyncio
import base64
import io
import json
import threading
import wave

import av
import httpx
import numpy as np
import openai
import pytest

from neuron_xtts.decoding.batch import Batch
from neuron_xtts.narration.encoding import FORMATS, to_int16

JSON = {"content-type": "application/json"}
TEXT = "the brown fox jumps over the dog."


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(server):
    """What coqui-tts's own stream of the same model says, as 16-bit samples."""
    latents, embedding = server.folder.load("f5").arguments.values()
    chunks = server.xtts.inference_stream(TEXT, "en", latents, embedding, seed=7, **settings(server.xtts))
    return to_int16(np.concatenate([chunk.numpy() for chunk in chunks]))


def settings(xtts):
    names = ("temperature", "length_penalty", "repetition_penalty", "top_k", "top_p")
    return {name: xtts.config[name] for name in names}


def samples_of(data, name):
    """The samples of a file, decoded by what did not encode it where there is such a thing."""
    if name == "pcm":
        return np.frombuffer(data, np.int16)
    if name == "wav":
        with wave.open(io.BytesIO(data)) as file:
            assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24000)
            return np.frombuffer(data[44:], np.int16)
    with av.open(io.BytesIO(data)) as container:
        resampler = av.AudioResampler("s16", "mono", 24000)
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    return np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])


def same(found, expected):
    """Whether samples differ by no more than the rounding of a window that was longer or shorter."""
    return len(found) == len(expected) and np.abs(found.astype(int) - expected).max() <= 1


def alike(found, expected, most=3000):
    """Correlation of two signals, of which one may be later by so many samples."""
    size = 1 << (len(found) + len(expected)).bit_length()
    a, b = (np.fft.rfft(x.astype(float) / np.linalg.norm(x.astype(float)), size) for x in (found, expected))
    return np.fft.irfft(a * b.conj(), size)[: most + 1].max()


@pytest.mark.parametrize("name", FORMATS)
def test_format(client, expected, name):
    """All six; what is not lossy is what the library itself says with that seed."""
    answer = client.audio.speech.create(
        model="tts-1", voice="f5", input=TEXT, response_format=name, extra_body={"seed": 7}
    )
    assert answer.response.headers["content-type"].partition(";")[0] == FORMATS[name].media_type
    assert answer.response.headers["transfer-encoding"] == "chunked"
    found = samples_of(answer.content, name)
    if name in ("wav", "pcm", "flac"):
        assert same(found, expected)
    else:
        assert -50 < len(found) - len(expected) < 4000
        assert alike(found, expected) > 0.95


def test_it_is_sent_as_it_is_made(server, client, expected, monkeypatch):
    """The first bytes come while the rest is not there yet."""
    before = server.counts().steps.total()
    real, heard = Batch.step, threading.Event()

    def step(*arguments):  # the rest waits until the head was heard
        return (server.counts().steps.total() - before < 40 or heard.wait(60)) and real(*arguments)

    monkeypatch.setattr(Batch, "step", step)
    with client.audio.speech.with_streaming_response.create(
        model="tts-1", voice="f5", input=TEXT, response_format="pcm", extra_body={"seed": 7}
    ) as answer:
        parts = answer.iter_bytes()
        head = next(parts)
        steps = server.counts().steps.total() - before
        heard.set()
        whole = head + b"".join(parts)
    assert len(head) < len(whole) / 2
    assert steps < (len(whole) / 2 / 24000) * 22050 / 1024
    assert same(np.frombuffer(whole, np.int16), expected)


def test_async_client(server, expected):
    asyncio.run(speak_together(server, expected))


async def speak_together(server, expected):
    client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)

    async def say(seed):
        async with client.audio.speech.with_streaming_response.create(
            model="tts-1", voice="f5", input=TEXT, response_format="pcm", extra_body={"seed": seed}
        ) as answer:
            return b"".join([part async for part in answer.iter_bytes()])

    heard = await asyncio.gather(*map(say, (7, 8, 7, 9)))
    first, other, again, _ = (np.frombuffer(data, np.int16) for data in heard)
    assert same(first, expected)
    assert same(again, expected)
    assert not same(other, expected)


def test_events(server, expected):
    """Of ``stream_format: sse``: deltas that are a file, real counts, and when each sentence is heard."""
    body = {"model": "gpt-4o-mini-tts", "voice": {"id": "f5"}, "input": TEXT, "seed": 7}
    body |= {"stream_format": "sse", "response_format": "pcm", "instructions": "whisper", "unknown": [1]}
    answer = httpx.post(server.url + "/v1/audio/speech", json=body, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    assert [event["type"] for event in events[:-1]] == ["speech.audio.delta"] * (len(events) - 1)
    assert len(events) > 3
    audio = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert same(np.frombuffer(audio, np.int16), expected)
    done = events[-1]
    codes = len(expected) * 22050 / 24000 / 1024
    assert done["type"] == "speech.audio.done"
    assert done["usage"]["output_tokens"] == pytest.approx(codes, abs=1.5)
    assert done["usage"]["input_tokens"] == server.studio.reader("en").tokens(TEXT)
    assert done["usage"]["total_tokens"] == done["usage"]["input_tokens"] + done["usage"]["output_tokens"]
    assert done["sentences"] == [{"text": TEXT, "start": 0.0, "end": pytest.approx(len(expected) / 24000, abs=1e-3)}]


def test_sentences_and_pauses(server):
    """Sentences are as the library says them, with seeds of their own, and there is silence where it was asked for."""
    text = "the band plays. [pause:0.5] the fox jumps."
    body = {"model": "x", "voice": "f5", "input": text, "seed": 3, "response_format": "pcm", "stream_format": "sse"}
    answer = httpx.post(server.url + "/v1/audio/speech", json=body, timeout=60)
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    audio = np.frombuffer(b"".join(base64.b64decode(event["audio"]) for event in events[:-1]), np.int16)
    latents, embedding = server.folder.load("f5").arguments.values()
    parts = []
    for number, sentence in enumerate(("the band plays.", "the fox jumps.")):
        stream = server.xtts.inference_stream(
            sentence, "en", latents, embedding, seed=3 + number, **settings(server.xtts)
        )
        parts.append(to_int16(np.concatenate([chunk.numpy() for chunk in stream])))
    assert same(audio, np.concatenate([parts[0], np.zeros(12000, np.int16), parts[1]]))
    first, second = events[-1]["sentences"]
    assert second["start"] == pytest.approx(first["end"] + 0.5, abs=1e-3)


def test_many_pauses(server, client):
    """Each may be long, and there may be many; but not one after another without a word between them."""
    spoken = {"model": "x", "voice": "f5", "response_format": "pcm", "extra_body": {"seed": 3}}
    long = client.audio.speech.create(input="[pause:30] the fox. [pause:29.5]" + " [pause:0.125]" * 4, **spoken)
    samples = np.frombuffer(long.content, np.int16)
    assert not samples[: 30 * 24000].any()
    assert not samples[-30 * 24000 :].any()
    alone = np.frombuffer(client.audio.speech.create(input="the fox.", **spoken).content, np.int16)
    assert same(samples[30 * 24000 : -30 * 24000], alone)
    with pytest.raises(openai.BadRequestError, match="Pauses of 40 s, one after another; expected at most 30 s"):
        client.audio.speech.create(input="the fox. " + "[pause:10] " * 4, **spoken)


def test_speed(server, client, expected):
    fast = client.audio.speech.create(
        model="x", voice="f5", input=TEXT, response_format="pcm", speed=2.0, extra_body={"seed": 7}
    )
    assert len(fast.content) / 2 == pytest.approx(len(expected) / 2, rel=0.05)


def test_aliases(client, server):
    """OpenAI's thirteen names are voices of this server."""
    names = {voice["id"] for voice in httpx.get(server.url + "/v1/audio/voices").json()["voices"]}
    assert {"alloy", "ash", "ballad", "coral", "echo", "fable", "onyx", "nova", "sage", "shimmer", "verse"} < names
    heard = {}
    for name in ("alloy", "ash", "ballad"):
        answer = client.audio.speech.create(
            model="x", voice=name, input="a fox.", response_format="pcm", extra_body={"seed": 7}
        )
        heard[name] = np.frombuffer(answer.content, np.int16)
    assert same(heard["alloy"], heard["ballad"])  # two voices, in turn
    assert not same(heard["alloy"], heard["ash"])


WRONG = [
    ({"voice": "nobody"}, "voice", "voice_not_found"),
    ({"input": ""}, "input", None),
    ({"input": "***"}, "input", None),
    ({"input": "a [pause:x] b"}, "input", None),
    ({"input": "a " * 3000}, "input", None),
    ({"language": "tlh"}, "language", None),
    ({"speed": 9}, "speed", "invalid_value"),
    ({"speed": float("nan")}, "speed", "invalid_value"),
    ({"response_format": "midi"}, "response_format", "invalid_value"),
    ({"voice": 3}, "voice", "invalid_value"),
    ({"temperature": 1e-40}, "temperature", "invalid_value"),
    ({"seed": 2**70}, "seed", "invalid_value"),
    ({"voice": "\ud800"}, "voice", "voice_not_found"),
]


@pytest.mark.parametrize(("change", "param", "code"), WRONG)
def test_wrong_requests(server, change, param, code):
    body = {"model": "x", "voice": "f5", "input": "a fox."} | change
    answer = httpx.post(server.url + "/v1/audio/speech", content=json.dumps(body), headers=JSON, timeout=60)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert code is None or error["code"] == code


def test_half_a_character(server):
    body = r'{"model":"x","voice":"f5","input":"a \ud83d fox"}'
    answer = httpx.post(server.url + "/v1/audio/speech", content=body, headers=JSON, timeout=60)
    assert answer.status_code == 200


def test_errors_of_http(server):
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/audio/speech", 405)):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    broken = httpx.post(server.url + "/v1/audio/speech", content=b"{", headers=JSON)
    assert broken.status_code == 400
    huge = httpx.post(server.url + "/v1/audio/speech", content=b" " * 2**21, headers=JSON)
    assert huge.status_code == 413
    chunked = httpx.post(server.url + "/v1/audio/speech", content=iter([b" " * 2**20] * 2), headers=JSON)
    assert chunked.status_code == 413
    with pytest.raises(openai.BadRequestError, match="There is no voice 'nobody'; there are 'f5', 'klatt'"):
        openai.OpenAI(base_url=server.url + "/v1", api_key="x").audio.speech.create(
            model="x", voice="nobody", input="a"
        )


def test_request_ids(server):
    mine = httpx.get(server.url + "/v1/models", headers={"x-request-id": "mine-1"})
    assert mine.headers["x-request-id"] == "mine-1"
    made = {httpx.get(server.url + path).headers["x-request-id"] for path in ("/nowhere", "/health")}
    assert len(made) == 2
    bad = httpx.get(server.url + "/health", headers={"x-request-id": "a b\tc"})
    assert bad.headers["x-request-id"] not in ("a b\tc", "")
