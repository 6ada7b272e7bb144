"""Several codes in one call: what is drawn is what the host draws from the same logits with the same generator."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import speak
from hypothesis import given, settings
from hypothesis import strategies as st

import neuron_xtts
from neuron_xtts import BucketPlan, Precision
from neuron_xtts.backends.neuron.verification import deviations
from neuron_xtts.coqui.embeddings import embed_codes
from neuron_xtts.coqui.recognise import make_graphs
from neuron_xtts.coqui.surface import Networks
from neuron_xtts.decoding.draws import Waits
from neuron_xtts.decoding.row import draw, make_rows, note, rules_of
from neuron_xtts.decoding.sampling import Sampler, Sampling
from neuron_xtts.graphs import codes as codes_module
from neuron_xtts.graphs.codes import Codes, Drawn, Rules

STOP, START, CODES = 1025, 1024, 1026


def drawn_by_graph(rows, logits, waits, stop):
    """The codes (R,) that the graph's arithmetic draws for rows, from ``logits`` (R, V)."""
    seen, rules = rules_of(rows, logits.shape[1])
    named = Rules(*rules.unsqueeze(2).unbind(1))
    drawn = Drawn(torch.zeros(len(rows), dtype=torch.int32), seen, named.stopped)
    _, chances = codes_module._chances(logits, drawn, named, waits, 0, stop)
    return codes_module._next(chances, drawn, stop)


def samplings():
    return st.builds(
        Sampling,
        do_sample=st.booleans(),
        draws=st.booleans(),
        temperature=st.sampled_from([0.05, 0.5, 0.75, 1.0, 1.7, 8.0]),
        top_k=st.sampled_from([0, 1, 2, 5, 20, 50, 1025, 1026, 5000]),
        top_p=st.sampled_from([0.0, 0.05, 0.5, 0.85, 0.99, 1.0]),
        repetition_penalty=st.sampled_from([0.5, 1.0, 2.0, 10.0]),
        min_new_tokens=st.sampled_from([0, 3, 100]),
        max_new_tokens=st.just(200),
    )


@settings(max_examples=400, deadline=None)
@given(
    chosen=st.lists(samplings(), min_size=1, max_size=3),
    vocabulary=st.sampled_from([26, 1026]),
    scale=st.sampled_from([0.1, 1.0, 6.0, 40.0]),
    had=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)
