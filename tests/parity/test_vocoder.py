"""The vocoder's memo: what is vocoded again, what is not, and that the audio is coqui-tts's own either way."""

import copy

import pytest
import torch
from helpers import all_fallbacks, assert_same_chunks, stop_after, stream
from hypothesis import given, settings
from hypothesis import strategies as st

import neuron_xtts
from neuron_xtts import BucketPlan
from neuron_xtts.routes.memo import AudioMemo, common_length

PLANS = {
    "default": None,
    "exact": BucketPlan(),
    "static": BucketPlan.static(),
    "one window": BucketPlan(vocoder=(40,)),
}
FRAMES_PER_CODE = 4 * 24000 / 22050


def work(model):
    """Frames that went through the vocoder graph, with halo and padding."""
    return sum(counts.padded for counts in neuron_xtts.report(model).graphs["vocoder"].values())


def frames(codes, speed=1.0):
    return int(codes / speed * FRAMES_PER_CODE)


@pytest.mark.slow
@pytest.mark.parametrize("speed", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("size", [5, 20])
def test_frames_vocoded(xtts, voice, speed, size):
    """A stream of N frames vocodes N, and at most 40 more with every chunk."""
    options = {"max_new_tokens": 110, "stream_chunk_size": size, "speed": speed, **stop_after(xtts, None)}
    theirs = stream(xtts, voice, **options)
    neuron_xtts.patch(xtts, strict=True)
    assert_same_chunks(stream(xtts, voice, **options), theirs)
    chunks = len(theirs[0])
    assert frames(110, speed) < work(xtts) <= frames(110, speed) + 40 * chunks
    again = work(xtts)
    assert_same_chunks(stream(xtts, voice, **options), theirs)  # all of it is known by now
    assert work(xtts) - again <= 40 * chunks


@pytest.mark.parametrize("plan", ["default", "static"])
@pytest.mark.parametrize("codes", [3, 10, 31, 55])
def test_a_window_that_holds_all_of_it(xtts, voice, plan, codes):
    """The smallest there is, and no smaller ones that are joined in its place."""
    neuron_xtts.patch(xtts, strict=True, buckets=PLANS[plan])
    holding = [size for size in neuron_xtts.report(xtts).buckets["vocoder"] if size >= frames(codes)]
    with torch.inference_mode():
        xtts.hifigan_decoder(torch.randn(1, codes, 64), g=voice[1])
    ((size, counts),) = neuron_xtts.report(xtts).graphs["vocoder"].items()
    assert (int(size), counts.runs) == (holding[0], 1)


def test_ten_times_less(xtts, voice):
    """600 codes in chunks of 20, against all frames so far for every chunk."""
    options = {"max_new_tokens": 600, "min_new_tokens": 600, "text": "a"}
    neuron_xtts.patch(xtts, strict=True)
    chunks, _ = stream(xtts, voice, **options)
    unpatched = sum(frames(min(20 * (i + 1), 600)) for i in range(len(chunks)))
    assert unpatched / work(xtts) > 10


def test_streams_of_one_voice_in_turns(xtts, voice):
    """Each is found again after the others: the work of two is that of one and one."""
    options = {"max_new_tokens": 80, "top_k": 1, **stop_after(xtts, None)}
    texts = ("one.", "another one.", "a third one, which is longer.")
    alone = [stream(xtts, voice, text, **options)[0] for text in texts]
    neuron_xtts.patch(xtts, strict=True)
    streams = [xtts.inference_stream(text, "en", *voice, **options) for text in texts]
    for chunks in zip(*streams, *map(iter, alone), strict=True):
        for ours, theirs in zip(chunks[:3], chunks[3:], strict=True):
            torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=1e-5)
    assert work(xtts) <= 3 * (frames(80) + 40 * len(alone[0]))


@pytest.fixture(scope="module", params=PLANS)
def decoders(tts_original, request):
    """The vocoder as it is, and patched; tests share what the second remembers."""
    plain = copy.deepcopy(tts_original.synthesizer.tts_model)
    patched = copy.deepcopy(plain)
    neuron_xtts.patch(patched, buckets=PLANS[request.param], strict=True)
    yield plain.hifigan_decoder, patched.hifigan_decoder
    neuron_xtts.unpatch(patched)


