"""Rows and batches by themselves: rows that join, step, wait and leave, against the whole sequence at once."""

import copy
from itertools import accumulate

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import neuron_xtts
from neuron_xtts import BucketPlan
from neuron_xtts.coqui.recognise import make_graphs
from neuron_xtts.coqui.surface import Networks
from neuron_xtts.decoding.batch import Batch
from neuron_xtts.decoding.row import codes_of, draw, ended, make_rows
from neuron_xtts.decoding.sampling import Sampler, Sampling
from neuron_xtts.patching.patch import find_patch

PLANS = {
    "exact": BucketPlan(),
    "padded": BucketPlan(prefill=(12, 40), decode=(24, 64), slots=(2, 5)),
}


@pytest.fixture(scope="module")
def xtts(tts_original):
    """Patched anew by each test."""
    return copy.deepcopy(tts_original.synthesizer.tts_model)


class Speaker:
    """A row with a random sequence of embeddings to feed it, and the latents that they must give."""

    def __init__(self, xtts, prefix, length, seed):
        generator = torch.Generator().manual_seed(seed)
        self.embeds = torch.randn(1, length, 64, generator=generator)
        (self.row,) = make_rows(Sampler(Sampling(max_new_tokens=length), prefix, stop_code=25), 1, start_code=24)
        self.expected = make_graphs(Networks.of(xtts))[0]["latents"](self.embeds)[0][0]
        self.head = xtts.gpt.mel_head

    @property
    def prefix(self):
        return self.embeds[:, : self.row.sampler.prefix_length]

    @property
    def done(self):
        return self.row.position == len(self.expected)

    @property
    def next(self):
        """The embedding (1, 1, D) that comes next."""
        return self.embeds[:, self.row.position : self.row.position + 1]

    def check(self, latents, logits):
        """Of the position written last."""
        expected = self.expected[self.row.position - 1]
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, self.head(expected), rtol=1e-4, atol=1e-4)


def step(batch, speakers):
    embeds = torch.cat([speaker.next for speaker in speakers])
    outputs = batch.step([speaker.row for speaker in speakers], (embeds,))
    for speaker, latents, logits in zip(speakers, *outputs, strict=True):
        speaker.row.position += 1
        speaker.check(latents, logits)


def admit(batch, speaker):
    for outputs in zip(*batch.admit([speaker.row], speaker.prefix), strict=True):
        speaker.check(*outputs)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@settings(max_examples=25, deadline=None, report_multiple_bugs=False, phases=[Phase.explicit, Phase.generate])
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=2, max_size=7),
    choices=st.randoms(use_true_random=False),
)
@torch.no_grad()
def test_rows_that_join_wait_and_leave(xtts, plan, lengths, choices):
    """At every step some row joins, some step, in any order, and whoever is done leaves its slot to the next."""
    neuron_xtts.patch(xtts, backend="cpu", buckets=PLANS[plan])
    batch = Batch(find_patch(xtts).runner)
    waiting = [Speaker(xtts, prefix, prefix + codes, seed) for seed, (prefix, codes) in enumerate(lengths)]
    speaking, finished = [], 0
    while waiting or speaking:
        if waiting and len(speaking) < 2 and (not speaking or choices.random() < 0.5):
            speaking.append(waiting.pop(0))
            admit(batch, speaking[-1])
        stepping = choices.sample(speaking, choices.randint(1, len(speaking)))
        step(batch, stepping)
        done = [speaker for speaker in speaking if speaker.done]
        batch.release([speaker.row for speaker in done])
        assert all(speaker.row.slot is None for speaker in done)
        speaking = [speaker for speaker in speaking if not speaker.done]
        finished += len(done)
    assert finished == len(lengths)


@torch.no_grad()
def test_rows_of_one_prefix(xtts):
    """It runs once, and its rows go ways of their own."""
    neuron_xtts.patch(xtts, backend="cpu")
    batch = Batch(find_patch(xtts).runner)
    speakers = [Speaker(xtts, 9, 14, seed) for seed in range(3)]
    for speaker in speakers[1:]:
        speaker.embeds[:, :9] = speakers[0].embeds[:, :9]
        speaker.expected = make_graphs(Networks.of(xtts))[0]["latents"](speaker.embeds)[0][0]
    outputs = batch.admit([speaker.row for speaker in speakers], speakers[0].prefix)
    for speaker, latents, logits in zip(speakers, *outputs, strict=True):
        speaker.check(latents, logits)
    assert neuron_xtts.report(xtts).graphs["prefill"]["exact"].runs == 1
    for _ in range(5):
        step(batch, speakers)
    keys = [batch.cache([speaker.row]).layers[0].keys for speaker in speakers]
    assert torch.equal(keys[0][:, :, :9], keys[1][:, :, :9])
    assert not torch.equal(keys[0][:, :, 9:], keys[1][:, :, 9:])


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_room(xtts, plan):
    """Of a plan, or else of the host; without slots no row steps, and one that leaves makes room."""
    neuron_xtts.patch(xtts, backend="cpu", buckets=PLANS[plan])
    batch = Batch(find_patch(xtts).runner)
    assert batch.most == batch.free == (5 if plan == "padded" else 16)
    speakers = [Speaker(xtts, 5, 9, seed) for seed in range(batch.most)]
    with pytest.raises(ValueError, match="admit it first"):
        batch.step([speakers[0].row], (speakers[0].next,))
    for number, speaker in enumerate(speakers):
        assert batch.free == batch.most - number
        admit(batch, speaker)
        if not speaker.done:
            step(batch, [speaker])
    assert not batch.has_room(1)
    batch.release([speakers[1].row])
    assert batch.has_room(1)
    batch.release([speaker.row for speaker in speakers])
    assert batch.has_room(99)  # where nobody is, a call may have as many rows as it likes


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_rows_that_make_room(xtts, plan):
    """One that was taken out and brought back, into another slot, goes on as if it had never left."""
    neuron_xtts.patch(xtts, backend="cpu", buckets=PLANS[plan])
    batch = Batch(find_patch(xtts).runner)
    speakers = [Speaker(xtts, 5, 20, seed) for seed in range(3)]
    for speaker in speakers[:2]:
        admit(batch, speaker)
    for _ in range(3):
        step(batch, speakers[:2])
    parked = batch.park([speakers[0].row])
    admit(batch, speakers[2])
    for _ in range(3):
        step(batch, speakers[1:])
    batch.bring_back(parked)
    assert speakers[0].row.slot == 2
    for _ in range(5):
        step(batch, speakers)


