"""Clients that vanish, read slowly, come in crowds or send nonsense."""

import asyncio
import json
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_speech import JSON, same

from neuron_xtts import BucketPlan

LONG = "the quick brown fox jumps over the lazy dog and the band plays an old song. " * 3
BODY = {"model": "x", "voice": "f5", "input": LONG, "response_format": "pcm", "seed": 7}


def request_bytes(server, body):
    data = json.dumps(body).encode()
    head = f"POST /v1/audio/speech HTTP/1.1\r\nhost: {server.url[7:]}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def call(server, body=BODY):
    """A connection on which a request was sent, and nothing read."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(request_bytes(server, body))
    return connection


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("heard", [0, 1, 20000])
def test_a_client_that_goes(server, heard):
    """Before, at and after the first byte: its slot is free long before all would have been said."""
    connection = call(server, BODY | {"input": LONG * 4})
    wait_for(lambda: server.counts().decoding)
    if heard:
        while heard > 0:
            heard -= len(connection.recv(heard))
    steps = server.counts().steps.total()
    connection.close()
    server.wait_until_idle()
    # Of 1000 codes or so: those that were decoded ahead, and what was under way.
    assert server.counts().steps.total() - steps < 60


def test_a_slow_reader(server):
    """Whoever reads nothing is not decoded to the end, and others are served as if there were nobody."""
    connection = call(server, BODY | {"input": LONG * 5})
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    quick = BODY | {"input": "the band plays."}
    alone = httpx.post(server.url + "/v1/audio/speech", json=quick, timeout=60).content
    time.sleep(1)
    for _ in range(3):
        beside = httpx.post(server.url + "/v1/audio/speech", json=quick, timeout=60).content
        assert same(np.frombuffer(beside, np.int16), np.frombuffer(alone, np.int16))
    assert server.studio.active == 1
    connection.close()
    server.wait_until_idle()


def test_a_full_queue(serve):
    """One slot and no queue: 429, when to come again, and a client that does."""
    with serve({"buckets": BucketPlan(slots=(1,)), "queue": 0}) as server:
        first = call(server, BODY | {"input": LONG * 2})
        first.recv(1)
        # A paused stream would give its slot away, so this one is read meanwhile.
        reading = threading.Thread(target=lambda: [None for _ in iter(lambda: first.recv(2**16), b"")])
        reading.start()
        refused = []
        wait_for(lambda: refused.append(httpx.post(server.url + "/v1/audio/speech", json=BODY, timeout=60)) or
                 refused[-1].status_code == 429)  # fmt: skip
        answer = refused[-1]
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert answer.json()["error"]["code"] == "queue_full"
        first.shutdown(socket.SHUT_RDWR)
        reading.join()
        first.close()
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=2)
        heard = client.audio.speech.create(model="x", voice="f5", input="a fox.", response_format="pcm").content
        assert np.abs(np.frombuffer(heard, np.int16)).max() > 500


def test_as_many_requests_as_may_be(serve):
    with serve(requests=2) as server:
        connections = [call(server, BODY | {"input": LONG * 5}) for _ in range(2)]
        wait_for(lambda: server.studio.active == 2)
        answer = httpx.post(server.url + "/v1/audio/speech", json=BODY, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        for connection in connections:
            connection.close()
        server.wait_until_idle()


@pytest.mark.slow
def test_500_clients_that_vanish(serve):
    """At random moments, some after the whole answer; nothing is left of any: no slot, thread or file."""

    def vanish(seed):
        chance = random.Random(seed)
        body = BODY | {"input": chance.choice(("a fox.", "the band plays.", LONG)), "seed": seed}
        try:
            with call(server, body | {"response_format": chance.choice(("pcm", "mp3", "wav"))}) as connection:
                connection.settimeout(60)
                if chance.random() < 0.2:
                    time.sleep(chance.random() * 0.05)
                    return
                end = time.monotonic() + chance.random() * 0.6
                while time.monotonic() < end and connection.recv(2**16):
                    pass
        except OSError:
            pass

    with serve({"precision": "int8"}) as server:
        with ThreadPoolExecutor(24) as pool:
            list(pool.map(vanish, range(40)))
            server.wait_until_idle(60)
            time.sleep(0.5)
            before = threading.active_count(), len(os.listdir("/proc/self/fd"))
            list(pool.map(vanish, range(40, 500)))
        server.wait_until_idle(120)
        wait_for(lambda: threading.active_count() <= before[0])
        wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before[1] + 2)
        body = BODY | {"input": "the band plays."}
        answers = [httpx.post(server.url + "/v1/audio/speech", json=body, timeout=60).content for _ in range(2)]
        assert same(*(np.frombuffer(answer, np.int16) for answer in answers))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
likely = {
    "model": st.sampled_from(["x", "tts-1", ""]),
    "input": st.sampled_from(["a fox.", "[pause:1]", "a [pause:0.1] b", "\0", "\ud800", "ﷺ" * 40, "a" * 300, "1" * 90]),
    "voice": st.sampled_from(["f5", "alloy", "", "../x"]) | st.fixed_dictionaries({"id": st.just("klatt")}),
    "response_format": st.sampled_from(["mp3", "wav", "pcm", "opus", "aac", "flac", "x"]),
    "speed": st.sampled_from([0.25, 1, 4, 5, "1"]),
    "stream_format": st.sampled_from(["audio", "sse", "x"]),
    "language": st.sampled_from(["en", "de", "zh-cn", "ja", "EN_us", ""]),
    "seed": st.integers(-(2**64), 2**64),
    "temperature": st.floats(-1, 20),
    "top_k": st.integers(-1, 2000),
    "top_p": st.floats(-1, 2),
    "repetition_penalty": st.floats(-1, 200),
    "text": st.sampled_from(["a fox.", ""]),
    "speaker_wav": st.sampled_from(["f5", "x"]),
    "speaker_embedding": st.lists(st.floats(), max_size=4),
    "gpt_cond_latent": st.lists(st.lists(st.floats(), max_size=4), max_size=4),
    "name": st.text(max_size=10),
}
bodies = st.fixed_dictionaries({}, optional={name: value | anything for name, value in likely.items()}) | anything


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nonsense(server, data):
    """Whatever is sent to whatever path of the schema, it is answered, never with a failure of the server."""
    paths = server.app.openapi()["paths"]
    path = data.draw(st.sampled_from(sorted(paths)))
    method = data.draw(st.sampled_from(sorted(paths[path])))
    body = data.draw(bodies)
    content = json.dumps(body)
    if data.draw(st.integers(0, 9)) == 0:
        content = data.draw(st.binary(max_size=40))
    kind = data.draw(st.sampled_from(["application/json"] * 8 + ["text/plain", "multipart/form-data; boundary=x"]))
    names = st.sampled_from(["text", "speaker_wav", "language", "x"])
    query = data.draw(st.dictionaries(names, st.sampled_from(["a fox.", "f5", "en", "", "\0"]), max_size=4))
    url = server.url + path.replace("{name}", data.draw(st.sampled_from(["tts-1", "x", "%00"])))
    answer = httpx.request(method, url, params=query, content=content, headers={"content-type": kind}, timeout=60)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.slow
def test_nonsense_over_sockets(server):
    """Messages of any kind end a session at most; the server speaks on."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    url = server.url.replace("http", "ws") + "/v1/audio/speech/stream"

    ends = set()
    others = anything.filter(lambda kind: kind != "session.close")
    kinds = st.sampled_from(["session.config", "input.text", "input.done", "x"]) | others

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(kinds, max_size=5), bodies)
    def send(sent, body):
        with connect(url) as client:
            try:
                for kind in sent:
                    message = {**body, "type": kind} if isinstance(body, dict) else kind
                    client.send(json.dumps(message))
                    client.recv(timeout=0.05)
            except TimeoutError:
                pass
            except ConnectionClosed as closed:
                ends.add(closed.rcvd.code if closed.rcvd else None)

    send()
    assert ends == {1008}
    server.wait_until_idle(60)
    answer = httpx.post(server.url + "/v1/audio/speech", json=BODY | {"input": "a fox."}, headers=JSON, timeout=60)
    assert answer.status_code == 200


def test_stopping_with_clients(serve):
    """A server that stops while it speaks leaves no thread behind."""
    before = threading.active_count()

    async def read(url):
        speech = url + "/v1/audio/speech"
        async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", speech, json=BODY) as answer:
            async for _ in answer.aiter_bytes():
                return

    with serve() as server:
        asyncio.run(read(server.url))
        connection = call(server)
        connection.recv(1)
        threading.Timer(1, connection.close).start()
    wait_for(lambda: threading.active_count() <= before)
