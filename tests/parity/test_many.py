"""Many texts at once, and from asyncio: what is said is what coqui-tts says, and whoever goes takes it along."""

import asyncio
import gc
import itertools
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import all_fallbacks, stop_after

import neuron_xtts
from neuron_xtts import BucketPlan, aio
from neuron_xtts.decoding.batch import Batch
from neuron_xtts.patching.patch import find_patch

TEXTS = [f"song number {number}" + ", la" * (number % 4) for number in range(9)]


@pytest.fixture
def options(tts, reference):
    """Of a call that says 24 codes."""
    return {"language": "en", "speaker_wav": str(reference), "max_new_tokens": 30} | stop_after(
        tts.synthesizer.tts_model, 24
    )


def own(model, texts, seed, options):
    """What coqui-tts says of texts, one after another, with a seed each."""
    found = []
    for number, text in enumerate(texts):
        torch.manual_seed(seed + number)
        found.append(model.tts(text, **options) if hasattr(model, "tts") else model.synthesize(text, **options)["wav"])
    return found


def scheduler_of(model):
    return find_patch(neuron_xtts.api.find_xtts(model)).dispatcher.engines.first.scheduler


def is_idle(model):
    """Whether, within a minute, no row is left, and no thread of ours."""
    for _ in range(6000):
        counts = scheduler_of(model).counts()
        ours = [thread for thread in threading.enumerate() if thread.name.startswith(("speak_many", "neuron_xtts.aio"))]
        if not (counts.decoding or counts.waiting or ours):
            return True
        time.sleep(0.01)
    return False


def assert_said(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-5)
        assert np.abs(np.asarray(b)).max() > 1e-3


@pytest.mark.parametrize("which", ["TTS", "Synthesizer", "Xtts"])
def test_speak_many(tts, options, which):
    """In the order of the texts, each with the seed of its place, at once."""
    model = {"TTS": tts, "Synthesizer": tts.synthesizer, "Xtts": tts.synthesizer.tts_model}[which]
    if which == "Synthesizer":
        options = {"speaker_name": None, "language_name": options.pop("language"), **options}
    theirs = own(model, TEXTS, 5, options)
    neuron_xtts.patch(tts, backend="cpu", strict=True, queue=0, buckets=BucketPlan(slots=(1, 2, 4)))
    assert_said(list(neuron_xtts.speak_many(model, TEXTS, seed=5, progress=False, **options)), theirs)
    assert max(neuron_xtts.report(tts).batch.steps) > 1
    assert is_idle(tts)
    assert all_fallbacks(tts) == {}


def test_texts_without_end(tts, options):
    """No more are taken than may be begun, and nothing is left when nobody wants more."""
    taken = itertools.count()
    neuron_xtts.patch(tts, backend="cpu", strict=True, buckets=BucketPlan(slots=(1, 2)))
    said = neuron_xtts.speak_many(tts, (f"song {next(taken)}" for _ in itertools.count()), progress=False, **options)
    assert len(next(said)) > 0
    assert next(taken) <= 4
    said.close()
    assert is_idle(tts)


def test_a_text_that_cannot_be_said(tts, options):
    """It raises in its place, and those behind it are not said."""
    neuron_xtts.patch(tts, backend="cpu", buckets=BucketPlan(slots=(1, 2)))
    said = neuron_xtts.speak_many(tts, [TEXTS[0], "la " * 500, *TEXTS], progress=False, **options)
    assert len(next(said)) > 0
    with pytest.raises(AssertionError, match="400 tokens"):
        next(said)
    assert next(said, None) is None
    assert is_idle(tts)


def test_the_bar(tts, options, capsys):
    neuron_xtts.patch(tts, backend="cpu")
    list(neuron_xtts.speak_many(tts, TEXTS[:2], **options))
    assert "2/2" in capsys.readouterr().err