def rows_of(count=1, generator=None, **options):
    sampling = Sampling(**{"do_sample": True, "max_new_tokens": 6} | options)
    return make_rows(Sampler(sampling, 3, stop_code=9, generator=generator), count, start_code=8)


def one_hot(*best):
    return torch.nn.functional.one_hot(torch.tensor(best), 10).float()


def test_rows_end_together():
    """One that has stopped goes on with stop codes until the last has."""
    rows = rows_of(count=2, top_k=1)
    for best in ((4, 5), (9, 5), (4, 9)):
        assert not ended(rows)
        draw(rows, one_hot(*best))
    assert ended(rows)
    assert [row.ids.tolist() for row in rows] == [[1, 1, 8, 4, 9, 9], [1, 1, 8, 5, 5, 9]]
    assert codes_of(rows).tolist() == [[4, 9, 9], [5, 5, 9]]
    assert [row.drawn for row in rows] == [3, 3]


def test_rows_end_when_enough_was_drawn():
    rows = rows_of()
    for _ in range(6):
        assert not ended(rows)
        draw(rows, torch.zeros(1, 10).index_fill(1, torch.tensor([9]), -torch.inf))
    assert ended(rows)
    assert not rows[0].stopped


def drawn(logits, *calls):
    """The codes of calls that draw side by side."""
    for scores in logits:
        draw([row for rows in calls for row in rows], scores)
    return [codes_of(rows) for rows in calls]


def test_a_generator_of_its_own():
    """The same seed draws the same codes, whatever the global generator did, which stays as it was."""
    logits, found = torch.randn(6, 2, 10), []
    for seed in (5, 5, 6):
        torch.manual_seed(len(found))
        before = torch.get_rng_state()
        found += drawn(logits, rows_of(count=2, generator=torch.Generator().manual_seed(seed)))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def settings_of_calls():
    return st.lists(
        st.fixed_dictionaries(
            {"count": st.integers(1, 3), "do_sample": st.booleans(), "draws": st.booleans()},
            optional={
                "temperature": st.sampled_from([0.1, 0.75, 1.0, 3.0]),
                "top_k": st.sampled_from([0, 1, 4, 10, 50]),
                "top_p": st.sampled_from([0.05, 0.3, 0.85, 1.0]),
                "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 10.0]),
                "min_new_tokens": st.integers(0, 6),
            },
        ),
        min_size=2,
        max_size=6,
    )


@settings(max_examples=150, deadline=None)
@given(calls=settings_of_calls(), seed=st.integers(0, 2**31), scale=st.sampled_from([0.0, 1.0, 30.0]))
def test_calls_that_draw_side_by_side(calls, seed, scale):
    """Each draws what it draws alone, with settings, length and generator of its own."""
    rows = sum(options["count"] for options in calls)
    logits = scale * torch.randn(6, rows, 10, generator=torch.Generator().manual_seed(seed))

    def begun():
        return [rows_of(generator=torch.Generator().manual_seed(i), **options) for i, options in enumerate(calls)]

    for together, made, end in zip(
        drawn(logits, *begun()), begun(), accumulate(o["count"] for o in calls), strict=True
    ):
        assert torch.equal(drawn(logits[:, end - len(made) : end], made)[0], together)


def test_that_another_draw_would_be_seen():
    """At real width: were a setting of one row taken for another's, or a generator, other codes would come."""
    logits = 3 * torch.randn(8, 2, 1026)

    def codes(temperature, seed):
        pair = [
            make_rows(
                Sampler(
                    Sampling(do_sample=True, max_new_tokens=9, **options), 3, 1025, torch.Generator().manual_seed(i)
                ),
                1,
                1024,
            )
            for i, options in ((seed, {"temperature": temperature, "top_p": 0.85}), (1, {"repetition_penalty": 10.0}))
        ]
        return drawn(logits, *pair)

    first, second = codes(0.75, 0)
    for changed in (codes(1.5, 0), codes(0.75, 2)):
        assert not torch.equal(changed[0], first)
        assert torch.equal(changed[1], second)
