"""``neuron-xtts serve`` as people start it: its options, what it says of what is wrong, and how it is stopped."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from test_robust import BODY
from test_speech import same

from neuron_xtts.tools.cli import main

SHORT = BODY | {"input": "the band plays."}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextlib.contextmanager
def started(miniature, log, *arguments):
    """The address of a server in a process of its own, and the process, once it is ready."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "neuron_xtts", "serve", "--checkpoint", miniature, "--port", port, *arguments]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(miniature.parent), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + 600
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/health").status_code == 200:
                    break
            time.sleep(0.2)
        yield url, process
    finally:
        process.kill()
        process.wait()


def stopped(process, log):
    """Whether it ends by itself when it is interrupted, and says nothing that alarms."""
    process.send_signal(signal.SIGINT)
    process.wait(600)
    said = log.read_text()
    return process.returncode in (0, 130) and "Traceback" not in said


def say(url, **changes):
    """The samples of a request, and its headers."""
    headers = changes.pop("headers", {})
    answer = httpx.post(url + "/v1/audio/speech", json=SHORT | changes, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content, np.int16), answer.headers


@pytest.mark.slow
def test_options(miniature, voices, tmp_path):
    keys, log = tmp_path / "keys", tmp_path / "log"
    keys.write_text("\ufefffirst\n\n second \n")  # as editors on Windows write it
    page = "https://page.example"
    arguments = ("--voices", voices.root, "--api-key-file", keys, "--alias", "alloy=klatt", "--alias", "me=f5",
                 "--allow-origin", page, "--no-page", "--language", "de")  # fmt: skip
    with started(miniature, log, *arguments) as (url, process):
        assert httpx.get(url + "/v1/models").status_code == 401
        assert httpx.get(url + "/v1/models", headers={"authorization": "Bearer third"}).status_code == 401
        for key in ("first", "second"):
            assert httpx.get(url + "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        own = {"authorization": "Bearer second"}
        for alias, name in (("alloy", "klatt"), ("me", "f5")):
            spoken = say(url, voice=alias, headers=own)[0]
            assert len(spoken) > 5000
            assert same(spoken, say(url, voice=name, headers=own)[0])
        spoken = say(url, headers=own)[0]  # in German, which it was told, the tokens are others
        assert same(spoken, say(url, language="de", headers=own)[0])
        english = say(url, language="en", headers=own)[0]
        assert len(english) != len(spoken) or np.abs(english.astype(int) - spoken).max() > 1000
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        for origin, allowed in ((page, page), ("https://other.example", None)):
            answer = httpx.options(url + "/v1/audio/speech", headers={"origin": origin, **asked})
            assert answer.headers.get("access-control-allow-origin") == allowed
        refused = httpx.get(url + "/v1/models", headers={"origin": page})  # whose reason the page can read
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page)
        assert httpx.get(url + "/ui", headers=own).status_code == 404
        names = [voice["id"] for voice in httpx.get(url + "/v1/audio/voices", headers=own).json()["data"]]
        assert {"me", "f5", "alloy"} <= set(names)
        assert stopped(process, log), log.read_text()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--allow-origin", "page.example"], "'page.example' is not http://HOST"),
        (["--allow-origin", "http://page.example/a"], "is not http://HOST"),
        (["--root-path", "tts"], "'tts' does not begin with /"),
        (["--root-path", "/tts/"], "'/tts/' does not begin with / or ends with it"),
        (["--api-key", "secret"], "unrecognized arguments: --api-key secret"),
    ],
)
def test_options_that_are_none(capsys, arguments, error):
    """An option is its whole name: a key would be taken for a file of keys."""
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *arguments])
    assert stopped.value.code == 2
    assert error in capsys.readouterr().err