def test_a_draw(chosen, vocabulary, scale, had, seed):
    """Every sampling, alone and beside others, whatever the codes so far and however the logits lie."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(len(chosen), vocabulary, generator=generator)
    stop, samplers, waits, rows = vocabulary - 1, [], [], []
    for number, sampling in enumerate(chosen):
        samplers.append(Sampler(sampling, 7, stop, torch.Generator().manual_seed(seed + number)))
        (row,) = make_rows(samplers[-1], 1, vocabulary - 2)
        row.ids = torch.cat([row.ids, torch.randint(vocabulary - 2, (had,), generator=generator)])
        rows.append(row)
        waits.append(Waits(samplers[-1].source, 1, 1, vocabulary))
    ours = drawn_by_graph(rows, logits, torch.cat([each.waits for each in waits])[:, 0], stop)
    for each in waits:
        each.keep(0)  # so that the host draws with the same numbers
    theirs = draw(rows, logits)
    assert ours.tolist() == theirs.tolist()


def test_what_was_not_needed_is_given_back():
    """But for what somebody else has drawn since."""
    source = torch.Generator().manual_seed(3)
    expected = [torch.empty(2, 9).exponential_(generator=source) for _ in range(4)]
    source.manual_seed(3)
    waits = Waits(source, 2, 3, 9)
    assert torch.equal(waits.waits, torch.stack(expected[:3], dim=1))
    waits.keep(1)
    assert torch.equal(torch.empty(2, 9).exponential_(generator=source), expected[1])
    source.manual_seed(3)
    waits = Waits(source, 2, 3, 9)
    assert torch.equal(torch.empty(2, 9).exponential_(generator=source), expected[3])
    state = source.get_state()
    waits.keep(1)
    assert torch.equal(source.get_state(), state)
    assert torch.equal(Waits(None, 2, 3, 9).waits, torch.ones(2, 3, 9))


@pytest.fixture(scope="module")
def graphs(tts_original):
    graphs, unfit = make_graphs(Networks.of(tts_original.synthesizer.tts_model))
    assert not unfit
    return graphs


def test_tables_of_another_kind(xtts, voice):
    """Only the graph that embeds codes is lacking, and only a plan with several steps says so."""
    xtts.gpt.mel_embedding.max_norm = 1e6
    reason = "embeddings of codes with a largest norm"
    assert make_graphs(Networks.of(xtts))[1] == {"codes": reason}
    neuron_xtts.patch(xtts, backend="cpu")
    assert neuron_xtts.report(xtts).missing == {}
    assert speak(xtts, voice, max_new_tokens=5)[0]["gpt_latents"].shape[1] == 5
    xtts.gpt.mel_pos_embedding.__class__ = type("Other", (type(xtts.gpt.mel_pos_embedding),), {})
    assert make_graphs(Networks.of(xtts))[1] == {"codes": "a Other where a LearnedPositionEmbeddings belongs"}


@torch.no_grad()
def test_steps(graphs, tts_original):
    """Codes, latents, logits and the cache of a call are those of as many steps with draws between them."""
    gpt = tts_original.synthesizer.tts_model.gpt
    steps, positions = 4, [9, 3, 20]
    graph = graphs["codes"]
    assert isinstance(graph, Codes)
    shapes = graph.trunk.cache_shapes(len(positions), 24)
    ours = [torch.randn(shape) for shape in shapes]
    theirs = [tensor.clone() for tensor in ours]
    rows, sources = [], []
    for number, sampling in enumerate((
        Sampling(do_sample=True, temperature=0.7, top_k=9, top_p=0.8, repetition_penalty=3.0, max_new_tokens=50),
        Sampling(min_new_tokens=3, max_new_tokens=50),
        Sampling(do_sample=True, max_new_tokens=50),
    )):  # fmt: skip
        sources.append(torch.Generator().manual_seed(number))
        rows += make_rows(Sampler(sampling, 5, STOP, sources[-1]), 1, START)
    rows[2].stopped = True
    latest = torch.tensor([3, 500, STOP])
    note(rows, latest)
    waits = [Waits(row.sampler.source, 1, steps, CODES) for row in rows]
    given = (
        latest.int(),
        torch.tensor([row.drawn for row in rows]).int(),
        *rules_of(rows, CODES),
        torch.cat([each.waits for each in waits]),
    )
    codes, latents, logits, _ = graph(*graph.arrange(given, range(3), positions, 24), *ours)
    for each in waits:
        each.keep(0)
    for step in range(steps):
        embeds = embed_codes(gpt, latest, [row.drawn for row in rows])
        at = [position + step for position in positions]
        expected = graphs["decode"](*graphs["decode"].arrange((embeds,), range(3), at, 24), *theirs)
        torch.testing.assert_close(latents[:, step], expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(logits[:, step], expected[1], rtol=0, atol=1e-6)
        latest = draw(rows, expected[1])
        assert codes[:, step].tolist() == latest.tolist()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert codes[2].tolist() == [STOP] * steps


@torch.no_grad()
def test_the_end_of_a_cache(graphs):
    """Rows that have no position left write the last one, and read and write nothing elsewhere; other rows go on."""
    graph = graphs["codes"]
    cache = [torch.randn(shape) for shape in graph.trunk.cache_shapes(2, 12)]
    before = [tensor.clone() for tensor in cache]
    outputs = graph(*graph.arrange(graph.given(2, 4), range(2), [10, 3], 12), *cache)
    assert all(output.isfinite().all() for output in outputs)
    for old, new in zip(before, cache, strict=True):
        assert torch.equal(old[0, :, :10], new[0, :, :10])
        assert (old[0, :, 10:] != new[0, :, 10:]).all()
        assert torch.equal(old[1, :, 7:], new[1, :, 7:])
        assert (old[1, :, 3:7] != new[1, :, 3:7]).all()


@torch.no_grad()
def test_logits_that_are_not_finite(graphs):
    """No code is out of the table's range, whatever comes out of the head."""
    graph = graphs["codes"]
    seen, rules, waits = graph.given(1, 4)[2:]
    drawn = Drawn(torch.zeros(1, dtype=torch.int32), seen, torch.zeros(1, 1))
    for value in (torch.nan, torch.inf, -torch.inf):
        _, chances = codes_module._chances(
            torch.full_like(seen, value), drawn, Rules(*rules.unsqueeze(2).unbind(1)), waits[:, 0], 0, STOP
        )
        assert 0 <= int(codes_module._next(chances, drawn, STOP)) < CODES


@torch.no_grad()
def test_what_a_device_is_to_return(graphs):
    """Of the codes that it drew; a code that it was not to draw is found, one nearly as likely is as good."""
    graph = graphs["codes"]
    module = graph.in_bucket(2, 40, 3)
    for state in module.states:
        state.normal_()
    inputs = list(graph.example(2, 40, 3).values())
    found = module(*inputs)
    for a, b in zip(found, module.expected(inputs, found), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=1e-6)
    wrong = found[0].clone()
    wrong[0, 1] = (wrong[0, 1] + 1) % CODES
    expected = module.expected(inputs, (wrong, *found[1:]))
    assert expected[0][0].tolist() != wrong[0].tolist()
    assert expected[0][1].tolist() == wrong[1].tolist()  # the other row is none the worse
    torch.testing.assert_close(expected[2][:, :2], found[2][:, :2], rtol=0, atol=1e-6)
    assert not torch.allclose(expected[2][0, 2], found[2][0, 2], atol=1e-3)  # it goes on from what was drawn
    shares = torch.softmax(found[2][1, 0], -1)
    inputs[3][1] = torch.tensor(Rules(1.0, 1.0, CODES, -1.0, 0, 1, 0))
    inputs[4][1, 0] = shares / torch.where(torch.arange(CODES) < 2, 1.0, 0.5)  # two codes that are alike, and better
    inputs[4][1, 0, 1] *= 1 + 1e-5
    for code in (0, 1):
        drew = found[0].clone()
        drew[1, 0] = code
        assert module.expected(inputs, (drew, *found[1:]))[0][1, 0] == code