def test_turned_off(tts, options, monkeypatch):
    """One text after another, by coqui-tts, which serves no two threads at once."""
    theirs = own(tts, TEXTS[:3], 5, options)
    neuron_xtts.patch(tts, backend="cpu")
    monkeypatch.setenv("NEURON_XTTS_DISABLE", "1")
    assert_said(list(neuron_xtts.speak_many(tts, TEXTS[:3], seed=5, progress=False, **options)), theirs)


def test_turned_off_in_company(tts, options, monkeypatch):
    """coqui-tts serves whatever tasks ask at once, one at a time."""
    theirs = own(tts, TEXTS[:4], 5, options)
    neuron_xtts.patch(tts, backend="cpu")
    monkeypatch.setenv("NEURON_XTTS_DISABLE", "1")

    async def everything():
        return await asyncio.gather(
            *(aio.speak(tts, text, seed=5 + number, **options) for number, text in enumerate(TEXTS[:4]))
        )

    assert_said(asyncio.run(everything()), theirs)


def test_unpatched_meanwhile(tts, options):
    """What has begun ends; what has not is refused, since coqui-tts itself serves no two threads at once."""
    theirs = own(tts, TEXTS, 5, options)
    neuron_xtts.patch(tts, backend="cpu", buckets=BucketPlan(slots=(1, 2)))
    said = neuron_xtts.speak_many(tts, TEXTS, seed=5, progress=False, **options)
    found = [next(said)]
    neuron_xtts.unpatch(tts)
    with pytest.raises(ValueError, match="not patched, or not any more"):
        found.extend(said)
    assert 1 <= len(found) < len(TEXTS)
    assert_said(found, theirs[: len(found)])


def test_collected_by_whoever_computes(tts, options):
    """Texts that nobody wants any more end, though the thread that lets them go is the one that computes for them."""
    neuron_xtts.patch(tts, backend="cpu", strict=True, buckets=BucketPlan(slots=(1, 2, 4)))
    cycle = [neuron_xtts.speak_many(tts, TEXTS, progress=False, **options)]
    next(cycle[0])
    cycle.append(cycle)
    scheduler = scheduler_of(tts)
    real, count = scheduler._tick, itertools.count()

    def tick():
        if next(count) == 3:
            gc.collect()
        return real()

    scheduler._tick = tick
    del cycle
    result = threading.Thread(target=lambda: tts.tts(TEXTS[0], **options), daemon=True)
    result.start()
    result.join(60)
    assert not result.is_alive(), "they wait for each other"
    assert is_idle(tts)


def test_what_texts_are_not(tts, options):
    neuron_xtts.patch(tts, backend="cpu")
    with pytest.raises(TypeError, match=r"texts is a str, 'Hi\.'; expected texts, such as \['Hi\.'\]"):
        neuron_xtts.speak_many(tts, "Hi.", **options)
    with pytest.raises(ValueError, match="seed='7'; expected a whole number"):
        neuron_xtts.speak_many(tts, TEXTS, seed="7", **options)

    def lines():
        yield from TEXTS[:2]
        raise OSError("the file is gone")

    said = neuron_xtts.speak_many(tts, lines(), progress=False, **options)
    assert [len(next(said)) > 0 for _ in range(2)] == [True, True]
    with pytest.raises(OSError, match="the file is gone"):
        next(said)


def test_cancelled_while_it_is_vocoded(tts, options, monkeypatch):
    """No further window is made."""
    stop_after(tts.synthesizer.tts_model, None)
    options = {**options, "max_new_tokens": 200, "min_new_tokens": 0}
    neuron_xtts.patch(tts, backend="cpu", buckets=BucketPlan(vocoder=(64,)))
    runner = find_patch(tts.synthesizer.tts_model).runner
    real, made = runner.run, []

    async def cancel():
        loop = asyncio.get_running_loop()
        task, gone = asyncio.create_task(aio.speak(tts, TEXTS[0], **options)), threading.Event()
        task.add_done_callback(lambda _: gone.set())

        def run(graph, *arguments):
            if graph == "vocoder":
                made.append(graph)
                loop.call_soon_threadsafe(task.cancel)
                gone.wait(60)
            return real(graph, *arguments)

        monkeypatch.setattr(runner, "run", run)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert is_idle(tts)
    assert len(made) == 1


