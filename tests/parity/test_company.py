"""Many callers at once: each gets what it gets alone, whoever joins, leaves, fails or goes away beside it."""

import contextlib
import copy
import gc
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import all_fallbacks, fallbacks, speak, stop_after

import neuron_xtts
from neuron_xtts import BucketPlan, QueueFullError
from neuron_xtts.coqui.models import random_tts
from neuron_xtts.decoding import scheduler as scheduler_module
from neuron_xtts.decoding.batch import Batch
from neuron_xtts.decoding.draws import DRAWS
from neuron_xtts.patching.patch import find_patch
from neuron_xtts.precision import HOST_PRECISIONS

TEXT = "the band plays an old song."


def together(*calls):
    """What calls give that threads make at the same moment: results, or what they raised."""
    results, barrier = [None] * len(calls), threading.Barrier(len(calls))

    def work(number, call):
        barrier.wait()
        try:
            results[number] = call()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "somebody hangs"
    return results


def plain(request):
    """The codes of coqui-tts itself, which knows no seeds of calls."""
    options = dict(request.options)
    torch.manual_seed(options.pop("seed"))
    return request.xtts.gpt.generate(request.voice, request.text, **options)


class Request:
    """A request with a seed, and settings and a text that go with it."""

    def __init__(self, xtts, voice, seed, **options):
        choose = random.Random(seed)
        self.xtts = xtts
        self.voice = voice[0] * choose.choice([1, 0.5, -1])
        self.text = torch.randint(1, 60, (1, choose.randint(3, 40)), generator=torch.Generator().manual_seed(seed))
        self.options = {
            "seed": seed,
            "do_sample": choose.random() < 0.8,
            "temperature": choose.choice([0.3, 0.75, 1.2]),
            "top_k": choose.choice([0, 5, 50]),
            "top_p": choose.choice([0.5, 0.85, 1.0]),
            "repetition_penalty": choose.choice([1.0, 2.0, 10.0]),
            "max_new_tokens": choose.randint(2, 30),
            **options,
        }

    def whole(self):
        """Codes (1, N), and latents (1, N, D): what logits are made of."""
        codes = self.xtts.gpt.generate(self.voice, self.text, **self.options)
        with torch.no_grad():
            latents = self.xtts.gpt(
                self.text,
                torch.tensor([self.text.shape[1]]),
                codes,
                torch.tensor([codes.shape[1] * 1024]),
                cond_latents=self.voice,
                return_latent=True,
            )
        return codes, latents

    def steps(self):
        """An iterator of codes and latents."""
        fake = self.xtts.gpt.compute_embeddings(self.voice, self.text)
        return self.xtts.gpt.get_generator(
            fake_inputs=fake, output_hidden_states=True, return_dict_in_generate=True, **self.options
        )

    def streamed(self, at_most=None):
        """As `whole`, step by step."""
        found = []
        for step in self.steps():
            found.append(step)
            if len(found) == at_most:
                break
        codes, latents = zip(*found, strict=True)
        return torch.stack(codes, 1), torch.stack(latents, 1)


def assert_alike(ours, theirs, exact):
    if isinstance(ours, BaseException):
        raise ours
    assert torch.equal(ours[0], theirs[0])
    if exact:
        assert torch.equal(ours[1], theirs[1])
    else:
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-5)


def scheduler_of(xtts):
    return find_patch(xtts).dispatcher.engines.first.scheduler


def meet(xtts, calls):
    """Have the next so many whole calls all begun before any of them computes."""
    scheduler = scheduler_of(xtts)
    real, meeting = scheduler._wait, threading.Barrier(calls, lambda: delattr(scheduler, "_wait"))

    def wait(call):
        meeting.wait(60)
        return real(call)

    scheduler._wait = wait


def idle(xtts):
    """Whether nothing is left of any call."""
    scheduler = scheduler_of(xtts)
    batch = scheduler._batch
    return not (scheduler._queue or scheduler._running or scheduler._leader or batch.rows) and batch._state is None


@pytest.fixture
def logits(monkeypatch):
    """What every code of a call with a seed was drawn from, by the seed."""
    found, real = {}, scheduler_module.draw

    def draw(rows, scores):
        for row, score in zip(rows, scores, strict=True):
            if row.sampler.generator is not None:
                found.setdefault(row.sampler.generator.initial_seed(), []).append(score.clone())
        return real(rows, scores)

    monkeypatch.setattr(scheduler_module, "draw", draw)
    return found


