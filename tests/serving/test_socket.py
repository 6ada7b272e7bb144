"""``WS /v1/audio/speech/stream``: text word by word, audio sentence by sentence."""

import contextlib
import json
import time

import numpy as np
import pytest
from test_speech import same, samples_of, settings
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from neuron_xtts import BucketPlan
from neuron_xtts.narration.encoding import to_int16
from neuron_xtts.narration.text import Incoming, Sentence
from neuron_xtts.serving.app import UVICORN

CONFIG = {"type": "session.config", "model": "xtts-v2", "voice": "f5", "response_format": "pcm", "seed": 5}


class Client:
    """A session."""

    def __init__(self, server, **config):
        url = server.url.replace("http", "ws") + "/v1/audio/speech/stream"
        self.socket = connect(url, max_size=None)
        self.send(**(CONFIG | config))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, **message):
        self.socket.send(json.dumps(message))

    def say(self, *words):
        for word in words:
            self.send(type="input.text", text=word)

    def receive(self, timeout=60):
        message = self.socket.recv(timeout=timeout)
        return message if isinstance(message, bytes) else json.loads(message)

    def sentences(self):
        """Of one utterance: what began each, its bytes, what ended it; and the end of all."""
        found, parts = [], []
        while True:
            message = self.receive()
            if isinstance(message, bytes):
                parts.append(message)
            elif message["type"] == "audio.start":
                assert not parts
                start = message
            elif message["type"] == "audio.done":
                found.append((start, parts, message))
                parts = []
            else:
                return found, message


def spoken(server, text, seed):
    latents, embedding = server.folder.load("f5").arguments.values()
    stream = server.xtts.inference_stream(text, "en", latents, embedding, seed=seed, **settings(server.xtts))
    return to_int16(np.concatenate([chunk.numpy() for chunk in stream]))


def test_word_by_word(server):
    """A sentence is heard before the next is written; what is heard is what the library says."""
    with Client(server) as client:
        client.say("the band", " plays. ", "the fox")
        assert client.receive() == {
            "type": "audio.start", "utterance_index": 0, "sentence_index": 0, "sentence_text": "the band plays.",
            "format": "pcm", "sample_rate": 24000,
        }  # fmt: skip
        parts = []
        while isinstance(part := client.receive(), bytes):
            parts.append(part)
        assert part["type"] == "audio.done"
        assert part["total_bytes"] == sum(map(len, parts))
        assert len(parts) > 1
        client.say(" jumps.")
        client.send(type="input.done")
        ((start, more, done),), end = client.sentences()
        assert start["sentence_text"] == "the fox jumps."
        assert end["type"] == "session.done"
        assert end["total_sentences"] == 2
        assert end["output_tokens"] == pytest.approx((done["end"] - 0.25) * 22050 / 1024, abs=3)
    first = np.frombuffer(b"".join(parts), np.int16)
    second = np.frombuffer(b"".join(more), np.int16)
    # Without a chunk that is short, since others' fades lie elsewhere.
    assert len(first) == len(spoken(server, "the band plays.", 5))
    assert same(second[6000:], spoken(server, "the fox jumps.", 6))
    assert not second[:6000].any()


def test_several_utterances(server):
    """On one connection, with another voice and format, whole files in place of chunks."""
    with Client(server) as client:
        for number, (voice, name) in enumerate((("f5", "wav"), ("klatt", "flac"), ("f5", "wav"))):
            client.send(**(CONFIG | {"voice": voice, "response_format": name, "stream_audio": False}))
            client.say("a fox.")
            client.send(type="input.done")
            ((start, parts, done),), end = client.sentences()
            assert start["utterance_index"] == end["utterance_index"] == number
            (data,) = parts
            assert done["total_bytes"] == len(data)
            samples = samples_of(data, name)
            assert np.abs(samples).max() > 500
            if number == 0:
                before = samples
        assert same(samples, before)
        client.send(type="session.close")
        with pytest.raises(ConnectionClosed) as closed:
            client.receive()
        assert closed.value.rcvd.code == 1000


def test_nothing_to_say(server):
    with Client(server) as client:
        client.send(type="input.done")
        assert client.receive()["total_sentences"] == 0
        client.say("*** ")
        client.send(type="input.done")
        assert client.receive()["total_sentences"] == 0


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"type": "input.audio"}, "expected one of session.config"),
        ({"type": "session.config", "voice": "nobody"}, "There is no voice 'nobody'"),
        ({"type": "session.config", "language": "tlh"}, "language 'tlh' is not known"),
        ({"type": "input.text", "text": "a [pause:x] b. "}, "is no pause"),
        ([1], "no object"),
        ("{", "no object"),
    ],
)
def test_errors_that_end_a_session(server, message, what):
    with Client(server) as client:
        client.socket.send(message if isinstance(message, str) else json.dumps(message))
        error = client.receive()
        assert error["type"] == "error"
        assert what in error["message"]
        assert set(error["error"]) == {"message", "type", "param", "code"}
        with pytest.raises(ConnectionClosed) as closed:
            client.receive()
        assert closed.value.rcvd.code == 1008