@pytest.mark.slow
def test_the_end_of_the_interpreter(tmp_path):
    """Nobody waits for what is still being said."""
    program = f"""
import torch
from pathlib import Path
import neuron_xtts
from neuron_xtts import speaking
from neuron_xtts.coqui.models import random_tts
from neuron_xtts.coqui.recordings import write_reference

folder = Path({str(tmp_path)!r})
write_reference(folder / "voice.wav", seconds=3)
tts = neuron_xtts.patch(random_tts(folder, small=True), backend="cpu")
with torch.no_grad():
    tts.synthesizer.tts_model.gpt.mel_head.bias[1025] = -1e4
options = dict(language="en", speaker_wav=str(folder / "voice.wav"), progress=False)
said = neuron_xtts.speak_many(tts, ["la" + " la" * i for i in range(40)], max_new_tokens=200, **options)
real = speaking.speak

def speak(*arguments, **options):
    real(*arguments, **options)
    print("said", flush=True)

speaking.speak = speak
next(said)
print("end", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, _, after = done.stdout.partition("end")
    assert done.stdout.count("said") >= 1
    assert after.count("said") < 16  # of dozens that had begun, as many at once


def test_a_thread_that_lives_longer_than_the_main_one(tmp_path):
    """Which the interpreter waits for: it says what it wants. What begins at the interpreter's exit is told that."""
    program = f"""
import atexit, threading, time
from pathlib import Path
import neuron_xtts
from neuron_xtts.coqui.models import random_tts
from neuron_xtts.coqui.recordings import write_reference

folder = Path({str(tmp_path)!r})
write_reference(folder / "voice.wav", seconds=3)
tts = neuron_xtts.patch(random_tts(folder, small=True), backend="cpu")
options = dict(language="en", speaker_wav=str(folder / "voice.wav"), progress=False, max_new_tokens=9)

def work():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    print("said", len(list(neuron_xtts.speak_many(tts, ["one", "two"], **options))), flush=True)

def late():
    try:
        list(neuron_xtts.speak_many(tts, ["one"], **options))
    except RuntimeError as error:
        print("refused", error, flush=True)

atexit.register(late)
threading.Thread(target=work).start()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "said 2"
    assert done.stdout.splitlines()[1].startswith("refused ")


def test_a_book_leaves_the_queue_to_others(tts, options, monkeypatch):
    """However many of its texts wait, a call beside them does, too; the next one is one too many."""
    neuron_xtts.patch(tts, backend="cpu", buckets=BucketPlan(slots=(2,)), queue=1)
    tts.tts("so that the voice is known.", **options)
    real, gate = Batch.step, threading.Event()
    scheduler = scheduler_of(tts)

    def step(*arguments):  # stands still once there is no slot left
        return (len(scheduler._running) < 2 or gate.wait(60)) and real(*arguments)

    monkeypatch.setattr(Batch, "step", step)

    def begun(calls):
        def are():
            return len(scheduler._running) == 2 and len(scheduler._queue) == calls - 2

        end = time.monotonic() + 30
        while not are() and time.monotonic() < end:
            time.sleep(0.01)
        return are()

    with ThreadPoolExecutor(2) as pool:
        try:
            said = pool.submit(lambda: list(neuron_xtts.speak_many(tts, TEXTS, progress=False, **options)))
            assert begun(4)  # twice as many as there are slots; whoever decodes stands still
            assert len(scheduler._queue) > 1
            other = pool.submit(lambda: tts.tts("one more.", **options))
            assert begun(5)
            with pytest.raises(neuron_xtts.QueueFullError):
                tts.tts("one too many.", **options)
        finally:
            gate.set()
        assert len(said.result(120)) == len(TEXTS)
        assert len(other.result(120)) > 0


def test_seeds_of_other_kinds(tts, options):
    """Are counted as whole numbers are: an int8 does not begin anew."""
    ours, theirs = (
        list(
            neuron_xtts.speak_many(
                neuron_xtts.patch(tts, backend="cpu"), TEXTS[:3], seed=seed, progress=False, **options
            )
        )
        for seed in (np.int8(126), 126)
    )
    assert_said(ours, theirs)


@pytest.mark.parametrize("error", [neuron_xtts.QueueFullError(16, 64), neuron_xtts.FallbackError("GPT.generate", "x")])
def test_errors_between_processes(error):
    """They are pickled, as those of pools are."""
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))
    assert vars(again) == vars(error)


def test_unpatched(tts, options):
    with pytest.raises(ValueError, match=r"not patched.*neuron_xtts\.patch"):
        neuron_xtts.speak_many(tts, TEXTS, **options)
    with pytest.raises(ValueError, match="not patched"):
        asyncio.run(aio.speak(tts, TEXTS[0], **options))
    with pytest.raises(TypeError, match="got a str"):
        neuron_xtts.speak_many("a model", TEXTS)


def test_aio(tts, options):
    """Tasks speak together, whole and in chunks, while the event loop goes on."""
    theirs = own(tts, TEXTS, 5, options)
    chunked = []
    xtts = tts.synthesizer.tts_model
    voice = xtts.get_conditioning_latents(options["speaker_wav"])
    settings = {name: xtts.config[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
    codes = {name: options[name] for name in ("max_new_tokens", "min_new_tokens")}
    for number, text in enumerate(TEXTS):
        torch.manual_seed(5 + number)
        chunked.append(list(xtts.inference_stream(text, "en", *voice, stream_chunk_size=7, **settings, **codes)))
    neuron_xtts.patch(tts, backend="cpu", strict=True)
    beats = []

    async def beat():
        while True:
            beats.append(time.monotonic())
            await asyncio.sleep(0.005)

    async def in_chunks(number):
        stream = aio.stream(tts, TEXTS[number], seed=5 + number, stream_chunk_size=7, **options)
        return [chunk async for chunk in stream]

    async def everything():
        heart = asyncio.create_task(beat())
        whole = [aio.speak(tts, text, seed=5 + number, **options) for number, text in enumerate(TEXTS)]
        found = await asyncio.gather(*whole, *map(in_chunks, range(len(TEXTS))))
        heart.cancel()
        return found

    found = asyncio.run(everything())
    assert_said(found[: len(TEXTS)], theirs)
    for ours, expected in zip(found[len(TEXTS) :], chunked, strict=True):
        assert [len(chunk) for chunk in ours] == [len(chunk) for chunk in expected]
        assert_said([torch.cat(ours)], [torch.cat(expected)])
    assert len(beats) > 20
    assert max(neuron_xtts.report(tts).batch.steps) > 4
    assert is_idle(tts)
    assert all_fallbacks(tts) == {}


def at_step(monkeypatch, number, action, rows=1):
    """Have something happen when so many steps of so many rows were made; returns how many were made until now."""
    real = Batch.step
    made = []

    def step(self, together, embeds):
        if len(together) == rows:
            made.append(len(made))
            if len(made) == number:
                action()
        return real(self, together, embeds)

    monkeypatch.setattr(Batch, "step", step)
    return made


@pytest.mark.parametrize("how", ["speak", "stream"])
def test_a_task_that_is_cancelled(tts, options, monkeypatch, how):
    """Its row leaves before the next step, whoever computes; what speaks beside it goes on as it is."""
    options["max_new_tokens"], options["min_new_tokens"] = 500, 499
    neuron_xtts.patch(tts, backend="cpu", precision="int8")
    beside = {**options, "max_new_tokens": 60, "min_new_tokens": 50, "seed": 3}
    alone = tts.tts(TEXTS[1], **beside)

    async def speak():
        if how == "speak":
            await aio.speak(tts, TEXTS[0], **options)
        else:
            async for _ in aio.stream(tts, TEXTS[0], stream_chunk_size=150, **options):
                pass

    async def cancel(other):
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(speak())
        made = at_step(monkeypatch, 10, lambda: loop.call_soon_threadsafe(task.cancel), 2 if other else 1)
        while other and not neuron_xtts.report(tts).batch.decoding:
            await asyncio.sleep(0.001)
        said = await aio.speak(tts, TEXTS[1], **beside) if other else None
        with pytest.raises(asyncio.CancelledError):
            await task
        return said, len(made)

    _, made = asyncio.run(cancel(other=False))
    assert is_idle(tts)
    assert made < 450
    said, _ = asyncio.run(cancel(other=True))
    np.testing.assert_array_equal(np.asarray(said), np.asarray(alone))
    assert is_idle(tts)
    assert all_fallbacks(tts) == {}
    assert neuron_xtts.report(tts).batch.cancelled == 2


def test_a_task_that_is_cancelled_while_it_waits(tts, options, monkeypatch):
    """It leaves the queue, is counted, and whoever has the slot notices nothing."""
    neuron_xtts.patch(tts, backend="cpu", buckets=BucketPlan(slots=(1,)), strict=True)
    options["seed"] = 3
    alone = tts.tts(TEXTS[0], **options)
    real, gate = Batch.step, threading.Event()
    monkeypatch.setattr(Batch, "step", lambda *arguments: gate.wait(60) and real(*arguments))  # stands still

    async def cancel():
        speaks = asyncio.create_task(aio.speak(tts, TEXTS[0], **options))
        # As it gets its slot it still waits, for a moment.
        while not (batch := neuron_xtts.report(tts).batch).decoding or batch.waiting:
            await asyncio.sleep(0.001)
        waits = asyncio.create_task(aio.speak(tts, TEXTS[1], **options))
        while not neuron_xtts.report(tts).batch.waiting:
            await asyncio.sleep(0.001)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        gate.set()
        return await speaks

    np.testing.assert_array_equal(np.asarray(asyncio.run(cancel())), np.asarray(alone))
    batch = neuron_xtts.report(tts).batch
    assert (batch.calls, batch.cancelled, batch.waiting, batch.decoding) == (2, 1, 0, 0)


def test_a_stream_that_is_left(tts, options):
    """By break, or by forgetting it: its slot is free again."""
    neuron_xtts.patch(tts, backend="cpu", strict=True)
    options["max_new_tokens"], options["min_new_tokens"] = 200, 199

    async def leave():
        async for _ in aio.stream(tts, TEXTS[0], stream_chunk_size=5, **options):
            break
        gc.collect()
        await asyncio.sleep(0.1)

    asyncio.run(leave())
    assert is_idle(tts)


def test_a_queue_that_is_full(tts, options):
    """Whoever comes too late is told so; nobody else is hurt."""
    neuron_xtts.patch(tts, backend="cpu", strict=True, queue=1, buckets=BucketPlan(slots=(1,)))
    options["max_new_tokens"], options["min_new_tokens"] = 100, 99

    async def all_at_once():
        calls = [aio.speak(tts, text, seed=1, **options) for text in TEXTS]
        return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(all_at_once())
    refused = [result for result in found if isinstance(result, neuron_xtts.QueueFullError)]
    said = [result for result in found if not isinstance(result, BaseException)]
    assert refused
    assert said
    assert len(said) + len(refused) == len(TEXTS)


def test_a_voice_that_is_not_named(tts):
    neuron_xtts.patch(tts, backend="cpu")

    async def speak(model, **options):
        async for _ in aio.stream(model, "song", language="en", **options):
            pass

    with pytest.raises(ValueError, match="speaker='nobody' and no speaker_wav; expected a recording"):
        asyncio.run(speak(tts.synthesizer.tts_model, speaker="nobody"))
    with pytest.raises(FileNotFoundError, match="nobody"):  # coqui-tts's own error, of the folder of voices that it has
        asyncio.run(speak(tts, speaker="nobody"))