def find_needle(xtts, voice, precision, logits, runs, most):
    """A seeded request at a random place among up to so many others of any kind, so many times; each as alone."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", precision=precision, strict=True)
    choose, sizes, exact = random.Random(precision), set(), precision != "fp32"
    needles = {seed: Request(xtts, voice, seed) for seed in range(20)}
    alone = {seed: needle.whole() for seed, needle in needles.items()}
    drawn_from = {seed: torch.stack(steps) for seed, steps in logits.items()}
    assert drawn_from.keys() == needles.keys()
    for run in range(runs):
        seed = choose.randrange(20)
        logits.clear()
        fillers = [Request(xtts, voice, 100 + choose.randrange(1000)) for _ in range(choose.randint(1, most))]
        for filler in fillers:
            if choose.random() < 0.3:
                del filler.options["seed"]
        calls = [choose.choice((filler.whole, filler.streamed)) for filler in fillers]
        place = choose.randint(0, len(calls))
        streamed = choose.random() < 0.5 and needles[seed].options["do_sample"]  # as streams always do
        calls.insert(place, needles[seed].streamed if streamed else needles[seed].whole)
        assert_alike(together(*calls)[place], alone[seed], exact=exact)
        assert_alike((alone[seed][0], torch.stack(logits[seed])), (alone[seed][0], drawn_from[seed]), exact=exact)
        sizes.add(len(calls))
        assert idle(xtts), run
    assert len(sizes) > min(10, most // 2)
    assert all_fallbacks(xtts) == {}


@pytest.mark.slow
@pytest.mark.parametrize("precision", HOST_PRECISIONS)
def test_needle(xtts, voice, precision, logits):
    """It has the codes it has alone, and the logits; in int8 and bf16, the bits."""
    find_needle(xtts, voice, precision, logits, runs=500, most=15)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A GPT of real width, two blocks of it."""
    return random_tts(tmp_path_factory.mktemp("wide"), gpt_layers=2).synthesizer.tts_model


@pytest.mark.parametrize("precision", HOST_PRECISIONS)
def test_needle_at_real_width(wide, reference, precision, logits):
    """Where products are cut into other pieces, for other numbers of rows."""
    find_needle(wide, wide.get_conditioning_latents(str(reference)), precision, logits, runs=15, most=9)
    neuron_xtts.unpatch(wide)


def test_that_company_could_be_seen(xtts, voice, monkeypatch):
    """Were a row taken for its neighbour's, or somebody's generator for another's, the needle would be missed."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", strict=True)
    needle, other = Request(xtts, voice, 1, max_new_tokens=20), Request(xtts, voice, 2, max_new_tokens=20)
    alone = needle.whole()
    real = Batch.step

    def mixed(self, rows, embeds):
        latents, logits = real(self, rows, embeds)
        return (latents.flip(0), logits.flip(0)) if len(rows) > 1 else (latents, logits)

    monkeypatch.setattr(Batch, "step", mixed)
    meet(xtts, 2)
    found, _ = together(needle.whole, other.whole)
    assert not torch.equal(found[0][:, : alone[0].shape[1]], alone[0])


@pytest.mark.parametrize("precision", HOST_PRECISIONS)
def test_streams_that_one_thread_pulls(xtts, voice, precision):
    """They join, wait and leave at any step. There are more than slots, and none waits for another forever."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", precision=precision, buckets=BucketPlan(slots=(1, 2, 3)), strict=True)
    requests = [Request(xtts, voice, seed, do_sample=True) for seed in range(7)]
    alone = [request.whole() for request in requests]
    choose = random.Random(5)
    open_streams = {number: request.steps() for number, request in enumerate(requests)}
    found = {number: [] for number in open_streams}
    while open_streams:
        number = choose.choice(list(open_streams))
        step = next(open_streams[number], None)
        if step is None:
            del open_streams[number]
        else:
            found[number].append(step)
    for number, theirs in enumerate(alone):
        codes, latents = zip(*found[number], strict=True)
        ours = torch.stack(codes, 1), torch.stack(latents, 1)
        assert_alike(ours, theirs, exact=precision != "fp32")
    assert idle(xtts)
    assert all_fallbacks(xtts) == {}


def test_a_stream_is_not_made_far_ahead(xtts, voice):
    """Another's long call goes on; a stream that nobody pulls has a chunk, and goes on when it is pulled."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", strict=True)
    stream = Request(xtts, voice, 1, max_new_tokens=60, do_sample=True)
    theirs = stream.whole()
    steps = stream.steps()
    found = [next(steps)]
    Request(xtts, voice, 2, max_new_tokens=80).whole()
    scheduler = scheduler_of(xtts)
    assert [len(call.steps) for call in scheduler._running] == [20]
    found += list(steps)
    codes, latents = zip(*found, strict=True)
    assert_alike((torch.stack(codes, 1), torch.stack(latents, 1)), theirs, exact=False)


@pytest.mark.slow
def test_cancelled_streams_leave_nothing(xtts, voice):
    """A thousand: no slot, no thread, no memory."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", strict=True)
    requests = [Request(xtts, voice, seed, max_new_tokens=12) for seed in range(8)]
    choose = random.Random(0)
    threads = threading.active_count()

    def cancel():
        together(*(lambda r=r: r.streamed(choose.randint(1, 6)) for r in requests))

    cancel()
    gc.collect()

    def tensors():  # not by isinstance, which asks what a weak proxy stood for
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    before = tensors()
    for _ in range(125):
        cancel()
    assert idle(xtts)
    assert threading.active_count() <= threads
    gc.collect()
    memo = 3 * 130 * len(requests)
    assert tensors() < before + memo
    abandoned = [request.steps() for request in requests]
    for steps in abandoned:
        next(steps)
    assert not idle(xtts)
    del abandoned, steps
    assert idle(xtts)
    assert all_fallbacks(xtts) == {}


