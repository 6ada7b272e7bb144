"""The server beside the library: the same streams by HTTP, from another process, and by ``aio.stream``, in turns."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import neuron_xtts
from neuron_xtts import aio
from neuron_xtts.coqui.constants import OUTPUT_RATE
from neuron_xtts.coqui.models import SENTENCES
from neuron_xtts.options import PatchOptions
from neuron_xtts.tables import Table
from neuron_xtts.tools.bench import Benchmark, Figures, Subject, Voice, in_precision, machine
from neuron_xtts.voice import Voice as KeptVoice
from neuron_xtts.voice import VoiceFolder

CALLERS = (1, 8)
CODES = 100
LIBRARY, SERVER = "library", "server"

# What each client does: it reads as fast as it can, and notes when what came. It starts when it is told to.
_CLIENTS = """
import json, sys, threading, time
import httpx
url, body, callers = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
heard = [None] * callers
clients = [httpx.Client(timeout=600) for _ in range(callers)]
for client in clients:
    client.get(url + "/health")
def call(number):
    began, first, size = time.perf_counter(), None, 0
    told = dict(body, seed=body["seed"] + number)
    with clients[number].stream("POST", url + "/v1/audio/speech", json=told) as answer:
        assert answer.status_code == 200, answer.read()
        for part in answer.iter_raw():
            first = first or time.perf_counter() - began
            size += len(part)
    heard[number] = first, size
input()
began = time.perf_counter()
threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps({"seconds": time.perf_counter() - began, "heard": heard}))
"""


@dataclass
class Crowd:
    """What callers that called at once heard.

    Attributes:
        seconds: from the first call to the last audio.
        first: seconds to the first audio, of each.
        audio: seconds of it, all together.
    """

    seconds: float
    first: list[float]
    audio: float


@dataclass(kw_only=True)
class ServeResults(Benchmark):
    """The server and the library, with several numbers of callers.

    Attributes:
        precision: of the graphs.
        samples: crowds by number of callers and by who served, one a round.
    """

    precision: str
    samples: dict[int, dict[str, list[Crowd]]]

    def medians(self) -> dict[int | str, Figures]:
        """Medians over the rounds: seconds to the first audio, and seconds of audio made in a second."""
        return {
            callers: {
                who: {
                    "TTFA": statistics.median(statistics.median(crowd.first) for crowd in crowds),
                    "audio per second": statistics.median(crowd.audio / crowd.seconds for crowd in crowds),
                }
                for who, crowds in by_who.items()
            }
            for callers, by_who in self.samples.items()
        }

    def tables(self) -> list[Table]:
        """One, with the ratios that matter."""
        rows = []
        medians = self.medians()
        for callers, by_who in self.samples.items():
            figures = medians[callers]
            library, server = figures[LIBRARY], figures[SERVER]
            later = 1e3 * (server["TTFA"] - library["TTFA"])
            low, middle, high = _later(by_who)
            by_round = f"{middle:+.0f} ({low:+.0f} to {high:+.0f}) ms"
            share = server["audio per second"] / library["audio per second"]
            rows.append((
                self.precision, str(callers), f"{library['TTFA']:.2f} s", f"{server['TTFA']:.2f} s", f"{later:+.0f} ms",
                by_round, f"{library['audio per second']:.2f}", f"{server['audio per second']:.2f}", f"{share:.0%}",
            ))  # fmt: skip
        names = ("precision", "callers", "TTFA, library", "TTFA, server", "later", "later in a round (quartiles)",
                 "audio per second, library", "server", "share")  # fmt: skip
        return [(names, rows)]

    def draw(self, path: Path) -> None:
        """Draw the time to the first audio."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for who in (LIBRARY, SERVER):
            found = self.medians()
            axes.plot([str(n) for n in found], [figures[who]["TTFA"] for figures in found.values()], "o-", label=who)
        axes.set(xlabel="callers at once", ylabel="seconds to the first audio", title=f"precision {self.precision}")
        axes.set_ylim(0)
        axes.legend()
        figure.savefig(path)


