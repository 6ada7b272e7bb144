"""On a local Ray: two replicas, their threads, one that dies in the middle, clients that vanish, a crowd."""

import contextlib
import inspect
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from test_robust import BODY, request_bytes
from test_speech import same

import neuron_xtts
from neuron_xtts.voice import Voice, VoiceFolder

pytestmark = pytest.mark.slow
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is to be asked of anybody
ray = pytest.importorskip("ray")

SHORT = BODY | {"input": "the band plays."}


@pytest.fixture(scope="module")
def url(miniature, miniature_tts, tmp_path_factory):
    """Two replicas of two threads, on a cluster of this machine that is said to have four processors."""
    from ray import serve

    from neuron_xtts.serving.ray import Cluster, app

    folder = VoiceFolder(tmp_path_factory.mktemp("voices"))
    folder.add("f5", Voice.of(miniature_tts, miniature / "f5.wav"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(miniature.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"env_vars": {"PYTHONPATH": paths, "OMP_WAIT_POLICY": "PASSIVE"}}
    ray.init(
        num_cpus=4, include_dashboard=False, runtime_env=environment, log_to_driver=False, object_store_memory=10**8
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    cluster = Cluster(checkpoint=miniature, voices=folder.root, replicas=2, cpus=2, requests=6, waiting=12)
    serve.run(app(cluster))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def expected(miniature_tts, miniature):
    """What the library says."""
    import copy

    tts = copy.deepcopy(miniature_tts)
    neuron_xtts.patch(tts)
    voice = Voice.of(tts, miniature / "f5.wav").arguments
    names = ("temperature", "length_penalty", "repetition_penalty", "top_k", "top_p")
    xtts = tts.synthesizer.tts_model
    options = {name: xtts.config[name] for name in names}
    stream = xtts.inference_stream("the band plays.", "en", *voice.values(), seed=7, **options)
    return (np.concatenate([chunk.numpy() for chunk in stream]) * 32767).astype(np.int16)


def say(url, body=SHORT):
    return httpx.post(url + "/v1/audio/speech", json=body, timeout=120)


def processes():
    """Of the replicas that this process began, as the operating system lists them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if path.read_bytes().startswith(b"ray::ServeReplica:default:xtts") and ours(path.parent):
                found.add(int(path.parent.name))
    return found


def ours(process):
    """Whether a process descends from this one: other tests may have a cluster of their own."""
    parent = int(re.search(r"^PPid:\s*(\d+)", (process / "status").read_text(), re.MULTILINE)[1])
    return parent == os.getpid() or (parent > 1 and ours(Path("/proc", str(parent))))


def test_replicas_share(url, expected):
    """Both answer, each with the threads that it was given; what they say is what the library says."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: say(url), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.headers["x-replica-id"] for answer in answers}) == 2
    assert {answer.headers["x-replica-threads"] for answer in answers} == {"2"}
    for answer in answers:
        assert answer.headers["transfer-encoding"] == "chunked"
        assert same(np.frombuffer(answer.content, np.int16), expected)


def test_more_than_may_be(url, expected):
    """Whoever is too many is told so, and the others hear what they would have."""
    for _ in range(5):  # they may come one by one where processors are taken
        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(lambda _: say(url), range(40)))
        statuses = [answer.status_code for answer in answers]
        for answer in answers:
            if answer.status_code == 200:
                assert same(np.frombuffer(answer.content, np.int16), expected)
        if set(statuses) != {200}:
            break
    assert set(statuses) == {200, 503}  # as Ray says it
    assert statuses.count(200) >= 12


def test_clients_that_vanish(url):
    """Their slots are free soon."""
    port = int(url.rpartition(":")[2])

    class Server:
        pass

    Server.url, Server.port = url, port
    for _ in range(8):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(request_bytes(Server, BODY))
            connection.settimeout(60)
            connection.recv(2000)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [httpx.get(url + "/v1/status", timeout=60).json() for _ in range(6)]
        if not any(status["decoding"] or status["waiting"] or status["active"] for status in found):
            break
        time.sleep(0.2)
    else:
        pytest.fail(f"{found}")


def test_one_dies(url, expected):
    """Clean errors for those that it served, nobody else's audio for anybody, and soon two again."""
    before = processes()
    assert len(before) == 2
    victim = min(before)

    def call(_):
        try:
            return say(url)
        except httpx.HTTPError as error:  # cut off in the middle, or refused
            return error

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(call, number) for number in range(6)]
        time.sleep(0.3)
        os.kill(victim, signal.SIGKILL)
        answers = [each.result() for each in running]
    for answer in answers:
        if isinstance(answer, httpx.Response):
            assert answer.status_code in (200, 429, 500, 502, 503)
            if answer.status_code == 200:
                assert same(np.frombuffer(answer.content, np.int16), expected)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            now = processes()
            if len(now) == 2 and victim not in now and say(url).status_code == 200:
                break
        time.sleep(0.5)
    else:
        pytest.fail("the replica does not come back")
    assert same(np.frombuffer(say(url).content, np.int16), expected)


def test_cores_are_asked_for():
    """On Neuron a replica takes whole cores, and processors as well."""
    from neuron_xtts.serving.ray import Cluster, app

    deployment = app(Cluster(neuron_cores=2, cpus=8, replicas=1, most_replicas=3))._bound_deployment
    options = deployment.ray_actor_options
    assert (options["num_cpus"], options["resources"]) == (8, {"neuron_cores": 2})
    assert deployment._deployment_config.autoscaling_config.max_replicas == 3
    assert deployment._deployment_config.max_queued_requests > 0
    # By which Ray makes one of what ``serve run`` and a configuration file say.
    assert inspect.signature(app).parameters["cluster"].annotation is Cluster
    with pytest.raises(ValueError, match="extra"):
        Cluster(nonsense=1)