def test_a_row_that_raises_leaves_nothing(xtts, voice):
    """What it wrote into its slot, such as NaN before a hook of the user's saw it, is there for nobody."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu")
    good, keeper = Request(xtts, voice, 1, max_new_tokens=40), Request(xtts, voice, 3, max_new_tokens=60)
    bad = Request(xtts, voice, 2, do_sample=True, max_new_tokens=30)
    bad.text = bad.text[:, :3]
    alone, own = good.whole(), bad.whole()[0]
    code = next(code for code in own[0, 10:].tolist() if code not in good.whole()[0])
    kept = keeper.steps()
    first = [next(kept) for _ in range(3)]
    with torch.no_grad():
        weight = xtts.gpt.mel_embedding.weight[code].clone()
        xtts.gpt.mel_embedding.weight[code] = torch.nan

    def see(module, inputs, output):
        if not output.isfinite().all():
            raise FloatingPointError("seen")

    hook = xtts.gpt.gpt.h[1].mlp.c_fc.register_forward_hook(see)
    with pytest.raises(FloatingPointError, match="seen"):  # coqui-tts's own way, too
        bad.whole()
    hook.remove()
    with torch.no_grad():
        xtts.gpt.mel_embedding.weight[code] = weight
    assert fallbacks(xtts, "GPT.generate") == {"FloatingPointError: seen": 1}
    assert_alike(good.whole(), alone, exact=False)
    codes, _ = zip(*first, *kept, strict=True)
    assert torch.equal(torch.stack(codes, 1), keeper.whole()[0])
    assert fallbacks(xtts, "GPT.generate") == {"FloatingPointError: seen": 1}


def test_a_call_from_inside_of_a_step(xtts, voice):
    """By a hook, which would wait for itself: coqui-tts serves it, in the turn that there is, and the call goes on."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu")
    request, inner = Request(xtts, voice, 1, max_new_tokens=8), Request(xtts, voice, 2, max_new_tokens=4)
    alone, found = request.whole(), []

    def speak_too(*_):
        if not found:
            found.append(None)
            found.append(inner.whole()[0])

    hook = xtts.gpt.gpt.h[0].mlp.c_fc.register_forward_hook(speak_too)
    ours = request.whole()
    hook.remove()
    assert_alike(ours, alone, exact=False)
    assert torch.equal(found[1], inner.whole()[0])
    assert fallbacks(xtts, "GPT.generate") == {"a call from inside of a decode step": 1}


def test_where_a_leader_makes_its_tensors(xtts, voice):
    """Its default device is none of its neighbours' business."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu")
    requests = [Request(xtts, voice, seed, max_new_tokens=20) for seed in range(4)]
    alone = [request.whole() for request in requests]

    def elsewhere():
        with torch.device("meta"):
            return list(itertools.islice(requests[0].steps(), 3))

    for _ in range(5):
        _, *found = together(elsewhere, *(request.whole for request in requests[1:]))
        for ours, theirs in zip(found, alone[1:], strict=True):
            assert_alike(ours, theirs, exact=False)
    assert fallbacks(xtts, "GPT.generate") == {}


@pytest.mark.parametrize("where", ["prefix", "step"])
def test_a_row_that_fails(xtts, voice, monkeypatch, where):
    """It gets what coqui-tts makes of it; the others do not notice, nor does whoever has its slot next."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", precision="int8")
    good = [Request(xtts, voice, seed, max_new_tokens=20) for seed in range(3)]
    alone = [request.whole() for request in good]
    longest = max(request.text.shape[1] for request in good)
    bad = Request(xtts, voice, 9, do_sample=True, max_new_tokens=60)
    bad.text = bad.text.repeat(1, 9)[:, : longest + 9]
    if where == "prefix":
        bad.voice = bad.voice * float("nan")
    else:
        own = bad.whole()[0]
        real = scheduler_module.embed_codes

        def embed(gpt, codes, places):
            embeds = real(gpt, codes, places)
            at_fault = torch.tensor([place > 25 for place in places])  # the good ones have ended
            return embeds.masked_fill(at_fault[:, None, None], float("nan"))

        monkeypatch.setattr(scheduler_module, "embed_codes", embed)
    keeper = Request(xtts, voice, 4, do_sample=True, max_new_tokens=20).steps()
    next(keeper)  # it keeps the slots from being let go
    *found, failed = together(*(request.whole for request in good), bad.whole)
    for ours, theirs in zip(found, alone, strict=True):
        assert_alike(ours, theirs, exact=True)
    if where == "prefix":
        assert "probability tensor" in str(failed)  # coqui-tts's own error
    else:
        assert failed[0].shape == own.shape
    assert fallbacks(xtts, "GPT.generate") == {"logits that are not finite": 1}
    for ours, theirs in zip(together(*(request.whole for request in good)), alone, strict=True):
        assert_alike(ours, theirs, exact=True)
    keeper.close()
    assert idle(xtts)