def bench_serve(
    subject: Subject, *, callers: Sequence[int], codes: int, rounds: int, precision: str, options: PatchOptions
) -> ServeResults:
    """Measure the server beside the library.

    Args:
        subject: what speaks. Weights that were not trained are made to say so many codes.
        callers: how many call at once.
        codes: of each stream, of such weights.
        rounds: of everything.
        precision: of the graphs.
        options: of `neuron_xtts.patch`.
    """
    xtts, voice = subject.prepare()
    if subject.checkpoint is None:
        with torch.no_grad():
            xtts.gpt.mel_head.bias[xtts.gpt.stop_audio_token] = -1e4
        xtts.gpt.max_gen_mel_tokens = codes
    neuron_xtts.patch(xtts, **in_precision(options, precision))
    samples: dict[int, dict[str, list[Crowd]]] = {n: {LIBRARY: [], SERVER: []} for n in callers}
    with _serving(xtts, voice) as url, tqdm(total=rounds * len(callers) * 2, desc="serve") as bar:
        for count in range(rounds + 1):  # the first is not counted
            for number in callers:
                seed = 1000 * count + 100 * number
                for who in (LIBRARY, SERVER) if count % 2 else (SERVER, LIBRARY):
                    if who == LIBRARY:
                        crowd = asyncio.run(_by_library(xtts, voice, number, seed))
                    else:
                        crowd = _by_server(url, number, seed + 50)
                    if count:
                        samples[number][who].append(crowd)
                        bar.update()
    results = ServeResults(machine=machine(), precision=precision, samples=samples)
    results.unpatch(xtts, "neuron_xtts")
    return results


def _later(by_who: dict[str, list[Crowd]]) -> list[float]:
    """Quartiles of the ms by which first audio is later from the server, round by round: machines drift."""
    first = {who: [statistics.median(crowd.first) for crowd in crowds] for who, crowds in by_who.items()}
    later = [1e3 * (server - own) for server, own in zip(first[SERVER], first[LIBRARY], strict=True)]
    return statistics.quantiles(later * 2 if len(later) == 1 else later, n=4, method="inclusive")


async def _by_library(xtts: Any, voice: Voice, callers: int, seed: int) -> Crowd:
    async def call(number: int) -> tuple[float, int]:
        began, first, size = time.perf_counter(), 0.0, 0
        names = dict(zip(("gpt_cond_latent", "speaker_embedding"), voice, strict=True))
        async for chunk in aio.stream(xtts, SENTENCES[0], language="en", seed=seed + number, **names):
            first = first or time.perf_counter() - began
            size += len(chunk)
        return first, size

    began = time.perf_counter()
    heard = await asyncio.gather(*map(call, range(callers)))
    seconds = time.perf_counter() - began
    return Crowd(seconds, [first for first, _ in heard], sum(size for _, size in heard) / OUTPUT_RATE)


def _by_server(url: str, callers: int, seed: int) -> Crowd:
    body = {"model": "x", "voice": "voice", "input": SENTENCES[0], "response_format": "pcm", "seed": seed}
    command = [sys.executable, "-c", _CLIENTS, url, json.dumps(body), str(callers)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(1.5)  # until it has imported what it needs, and waits to be told
    out, _ = process.communicate("\n")
    if process.returncode:
        raise RuntimeError("the clients of the benchmark failed")
    found = json.loads(out)
    heard = found["heard"]
    return Crowd(found["seconds"], [first for first, _ in heard], sum(size for _, size in heard) / 2 / OUTPUT_RATE)


@contextlib.contextmanager
def _serving(xtts: Any, voice: Voice) -> Iterator[str]:
    """The address of a server in a thread of this process."""
    import tempfile

    import uvicorn

    from neuron_xtts.coqui.voices import encoders_digest
    from neuron_xtts.serving.app import create_app

    with tempfile.TemporaryDirectory() as folder:
        voices = VoiceFolder(folder)
        voices.add("voice", KeptVoice(voice[0].clone(), voice[1].clone(), encoders_digest(xtts)))
        app = create_app(xtts, voices=voices)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not app.state.studio.ready:
                time.sleep(0.05)
                if not thread.is_alive():
                    raise RuntimeError("the server of the benchmark does not start")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()