SOURCE = Path(codes_module.__file__).read_text()
# A device's ways to draw wrongly: what it does in place of what is written.
WRONG = {
    "nothing": ("", ""),
    "codes that were had": ("torch.where(drawn.seen > 0, punished, logits)", "logits"),
    "codes of this call": ("return Drawn(codes, seen,", "return Drawn(codes, self.seen,"),
    "the early stop": ("(rules.early > step)", "(rules.early > 99)"),
    "that time goes on": ("(rules.early > step)", "(rules.early > 0)"),
    "top-p": ("there = there & ((scores > cut) | (scores >= top))", "pass"),
    "top-k": ("there = there & (scores >= kept)", "pass"),
    "one of top-k": ("torch.ge(count, rules.kept)", "torch.ge(count, rules.kept + 1)"),
    "the temperature": (" / rules.temperature", ""),
    "what is drawn with": ("torch.where(there, shares, 0.0) / waits", "torch.where(there, shares, 0.0)"),
    "whether it draws": ("rules.draws > 0", "rules.draws > -1"),
    "that a row has stopped": ("where(drawn.stopped > 0, float(stop)", "where(drawn.stopped > 9, float(stop)"),
    "where a step writes": ("at = torch.clamp(positions + step,", "at = torch.clamp(positions + min(step, 2),"),
    "the place": ("torch.clamp(places + step,", "torch.clamp(places,"),
    "the end of places": ("torch.clamp(places + step, max=self.places.num_embeddings - 1)",
                          "(places + step) % self.places.num_embeddings"),
    "the code": ("self.codes(drawn.codes)", "self.codes(codes)"),
    "what it sees": ("slots <= at.unsqueeze(1)", "slots <= positions.unsqueeze(1)"),
}  # fmt: skip


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("ignored", WRONG)
@torch.no_grad()
def test_a_device_that_ignores(graphs, ignored, slots):
    """Verification notices it, in fp32 at least, with one row and with several."""
    before, after = WRONG[ignored]
    assert before in SOURCE
    module = ModuleType(codes_module.__name__)
    exec(compile(SOURCE.replace(before, after) if before else SOURCE, "wrong", "exec"), vars(module))
    graph = graphs["codes"]
    wrong = module.Codes(graph.decode, module.CodeTables(graph.codes, graph.places, graph.stop))
    compiled = OnHost(wrong.in_bucket(slots, 80, 4))
    tolerance = Precision().tolerance("codes", "inf2")
    found = [each for each in deviations(compiled, graph, (slots, 80, 4)) if each.beyond(tolerance)]
    assert bool(found) == (ignored != "nothing"), found


class OnHost:
    """A compiled graph whose device is the host."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *inputs):
        outputs = self.module(*inputs)
        for state, new in zip(self.module.states, outputs[self.module.outputs :], strict=True):
            state.copy_(new)
        return outputs[: self.module.outputs]

    def write(self, contents):
        for state, content in zip(self.module.states, contents, strict=True):
            state.copy_(content)

    def read(self):
        return [state.clone() for state in self.module.states]


@torch.no_grad()
def test_ties(graphs):
    """Codes that are exactly as likely are kept or left out together: at top-k as on the host, at top-p all of them."""
    (row,) = make_rows(Sampler(Sampling(do_sample=True, top_k=0, top_p=0.85, max_new_tokens=9), 7, STOP), 1, START)
    seen, rules = rules_of([row], CODES)
    drawn = Drawn(torch.zeros(1, dtype=torch.int32), seen, torch.zeros(1, 1))
    logits = torch.zeros(1, CODES)
    logits[0, 5] = 9
    shown, _ = codes_module._chances(logits, drawn, Rules(*rules.unsqueeze(2).unbind(1)), torch.ones(1, CODES), 0, STOP)
    assert int((shown == 9).sum()) in (1, CODES)


@pytest.mark.parametrize("steps", [0, -1, 2.0, (4,), True, None])
def test_steps_that_are_none(steps):
    with pytest.raises(ValueError, match=r"BucketPlan.steps is .*; expected a positive whole number"):
        BucketPlan(steps=steps)


def test_a_plan_has_one_graph_that_decodes():
    one, several = BucketPlan(decode=(9,), slots=(1, 2)), BucketPlan(decode=(9,), slots=(1, 2), steps=3)
    assert (one.decoder, one.wants("codes"), one.wants("decode")) == ("decode", False, True)
    assert (several.decoder, several.wants("codes"), several.wants("decode")) == ("codes", True, False)
    assert several.buckets("codes") == one.buckets("decode") == [(1, 9), (2, 9)]
    assert several.buckets("decode") == one.buckets("codes") == []
    assert (several.room("codes", (1, 9)), one.room("decode", (1, 9))) == ((3,), ())