@pytest.mark.parametrize("where", ["step", "draw"])
def test_a_call_that_fails_in_company(xtts, voice, monkeypatch, where):
    """What fails together is done again for each: whoever is at fault falls back, by itself."""
    stop_after(xtts, None)
    requests = [Request(xtts, voice, seed, max_new_tokens=20, do_sample=True) for seed in range(4)]
    own = plain(requests[0])
    neuron_xtts.patch(xtts, backend="cpu", precision="int8")
    alone = [request.whole() for request in requests]

    def at_fault(rows):
        return any(row.sampler.prefix_length == requests[0].text.shape[1] + 35 and row.drawn > 5 for row in rows)

    if where == "step":
        real = Batch.step
        monkeypatch.setattr(
            Batch, "step", lambda self, rows, embeds: 1 / 0 if at_fault(rows) else real(self, rows, embeds)
        )
    else:
        real = scheduler_module.draw
        monkeypatch.setattr(
            scheduler_module, "draw", lambda rows, logits: 1 / 0 if at_fault(rows) else real(rows, logits)
        )
    assert len({request.text.shape[1] for request in requests}) == 4
    found = together(*(request.whole for request in requests))
    for ours, theirs in zip(found[1:], alone[1:], strict=True):
        assert_alike(ours, theirs, exact=True)
    assert torch.equal(found[0][0], own)
    assert fallbacks(xtts, "GPT.generate") == {"ZeroDivisionError: division by zero": 1}
    assert idle(xtts)


def test_whoever_computes_is_interrupted(xtts, voice, monkeypatch):
    """Ctrl-C in the middle of a step: the others get coqui-tts's own codes, and nobody hangs."""
    stop_after(xtts, None)
    requests = [Request(xtts, voice, seed, max_new_tokens=20) for seed in range(3)]
    own = [plain(request) for request in requests]
    neuron_xtts.patch(xtts, backend="cpu")
    real, count = Batch.step, iter(range(99))

    def step(self, rows, embeds):
        if next(count) == 7:
            raise KeyboardInterrupt
        return real(self, rows, embeds)

    monkeypatch.setattr(Batch, "step", step)
    meet(xtts, 3)
    found = together(*(request.whole for request in requests))
    assert sum(isinstance(result, KeyboardInterrupt) for result in found) == 1
    assert all_fallbacks(xtts) == {"GPT.generate": {"the thread that computed for it was interrupted": 2}}
    for ours, theirs in zip(found, own, strict=True):
        if not isinstance(ours, KeyboardInterrupt):
            assert torch.equal(ours[0], theirs)
    assert idle(xtts)


def test_whoever_waits_is_interrupted(xtts, voice):
    """Ctrl-C while another thread computes for it: its rows leave, and the others do not notice."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", precision="int8", strict=True)
    requests = [Request(xtts, voice, seed, max_new_tokens=30) for seed in range(3)]
    alone = [request.whole() for request in requests]
    leading, waits = threading.Event(), threading.Event()

    class Interrupted(threading.Event):
        def wait(self, timeout=None):
            waits.set()
            super().wait(0.01)
            raise KeyboardInterrupt

    assert len({request.text.shape[1] for request in requests}) == 3
    scheduler = scheduler_of(xtts)
    real = scheduler.run

    def run(call):
        if call.prefix.shape[1] == requests[1].text.shape[1] + 35:
            call.woken = Interrupted()
        return real(call)

    scheduler.run = run
    at_tick(xtts, 0, lambda: leading.set() or waits.wait(60))

    def second():
        leading.wait(60)
        return requests[1].whole()

    first, interrupted, third = together(requests[0].whole, second, requests[2].whole)
    assert isinstance(interrupted, KeyboardInterrupt)
    assert_alike(first, alone[0], exact=True)
    assert_alike(third, alone[2], exact=True)
    assert idle(xtts)


def test_a_queue_that_is_full(xtts, voice):
    """Whoever comes then is told, before anything is computed, and can come again."""
    neuron_xtts.patch(xtts, backend="cpu", buckets=BucketPlan(slots=(1,)), queue=0, strict=True)
    arguments = {"max_new_tokens": 30, **stop_after(xtts, None)}
    request, other = (Request(xtts, voice, seed, **arguments) for seed in range(2))
    scheduler = scheduler_of(xtts)
    real, refused = scheduler._tick, []

    def call():
        with pytest.raises(QueueFullError, match=r"1 rows decode and as many calls wait as may, 0\. Call again later"):
            other.whole()
        refused.append(True)

    thread = threading.Thread(target=call)

    def tick():
        worked = real()
        if thread.ident is None:  # the row has its slot
            thread.start()
            thread.join(60)
        return worked

    scheduler._tick = tick
    request.whole()
    assert refused
    assert (neuron_xtts.report(xtts).batch.refused, neuron_xtts.report(xtts).batch.cancelled) == (1, 0)
    other.whole()
    assert all_fallbacks(xtts) == {}


def test_one_draws_from_the_global_generator(xtts, voice):
    """Without a seed whoever is alone does, as in coqui-tts; others beside it do not, and disturb nothing."""
    options = {"max_new_tokens": 24, **stop_after(xtts, 20)}
    theirs = speak(xtts, voice, seed=4, **options)
    neuron_xtts.patch(xtts, backend="cpu", strict=True)
    torch.manual_seed(4)
    stream = xtts.inference_stream(TEXT, "en", *voice, stream_chunk_size=5, **options)
    chunks = [next(stream)]
    first = torch.get_rng_state()
    together(*(lambda: xtts.inference(TEXT, "en", *voice, **options) for _ in range(3)))
    del first
    chunks += list(stream)
    assert torch.equal(torch.get_rng_state(), theirs[1])
    assert sum(map(len, chunks)) > 0


def test_a_stream_that_is_closed_while_another_thread_computes(xtts, voice):
    """It draws no more from the global generator, which the next call without a seed has to itself."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", precision="int8", strict=True)
    stream, other = (Request(xtts, voice, seed, do_sample=True, max_new_tokens=60) for seed in range(2))
    del stream.options["seed"]
    torch.manual_seed(1)
    steps = stream.steps()
    next(steps)
    states = []

    def close():
        thread = threading.Thread(target=steps.close)
        thread.start()
        thread.join(60)
        states.append(torch.get_rng_state())

    at_tick(xtts, 4, close)
    other.whole()
    assert torch.equal(torch.get_rng_state(), states[0])
    torch.manual_seed(3)
    ours = stream.whole()[0]
    stream.options["seed"] = 3
    assert torch.equal(ours, stream.whole()[0])
    assert idle_draws()