def test_errors_that_do_not(server):
    """A field that is wrong is told, and the session goes on."""
    with Client(server) as client:
        client.send(**(CONFIG | {"speed": 100}))
        assert client.receive()["error"]["param"] == "speed"
        client.send(type="input.text", text=3)
        assert client.receive()["error"]["param"] == "text"
        client.say("a fox.")
        client.send(type="input.done")
        assert client.sentences()[1]["total_sentences"] == 1


def test_whoever_leaves_frees_their_slot(server):
    """In the middle of a sentence: by closing, by the message, by a cut."""
    for leave in ("close", "message", "cut"):
        client = Client(server)
        client.say("the quick brown fox jumps over the lazy dog and the band plays. ", "and more. ")
        client.receive()
        assert isinstance(client.receive(), bytes)
        if leave == "close":
            client.socket.close()
        elif leave == "message":
            client.send(type="input.done")
            client.send(type="session.close")
        else:
            client.socket.socket.close()
        server.wait_until_idle()
        client.socket.close()


def test_pages_of_elsewhere(server):
    """A page of another site cannot open a socket, one of this server can."""
    url = server.url.replace("http", "ws") + "/v1/audio/speech/stream"
    with connect(url, origin=server.url) as socket:
        socket.send(json.dumps({"type": "session.close"}))
    with pytest.raises(Exception, match="403"):
        connect(url, origin="https://elsewhere.example").close()


def test_more_is_said_than_is_heard(server):
    """A client that writes a book at once waits, and everybody else speaks on."""
    with Client(server, stream_audio=False) as client:
        book = " ".join(["a fox."] * 120) + " "
        client.say(book)
        with Client(server) as other:
            other.say("the band plays.")
            other.send(type="input.done")
            assert other.sentences()[1]["total_sentences"] == 1
        assert client.receive()["type"] == "audio.start"
    server.wait_until_idle()


@pytest.mark.slow
def test_a_chapter_at_once(serve):
    """Is all said, however long that takes: while sentences wait, the server hears answers to its pings."""
    pings = {"ws_ping_interval": 2, "ws_ping_timeout": 2}
    with serve(uvicorn_options=pings) as server, Client(server, stream_audio=False) as client:
        client.say(*["the fox. "] * 100)
        client.send(type="input.done")
        found, done = client.sentences()
        assert (len(found), done["total_sentences"]) == (100, 100)


@pytest.mark.slow
def test_whoever_plays_what_they_read(serve):
    """Answers no ping in the meantime, and hears all nevertheless."""
    patience = UVICORN.get("ws_ping_timeout", 20)
    pings = {"ws_ping_interval": 0.2, "ws_ping_timeout": patience and 1}
    with serve(uvicorn_options=pings) as server, Client(server) as client:
        client.say(*["the fox. "] * 10)
        client.send(type="input.done")
        client.receive()
        server.wait_until_idle(120)  # all is sent
        time.sleep(2)
        found = 0
        while (message := client.receive()) and (isinstance(message, bytes) or message["type"] != "session.done"):
            found += isinstance(message, dict) and message["type"] == "audio.done"
        assert found == 10


def test_more_than_can_wait(server):
    """Is refused, and not kept."""
    with Client(server) as client:
        with contextlib.suppress(ConnectionClosed):  # the server may close before all is sent
            client.say(*["the fox. " * 7000] * 20)
        while isinstance(message := client.receive(), bytes) or message["type"] != "error":
            pass
        assert "expected at most 1048576: send less ahead" in message["message"]
        with pytest.raises(ConnectionClosed) as closed:
            client.receive()
        assert closed.value.rcvd.code == 1008
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("no end " * 1000, "characters without an end of a sentence; expected at most 4096"),
        ("[pause:30] [pause:1] the fox. ", "Pauses of 31 s, one after another; expected at most 30 s together"),
    ],
)
def test_text_that_is_refused(server, text, what):
    with Client(server) as client:
        client.say(text)
        with contextlib.suppress(ConnectionClosed):  # the server may close before this is sent
            client.send(type="input.done")
        message = client.receive()
        assert message["type"] == "error"
        assert what in message["message"]
        with pytest.raises(ConnectionClosed):
            client.receive()


def test_blanks(server):
    """Are not kept."""
    incoming = Incoming(server.studio.reader("en"))
    assert incoming.more("the fox." + " " * 60000) == [Sentence("the fox.")]
    assert incoming.open <= 1
    with Client(server) as client:
        client.say(*["the fox." + " " * 60000] * 3)
        client.send(type="input.done")
        found, _ = client.sentences()
        assert len(found) == 3


def test_a_full_queue(serve):
    """Is an error, and an end that says when it is over."""
    with serve({"buckets": BucketPlan(slots=(1,)), "queue": 0}) as server:
        for _ in range(10):  # the first may be over already
            with Client(server) as first, Client(server) as second:
                first.say("the band plays an old song, the band plays an old song, the band plays an old song. ")
                first.receive()
                second.say("the fox. ")
                message = second.receive()
                if message["type"] == "error":
                    with pytest.raises(ConnectionClosed) as closed:
                        second.receive()
                    break
        assert message["error"]["code"] == "queue_full"
        assert closed.value.rcvd.code == 1013