STEPS = st.tuples(
    st.sampled_from(["append", "cut", "change", "speaker", "repeat", "other"]), st.integers(0, 40), st.integers(1, 25)
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(steps=st.lists(STEPS, min_size=2, max_size=6), seed=st.integers(0, 2**31))
def test_any_sequence_of_calls(decoders, voice, steps, seed):
    """Latents that go on, end earlier, differ from some row on, of another speaker, or have nothing in common."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 10 * torch.randn(*shape, generator=generator)  # loud enough for a stale frame to be heard

    latents, speaker = draw(1, 12, 64), voice[1]
    with torch.inference_mode():
        for step, at, rows in steps:
            if step == "append":
                latents = torch.cat([latents, draw(1, rows, 64)], dim=1)
            elif step == "cut":
                latents = latents[:, : max(1, latents.shape[1] - rows)]
            elif step == "change":
                row = min(at, latents.shape[1] - 1)
                latents = latents.clone()
                latents[:, row, at] += 20
            elif step == "speaker":
                speaker = draw(1, 512, 1)
            elif step == "other":
                latents = draw(1, rows, 64)
            theirs, ours = (decoder(latents, g=speaker) for decoder in decoders)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            ours.zero_()  # as coqui-tts writes its cross-fades into what it gets


def test_rows(decoders, voice):
    """Each is remembered by itself."""
    latents = torch.randn(3, 20, 64)
    speakers = torch.cat([voice[1], -voice[1], voice[1]])
    with torch.inference_mode():
        for length in (10, 15, 20):
            theirs, ours = (decoder(latents[:, :length], g=speakers) for decoder in decoders)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        theirs, ours = (decoder(latents[1:2], g=speakers[1:2]) for decoder in decoders)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def write(xtts):
    xtts.hifigan_decoder.waveform_decoder.resblocks[3].convs1[1].bias.add_(5)


def replace(xtts):
    block = xtts.hifigan_decoder.waveform_decoder.resblocks[4]
    block.convs2[0] = torch.nn.Conv1d(block.convs2[0].in_channels, block.convs2[0].out_channels, 3, padding=1)
    torch.nn.init.constant_(block.convs2[0].bias, 1)
    torch.nn.init.constant_(block.convs2[0].weight, 0.01)


@pytest.mark.parametrize("change", [write, replace])
@torch.no_grad()
def test_a_vocoder_that_changed(xtts, voice, change):
    """Between two chunks: nothing of the old one is in the audio."""
    plain = copy.deepcopy(xtts)
    neuron_xtts.patch(xtts, strict=True)
    latents = torch.randn(1, 40, 64)
    before = xtts.hifigan_decoder(latents[:, :30], g=voice[1])
    for model in (xtts, plain):
        change(model)
    for length in (30, 40):
        ours, theirs = (model.hifigan_decoder(latents[:, :length], g=voice[1]) for model in (xtts, plain))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (theirs[:, :, : 20 * 1024] - before[:, :, : 20 * 1024]).abs().max() > 1e-3


@torch.no_grad()
def test_all_of_it_known(xtts, voice):
    latents = torch.randn(1, 30, 64)
    neuron_xtts.patch(xtts, buckets=BucketPlan(), strict=True)
    first = xtts.hifigan_decoder(latents, g=voice[1])
    assert torch.equal(xtts.hifigan_decoder.inference(latents.clone(), voice[1]), first)
    assert work(xtts) == frames(30)
    routes = neuron_xtts.report(xtts).routes
    assert [routes[name].handed_over for name in ("HifiDecoder.forward", "HifiDecoder.inference")] == [0, 1]
    assert all_fallbacks(xtts) == {}


@torch.no_grad()
def test_what_is_not_finite_is_not_remembered(xtts, voice):
    latents = torch.randn(1, 40, 64)
    latents[:, 35] = torch.nan
    plain = copy.deepcopy(xtts)
    neuron_xtts.patch(xtts)
    for length in (40, 34, 40, 30):
        ours, theirs = (model.hifigan_decoder(latents[:, :length], g=voice[1]) for model in (xtts, plain))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, equal_nan=True)
    assert all_fallbacks(xtts) == {"HifiDecoder.forward": {"audio that is not finite": 2}}


def test_bounded():
    """The oldest go first, and what is larger than everything allowed is not kept."""

    def vocode(start):
        made.append(start)
        yield torch.zeros(1, 1, (sequence.shape[2] - start) * 256)

    made = []
    memo = AudioMemo(halo=13, size=3 * 100 * (64 + 256) * 4)
    sequences = [torch.randn(1, 64, length) for length in (100, 100, 100, 100, 301)]
    for sequence in sequences:
        memo.complete(sequence, torch.zeros(1), 0, vocode)
        assert sum(entry.nbytes for entry in memo._entries) <= memo._size
    assert made == [0] * 5
    assert len(memo._entries) == 0  # the last was larger than all that is allowed
    for sequence in sequences[:4]:
        memo.complete(sequence, torch.zeros(1), 0, vocode)
    made.clear()
    for i in (1, 3, 0, 1):
        sequence = sequences[i]
        _, known = memo.complete(sequence, torch.zeros(1), 0, vocode)
        assert known == (i != 0)
    assert made == [0]


def test_common_length():
    a = torch.randn(1, 8, 20)
    assert common_length(a, a) == 20
    assert common_length(a, a[:, :, :7]) == common_length(a[:, :, :7], a) == 7
    for frame in range(20):
        b = a.clone()
        b[0, frame % 8, frame] += 1e-6
        assert common_length(a, b) == frame
    b = a.clone()
    b[0, 0, 3] = torch.nan
    assert common_length(b, b) == 3