def idle_draws():
    """Whether nobody has torch's global generator to itself."""
    claim = DRAWS.claim()
    return claim is not None


def test_an_error_that_is_kept(xtts, voice):
    """Its traceback holds on to the call, which nevertheless has no claim on the global generator any more."""
    neuron_xtts.patch(xtts, backend="cpu")
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(AttributeError) as no_prefix:
        xtts.gpt.get_generator(ids)
    assert idle_draws()
    with pytest.raises(RuntimeError, match="probability tensor") as not_finite:
        xtts.gpt.generate(voice[0] * float("nan"), ids, do_sample=True)
    assert idle_draws()
    del no_prefix, not_finite


def test_coqui_tts_ends_sooner_than_the_graphs(xtts, voice, monkeypatch):
    """A stream that falls back after more steps than coqui-tts makes of it is over."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu")
    steps = Request(xtts, voice, 1, do_sample=True, max_new_tokens=40).steps()
    for _ in range(5):
        next(steps)
    stop_after(xtts, 1)  # from now on coqui-tts makes one step of it
    monkeypatch.setattr(Batch, "step", lambda *args: 1 / 0)
    assert list(steps) == []
    assert all_fallbacks(xtts) == {"GPT.get_generator": {"ZeroDivisionError: division by zero": 1}}
    assert idle_draws()


def at_tick(xtts, number, action):
    """Have something happen when so many steps were made."""
    scheduler = scheduler_of(xtts)
    real, count = scheduler._tick, iter(range(10_000))

    def tick():
        if next(count) == number:
            action()
        return real()

    scheduler._tick = tick


MEANWHILE = {
    "unpatch": neuron_xtts.unpatch,
    "patch": lambda xtts: neuron_xtts.patch(xtts, backend="cpu", precision="int8"),
    "deepcopy": copy.deepcopy,
    "train": lambda xtts: xtts.train(),
    "the same weights again": lambda xtts: xtts.load_state_dict(xtts.state_dict()),
}


@pytest.mark.parametrize("what", MEANWHILE)
def test_meanwhile(xtts, voice, what):
    """Whatever becomes of the model, rows that decode go on as they began, and whoever comes next is served."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", precision="int8")
    requests = [Request(xtts, voice, seed, max_new_tokens=20) for seed in range(3)]
    alone = [request.whole()[0] for request in requests]
    scheduler = scheduler_of(xtts)
    at_tick(xtts, 5, lambda: MEANWHILE[what](xtts))
    meet(xtts, 3)
    generates = [lambda r=r: xtts.gpt.generate(r.voice, r.text, **r.options) for r in requests]
    for ours, theirs in zip(together(*generates), alone, strict=True):
        assert torch.equal(ours, theirs)
    assert not scheduler._running
    assert scheduler._leader is None
    xtts.eval()
    assert xtts.inference(TEXT, "en", *voice, max_new_tokens=4)["wav"].size


@pytest.mark.slow
def test_patched_again_while_calls_begin(xtts, voice):
    """At every moment of it: whoever begins waits for the new patch, and nobody is served without one."""
    stop_after(xtts, None)
    options = [{"precision": "fp32"}, {"precision": "fp32", "buckets": BucketPlan(decode=(128,), slots=(2, 8))}]
    neuron_xtts.patch(xtts, backend="cpu")
    requests = [Request(xtts, voice, seed, max_new_tokens=12, do_sample=True) for seed in range(6)]
    alone = [request.whole() for request in requests]
    again, calls = True, []

    def work(number):
        while again:
            calls.append(number)
            assert_alike(
                (requests[number].streamed if len(calls) % 2 else requests[number].whole)(), alone[number], exact=False
            )

    def patch():
        nonlocal again
        for turn in range(200):
            neuron_xtts.patch(xtts, backend="cpu", **options[turn % 2])
            time.sleep(0.3)
            if turn > 8 and len(calls) > 60:
                break
        again = False

    results = together(patch, *(lambda number=number: work(number) for number in range(6)))
    assert [result for result in results if result is not None] == []
    assert len(calls) > 60
    assert all_fallbacks(xtts) == {}
    neuron_xtts.unpatch(xtts)
    assert not any(name in vars(xtts.gpt) for name in ("generate", "get_generator", "forward"))