@pytest.mark.slow
def test_root_path(miniature, voices, tmp_path):
    """What a proxy passes on from a path of its own, which it takes off; and where that is, is said."""
    log = tmp_path / "log"
    with started(miniature, log, "--voices", voices.root, "--root-path", "/tts") as (url, process):
        assert f"listening at {url} for a proxy's /tts, where people have a page at /tts/ui\n" in log.read_text()
        led = httpx.get(url + "/", headers={"accept": "text/html"})
        assert (led.status_code, led.headers["location"]) == (307, "/tts/ui/")
        page = httpx.get(url + "/ui/")
        assert page.status_code == 200
        assert "/tts/ui" in page.text
        assert httpx.get(url + "/ui/theme.css").status_code == 200
        assert len(say(url)[0]) > 5000
        assert stopped(process, log), log.read_text()


@pytest.mark.slow
def test_on_ray(miniature, voices, tmp_path):
    """The application and its settings, in a replica with as many threads as it was given."""
    pytest.importorskip("ray")
    log, arguments = tmp_path / "log", ("--ray", "--replicas", 1, "--cpus", 1, "--voices", voices.root, "--no-page")
    with started(miniature, log, *arguments, "--alias", "alloy=klatt") as (url, process):
        spoken, headers = say(url, voice="alloy")
        assert headers["x-replica-threads"] == "1"
        assert len(headers.get_list("x-request-id")) == 1
        assert len(spoken) > 5000
        assert same(spoken, say(url, voice="klatt")[0])
        assert stopped(process, log), log.read_text()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--api-key-file", "EMPTY"], "has no API key; expected one a line"),
        (["--api-key-file", "NOWHERE"], "No such file"),
        (["--language", "tlh"], "language 'tlh' is not known; expected one of "),
        (["--checkpoint", "NOWHERE"], "NOWHERE has no config.json"),
        (["--checkpoint", "NOWHERE", "--ray"], "NOWHERE has no config.json"),
        (["--voices", "EMPTY"], "EMPTY is no folder of voices"),
        (["--port", "TAKEN"], "cannot be listened at: Address already in use; take another --host or --port"),
        (["--host", "nonsense.invalid"], "cannot be listened at: "),
        (["--root-path", "/tts", "--ray"], "--root-path and --ray cannot be both"),
    ],
)
def test_what_is_wrong(miniature, tmp_path, capsys, arguments, error):
    """Said in one line, before anything is served."""
    (tmp_path / "EMPTY").write_text("\n")
    taken = socket.create_server(("127.0.0.1", 0))
    words = {"EMPTY": tmp_path / "EMPTY", "NOWHERE": tmp_path / "NOWHERE", "TAKEN": taken.getsockname()[1]}
    places = [str(words.get(each, each)) for each in arguments]
    assert main(["serve", "--no-page", "--port", free_port(), "--checkpoint", str(miniature), *places]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert error in said[-1]
    assert said[-1].startswith("neuron-xtts: ")
    assert not any("Traceback" in line for line in said)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--alias", "alloy"], "'alloy' is not NAME=VOICE"),
        (["--port", "99999"], "'99999' is not a whole number from 1 to 65535"),
        (["--requests", "0"], "'0' is not a whole number from 1 on"),
        (["--grace", "-1"], "'-1' is not a whole number from 0 on"),
        (["--grace", "9" * 12], "'999999999999' is not a whole number from 0 on"),
        (["--queue", "1_0"], "'1_0' is not a whole number from 0 on"),
    ],
)
def test_wrong_arguments(capsys, arguments, error):
    with pytest.raises(SystemExit) as stop:
        main(["serve", *arguments])
    assert stop.value.code == 2
    assert error in capsys.readouterr().err


def test_keys_that_are_none(miniature, monkeypatch, capsys):
    """Whoever meant to lock the door does not leave it open."""
    monkeypatch.setenv("NEURON_XTTS_API_KEYS", " , ")
    assert main(["serve", "--no-page", "--checkpoint", str(miniature)]) == 1
    assert "which has no API key; expected some" in capsys.readouterr().err
