"""A server in a thread: uvicorn and the application as users start them, over a real port."""

import contextlib
import copy
import socket
import threading
import time

import httpx
import pytest
import uvicorn

import neuron_xtts
from neuron_xtts import Voice
from neuron_xtts.coqui.models import load_tts
from neuron_xtts.serving.app import UVICORN, create_app
from neuron_xtts.serving.studio import Settings
from neuron_xtts.voice import VoiceFolder

# Seconds: where other tests take the processors, httpx's 5 may be over before an answer.
for limit in ("connect", "read", "write", "pool"):
    setattr(httpx._config.DEFAULT_TIMEOUT_CONFIG, limit, 60)


class Server:
    """A running one."""

    def __init__(self, tts, folder, page=False, uvicorn_options=None, **settings):
        self.tts = tts
        self.xtts = tts.synthesizer.tts_model
        self.folder = VoiceFolder(folder)
        self.app = create_app(tts, voices=self.folder, settings=Settings(**settings), page=page)
        self.studio = self.app.state.studio
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        options = UVICORN | {"log_level": "warning"} | (uvicorn_options or {})
        self._server = uvicorn.Server(uvicorn.Config(self.app, **options))
        self._thread = threading.Thread(target=self._server.run, args=([self._listening],))

    def __enter__(self):
        self._thread.start()
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/health").status_code == 200:
                    return self
            time.sleep(0.05)
        raise TimeoutError("the server does not get ready")

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join()
        self._listening.close()

    def counts(self):
        return neuron_xtts.report(self.tts).batch

    def wait_until_idle(self, seconds=120):
        """Raise unless slots and requests are free soon."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            counts = self.counts()
            if not (counts.decoding or counts.waiting or self.studio.active):
                return
            time.sleep(0.02)
        raise AssertionError(f"{self.counts()}, {self.studio.active} requests")


@pytest.fixture(scope="session")
def miniature_tts(miniature):
    """Never patch this one: copy it."""
    return load_tts(miniature)


@pytest.fixture(scope="session")
def voices(miniature_tts, miniature, tmp_path_factory):
    """A folder of its two voices."""
    folder = VoiceFolder(tmp_path_factory.mktemp("voices"))
    for path in sorted(miniature.glob("*.wav")):
        folder.add(path.stem, Voice.of(miniature_tts, path))
    return folder


@pytest.fixture(scope="session")
def serve(miniature_tts, voices, tmp_path_factory):
    """Start a server of a model of its own."""

    @contextlib.contextmanager
    def start(patched=None, page=False, uvicorn_options=None, **settings):
        tts = copy.deepcopy(miniature_tts)
        neuron_xtts.patch(tts, **(patched or {}))
        folder = VoiceFolder(tmp_path_factory.mktemp("kept"))
        for name in voices:
            folder.add(name, voices.load(name))
        with Server(tts, folder.root, page, uvicorn_options, **settings) as server:
            yield server
        neuron_xtts.unpatch(tts)

    return start


@pytest.fixture(scope="session")
def server(serve):
    """One for tests that leave it as it was."""
    with serve() as started:
        yield started