def test_a_patch_that_fails_in_place_of_another(xtts, voice):
    """There is none then, and whoever waited for it is coqui-tts's."""
    stop_after(xtts, None)
    request = Request(xtts, voice, 1, max_new_tokens=8)
    own = plain(request)
    neuron_xtts.patch(xtts, backend="cpu")
    waiting = threading.Event()

    def patch():
        with pytest.raises(ValueError, match="has a window of 5 frames"):
            neuron_xtts.patch(xtts, backend="cpu", buckets=BucketPlan(vocoder=(5,)))

    del request.options["seed"]
    dispatcher = find_patch(xtts).dispatcher
    real = dispatcher._gave_way.wait
    dispatcher._gave_way.wait = lambda *timeout: waiting.set() or real(*timeout)
    close = find_patch(xtts).runner.backend.close
    find_patch(xtts).runner.backend.close = lambda: waiting.wait(20) and close()

    def call():
        torch.manual_seed(1)
        while find_patch(xtts) is not None and not dispatcher._gives_way:
            time.sleep(0.01)
        return xtts.gpt.generate(request.voice, request.text, **request.options)

    _, codes = together(patch, call)
    assert torch.equal(codes, own)
    assert waiting.is_set()
    assert not neuron_xtts.is_patched(xtts)


def test_a_model_that_is_put_into_eval_mode_again(xtts, voice):
    """Between the two calls that begin a stream: coqui-tts makes the object anew that knows the prefix."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", strict=True)
    request = Request(xtts, voice, 1, max_new_tokens=20, do_sample=True)
    alone = request.whole()
    real = xtts.gpt.compute_embeddings

    def embed(*arguments):
        fake = real(*arguments)
        xtts.eval()
        return fake

    vars(xtts.gpt)["compute_embeddings"] = embed
    try:
        assert_alike(request.streamed(), alone, exact=False)
    finally:
        vars(xtts.gpt)["compute_embeddings"] = real


@pytest.mark.parametrize("precision", HOST_PRECISIONS)
def test_other_weights(xtts, voice, precision):
    """Whoever comes after weights changed has the new ones; a stream that began with others goes on with coqui-tts."""
    stop_after(xtts, None)
    options = {"do_sample": True, "max_new_tokens": 30}
    changed = copy.deepcopy(xtts)
    state = {name: tensor * 1.5 if ".mlp." in name else tensor for name, tensor in changed.state_dict().items()}
    changed.load_state_dict(state)
    own = plain(Request(changed, voice, 2, **options))
    neuron_xtts.patch(changed, backend="cpu", precision=precision)
    theirs = Request(changed, voice, 1, **options).whole()[0]
    request = Request(xtts, voice, 1, **options)
    neuron_xtts.patch(xtts, backend="cpu", precision=precision)
    before = request.whole()[0]
    stream = Request(xtts, voice, 2, **options).steps()
    next(stream)
    xtts.load_state_dict(state)
    ours = request.whole()[0]
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, before)
    made = 20  # ahead, with the weights it began with
    assert torch.equal(torch.stack([code for code, _ in stream][made:], 1), own[:, made + 1 :])
    assert all_fallbacks(xtts) == {"GPT.get_generator": {"weights changed": 1}}
    assert idle(xtts)


def test_a_row_that_outgrows_the_buckets(xtts, voice):
    """It falls back, whether it steps or waits; the others, that have room, notice nothing."""
    stop_after(xtts, None)
    short, long = (Request(xtts, voice, seed, max_new_tokens=seed, do_sample=True) for seed in (15, 60))
    short.text, long.text = short.text[:, :4], long.text.repeat(1, 9)[:, :40]
    own = plain(long)
    plan = BucketPlan(decode=(64, 100), slots=(1, 2))
    neuron_xtts.patch(xtts, backend="cpu", precision="int8", buckets=plan)
    alone = short.whole()
    assert neuron_xtts.report(xtts).graphs["decode"]["1x64"].runs == 14
    ours, theirs = together(short.whole, long.whole)
    assert_alike(ours, alone, exact=True)
    assert torch.equal(theirs[0], own)
    stream = long.steps()  # waits at its last position
    codes = [next(stream)[0] for _ in range(25)]
    while True:
        codes.append(next(stream)[0])
        if len(codes) == 26:
            break
    assert_alike(short.whole(), alone, exact=True)
    codes += [code for code, _ in stream]
    assert len(codes) == 60
    reason = "larger than the largest decode bucket (100)"
    assert all_fallbacks(xtts) == {"GPT.generate": {reason: 1}, "GPT.get_generator": {reason: 1}}
    assert idle(xtts)


def test_a_fallback_does_not_wait_for_long_calls(xtts, voice):
    """It has its turn between two steps of the others, who go on afterwards as if there had been nothing."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", precision="int8")
    long = [Request(xtts, voice, seed, max_new_tokens=150) for seed in range(2)]
    alone = [request.whole() for request in long]
    done = []

    def fall_back():
        xtts.gpt.generate(voice[0], long[0].text, do_sample=True, typical_p=0.9, max_new_tokens=3)
        done.append(max(row.drawn for call in scheduler._running for row in call.rows))

    scheduler = scheduler_of(xtts)
    thread = threading.Thread(target=fall_back)

    def begin():
        thread.start()
        while not scheduler._runner.turns.wanted:  # it has come to wait for its turn
            time.sleep(0.001)

    at_tick(xtts, 3, begin)
    found = together(*(request.whole for request in long))
    thread.join()
    assert done[0] < 100
    for ours, theirs in zip(found, alone, strict=True):
        assert_alike(ours, theirs, exact=True)
    assert fallbacks(xtts, "GPT.generate") == {"argument typical_p": 1}


def test_a_stream_keeps_its_slot_beside_whole_calls(xtts, voice):
    """Else it would have it again when one of these ends, and run dry."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", precision="int8", buckets=BucketPlan(slots=(1, 2)), strict=True)
    whole = [Request(xtts, voice, seed, max_new_tokens=100) for seed in range(3)]
    stream = Request(xtts, voice, 9, do_sample=True, max_new_tokens=60)
    alone = stream.whole()
    parked, real = [], Batch.park
    Batch.park = lambda self, rows: parked.append(rows) or real(self, rows)
    try:

        def slowly():
            found = []
            for step in stream.steps():
                found.append(step)
                time.sleep(0.01)
            codes, latents = zip(*found, strict=True)
            return torch.stack(codes, 1), torch.stack(latents, 1)

        *_, ours = together(*(request.whole for request in whole), slowly)
    finally:
        Batch.park = real
    assert_alike(ours, alone, exact=True)
    assert parked == []


@pytest.fixture
def one_thread():
    """torch computes on one, or itself hangs in a forked child."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_finds_locks_open(xtts, voice, one_thread):
    """Whoever held them at the fork is not there."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu")
    request = Request(xtts, voice, 1, max_new_tokens=5)
    theirs = request.whole()[0]
    dispatcher = find_patch(xtts).dispatcher
    context = dispatcher.engines.first
    locks = [
        dispatcher.counters._lock, dispatcher.engines._lock, context.runner._counters._lock, context.latents._lock,
        context.audio._lock, *(memo._lock for memo in context.voices.values()),
    ]  # fmt: skip
    held, done = threading.Event(), threading.Event()

    def hold():
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        os._exit(0 if torch.equal(request.whole()[0], theirs) else 1)
    status = os.waitpid(child, 0)[1]
    done.set()
    thread.join()
    assert status == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork(xtts, voice, one_thread):
    """A child knows no calls but its own; a stream that its parent began is coqui-tts's there."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu")
    request, other = (Request(xtts, voice, seed, max_new_tokens=9, do_sample=True) for seed in range(2))
    theirs, others = request.whole()[0], other.whole()[0]
    steps = request.steps()
    found = [next(steps)[0]]
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        same = torch.equal(other.whole()[0], others)
        codes = torch.stack([*found, *(code for code, _ in steps)], 1)
        os._exit(0 if same and torch.equal(codes, theirs) else 1)
    assert os.waitpid(child, 0)[1] == 0
    found += [code for code, _ in steps]
    assert torch.equal(torch.stack(found, 1), theirs)
    assert all_fallbacks(xtts) == {}


@pytest.mark.slow
@pytest.mark.parametrize("precision", HOST_PRECISIONS)
def test_eight_threads(xtts, voice, monkeypatch, precision):
    """Fifty utterances each, some given up, some at fault: none lost, none mixed, nobody hangs.

    Faults are a voice of NaN, a step and a draw that raise, each in one row.
    """
    stop_after(xtts, None)
    requests = [Request(xtts, voice, seed, max_new_tokens=12, do_sample=True) for seed in range(24)]  # as streams do
    breaks = [Request(xtts, voice, seed, do_sample=True, max_new_tokens=12) for seed in (78, 79)]
    theirs = [plain(request) for request in breaks]
    neuron_xtts.patch(xtts, backend="cpu", precision=precision)
    alone = [request.whole() for request in requests]
    bad = Request(xtts, voice, 77, do_sample=True)
    bad.voice = bad.voice * float("nan")
    real_step, real_draw = Batch.step, scheduler_module.draw

    def seeds(rows):
        return {row.sampler.generator.initial_seed() for row in rows if row.sampler.generator and row.drawn > 1}

    def step(self, rows, given):
        return 1 / 0 if 78 in seeds(rows) else real_step(self, rows, given)

    def draw(rows, scores):
        return 1 / 0 if 79 in seeds(rows) else real_draw(rows, scores)

    monkeypatch.setattr(Batch, "step", step)
    monkeypatch.setattr(scheduler_module, "draw", draw)

    def work(number):
        choose, failed = random.Random(number), Counter()
        for _ in range(50):
            which = choose.randrange(len(requests))
            kind = choose.random()
            if kind < 0.5:
                assert_alike(requests[which].whole(), alone[which], exact=precision != "fp32")
            elif kind < 0.8:
                assert_alike(requests[which].streamed(), alone[which], exact=precision != "fp32")
            elif kind < 0.9:
                few = choose.randint(1, 5)
                codes, latents = requests[which].streamed(few)
                assert_alike((codes, latents), [part[:, :few] for part in alone[which]], exact=precision != "fp32")
            elif kind < 0.95:
                with pytest.raises(RuntimeError, match="probability tensor"):
                    bad.whole()
                failed["logits that are not finite"] += 1
            else:
                which = choose.randrange(2)
                assert torch.equal(breaks[which].whole()[0], theirs[which])
                failed["ZeroDivisionError: division by zero"] += 1
        return failed

    results = together(*(lambda number=number: work(number) for number in range(8)))
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert fallbacks(xtts, "GPT.generate") == sum(results, Counter())
    assert idle(xtts)


def test_the_report(xtts, voice):
    """How many rows steps had, who waits, and for how long they did."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", buckets=BucketPlan(slots=(1, 2)))
    requests = [Request(xtts, voice, seed, max_new_tokens=30) for seed in range(3)]
    requests[0].whole()
    alone = neuron_xtts.report(xtts)
    assert alone.batch.steps == {1: 29}
    assert "steps of rows" not in str(alone)
    streams = [request.steps() for request in requests]
    for stream in streams:
        next(stream)
    batch = neuron_xtts.report(xtts).batch
    assert (batch.slots, batch.decoding, batch.waiting, batch.calls) == (2, 2, 0, 4)
    assert batch.cancelled == 0
    del streams, stream
    meet(xtts, 3)
    together(*(request.whole for request in requests))
    report = neuron_xtts.report(xtts)
    assert (report.batch.decoding, report.batch.waiting, report.batch.calls) == (0, 0, 7)
    assert (report.batch.cancelled, report.batch.refused) == (3, 0)  # the streams, which nobody heard to the end
    assert report.batch.longest >= report.batch.seconds / 7 > 0
    assert report.to_dict()["batch"]["steps"][2] > 5
    assert "of 2" in str(report)
    xtts.gpt.generate(voice[0], torch.arange(1, 9)[None], do_sample=True, num_return_sequences=3, max_new_tokens=5)
    assert fallbacks(xtts, "GPT.generate") == {"larger than the largest decode bucket (2)": 1}
    assert neuron_xtts.report(xtts).batch.cancelled == 3  # nobody gave that one up


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
def test_who_waits_has_no_team(xtts, voice):
    """It would slow down the one that computes for all: with more threads than processors, none waits awake."""
    stop_after(xtts, None)
    neuron_xtts.patch(xtts, backend="cpu", strict=True)
    requests = [Request(xtts, voice, seed, max_new_tokens=300) for seed in range(4)]
    before, counts = len(os.listdir("/proc/self/task")), []
    real = scheduler_of(xtts)._tick

    def tick():
        worked = real()
        counts.append(len(os.listdir("/proc/self/task")))
        return worked

    def say(request):
        torch.set_num_threads(2)
        torch.exp(torch.randn(600, 600))  # embeddings of a model of full size
        request.whole()

    scheduler_of(xtts)._tick = tick
    together(*(lambda request=request: say(request) for request in requests))
    assert max(neuron_xtts.report(xtts).batch.steps) == 4
    assert sorted(counts)[len(counts) // 2] <= before + len(requests) + 1, (before, counts)


def test_audio_of_many(xtts, voice):
    """Whole utterances and streams through the public calls: each has the audio that it has alone."""
    options = {"max_new_tokens": 40, **stop_after(xtts, 33)}
    texts = [f"song number {number}" + " la" * number for number in range(6)]

    def say(number, **seed):
        if number % 2:
            chunks = xtts.inference_stream(texts[number], "en", *voice, **seed, **options)
            return torch.cat(list(chunks)).numpy()
        return xtts.inference(texts[number], "en", *voice, **seed, **options)["wav"]

    theirs = []
    for number in range(6):
        torch.manual_seed(number)
        theirs.append(say(number))
    neuron_xtts.patch(xtts, backend="cpu", strict=True)
    found = together(*(lambda number=number: say(number, seed=number) for number in range(6)))
    for ours, expected in zip(found, theirs, strict=True):
        if isinstance(ours, BaseException):
            raise ours
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    assert all_fallbacks(xtts) == {}


def test_windows_are_short_while_a_stream_is_open(xtts, voice):
    """So that nobody waits for a long one; the audio is the same, and the stream's own windows are as they were."""
    stop_after(xtts, None)
    latents = [torch.randn(1, 150, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    with torch.inference_mode():
        theirs = [xtts.hifigan_decoder(each, g=voice[1]) for each in latents]

    def windows(make):
        neuron_xtts.patch(xtts, backend="cpu", strict=True)
        stream = Request(xtts, voice, 1, do_sample=True, max_new_tokens=60).steps()
        return make(stream), [int(size) for size in neuron_xtts.report(xtts).graphs["vocoder"]]

    @torch.inference_mode()
    def vocode(number):
        ours = xtts.hifigan_decoder(latents[number], g=voice[1])
        torch.testing.assert_close(ours, theirs[number], rtol=0, atol=1e-5)

    _, alone = windows(lambda stream: vocode(0))
    _, beside = windows(lambda stream: (next(stream), in_a_thread(lambda: vocode(1))))
    _, its_own = windows(lambda stream: (next(stream), vocode(2)))
    assert max(alone) > 135
    assert max(beside) == 135
    assert its_own == alone


def in_a_thread(call):
    """What a call gives in a thread of its own."""
    (result,) = together(call)
    if isinstance(result, BaseException):
        raise result
    return result
