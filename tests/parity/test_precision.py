"""Reduced precision on the host: close to fp32, faithful to the model's weights, and fp32 again after unpatch."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import all_fallbacks, assert_identical, dicts, fallbacks, speak, stop_after, stream

import neuron_xtts
from neuron_xtts import BucketPlan, Precision
from neuron_xtts.backends.host.backend import CpuBackend
from neuron_xtts.backends.host.converted import HostVocoder
from neuron_xtts.backends.host.kernels import multiply, pack
from neuron_xtts.backends.host.smoothing import linears_of
from neuron_xtts.backends.neuron.verification import correlation
from neuron_xtts.coqui.models import random_tts
from neuron_xtts.graphs.vocoder import Vocoder
from neuron_xtts.patching.patch import find_patch
from neuron_xtts.tools.bench.accuracy import accuracy, magnitudes, snr

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has FBGEMM for x86 only"
)

REDUCED = ("bf16", "int8")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Layers of real size, but six of them, and the full vocoder."""
    tts = random_tts(tmp_path_factory.mktemp("wide"), gpt_layers=6)
    return tts.synthesizer.tts_model


@pytest.fixture(scope="module")
def wide_voice(wide, reference):
    return wide.get_conditioning_latents(str(reference))


@pytest.mark.parametrize(
    ("precision", "latents", "db"), [("fp32", 0.99999999, 100), ("bf16", 0.999, 25), ("int8", 0.99, 20)]
)
def test_accuracy_at_real_size(wide, wide_voice, precision, latents, db):
    """Teacher-forced on coqui-tts's own codes."""
    found = accuracy(wide, wide_voice, 60, {"backend": "cpu", "precision": precision})
    assert found.latents >= latents
    assert found.snr >= db
    assert found.vocoder_snr >= db
    assert found.spectrum >= (0.9999999 if precision == "fp32" else 0.99)
    assert precision == "fp32" or found.latents < 1 - 1e-9  # it is another precision
    assert not neuron_xtts.is_patched(wide)


@pytest.mark.parametrize("precision", REDUCED)
def test_decoding_agrees_with_the_latents_graph(wide, wide_voice, precision, monkeypatch):
    """The latents of decode steps, one row at a time, and those of all positions at once."""
    neuron_xtts.patch(wide, backend="cpu", precision=precision, strict=True)
    handed = speak(wide, wide_voice, max_new_tokens=30, min_new_tokens=30)[0]["gpt_latents"]
    monkeypatch.setattr("neuron_xtts.routes.memo.LatentsMemo.find", lambda *_: None)
    computed = speak(wide, wide_voice, max_new_tokens=30, min_new_tokens=30)[0]["gpt_latents"]
    neuron_xtts.unpatch(wide)
    assert correlation(torch.tensor(handed), torch.tensor(computed)) > (0.99999 if precision == "bf16" else 0.999)


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("plan", [None, BucketPlan.static()], ids=["exact", "static"])
def test_speech_and_streams(xtts, voice, precision, plan):
    """Every route serves, and the model is what it was afterwards."""
    options = {"max_new_tokens": 40, **stop_after(xtts, None)}
    before = dicts(xtts)
    with neuron_xtts.patched(xtts, backend="cpu", precision=precision, buckets=plan):
        assert dicts(xtts) != before
    assert dicts(xtts) == before
    theirs = speak(xtts, voice, **options)
    neuron_xtts.patch(xtts, backend="cpu", precision=precision, buckets=plan, strict=True)
    ours, _ = speak(xtts, voice, **options)
    assert ours["wav"].shape == theirs[0]["wav"].shape
    chunks, _ = stream(xtts, voice, **options)
    assert len(chunks) == 3
    report = neuron_xtts.report(xtts)
    assert report.precision == precision
    assert report.copied > 0
    assert f"precision {precision}, " in str(report)
    assert all_fallbacks(xtts) == {}
    neuron_xtts.unpatch(xtts)
    assert_identical(speak(xtts, voice, **options), theirs)


@pytest.mark.parametrize("precision", REDUCED)
def test_the_same_seed_says_the_same(xtts, voice, precision):
    """Reduced precision draws other codes than fp32, but the same each time; and patching draws nothing."""
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        neuron_xtts.patch(xtts, backend="cpu", precision=precision)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(speak(xtts, voice, max_new_tokens=25))
        neuron_xtts.unpatch(xtts)
    assert_identical(*results)


@pytest.mark.parametrize("precision", REDUCED)
@torch.no_grad()
def test_weights_change_under_a_patch(xtts, voice, precision):
    """They are converted again: the latents are those of a model patched with them."""
    other = copy.deepcopy(xtts)
    generator = torch.Generator().manual_seed(1)
    for parameter in other.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    neuron_xtts.patch(xtts, backend="cpu", precision=precision, strict=True)
    before = speak(xtts, voice, max_new_tokens=15)[0]
    xtts.load_state_dict(other.state_dict())
    neuron_xtts.patch(other, backend="cpu", precision=precision, strict=True)
    assert_identical(speak(xtts, voice, max_new_tokens=15), speak(other, voice, max_new_tokens=15))
    assert abs(before["gpt_latents"] - speak(xtts, voice, max_new_tokens=15)[0]["gpt_latents"]).max() > 1e-3


@torch.no_grad()
def test_a_hook_on_a_linear_layer_is_called(xtts, voice):
    """And its layer computes in fp32, as the hook expects."""
    calls = []
    neuron_xtts.patch(xtts, backend="cpu", precision="int8", strict=True)
    xtts.gpt.gpt.h[1].mlp.c_fc.register_forward_hook(lambda module, inputs, output: calls.append(output.dtype))
    speak(xtts, voice, max_new_tokens=5)
    assert calls == [torch.float32] * 5


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("layer", ["mlp.c_fc", "attn.c_proj"])
def test_numbers_that_a_precision_lacks(xtts, voice, precision, layer, caplog):
    """What is not finite is not made into something that is; and what fp16 would cut off is computed as it is."""
    options = {"max_new_tokens": 9, **stop_after(xtts, None)}
    module = xtts.gpt.gpt.h[1].get_submodule(layer)
    with torch.no_grad():
        before = module.weight[3].clone()
        module.weight[3] = float("nan")
    neuron_xtts.patch(xtts, backend="cpu", precision=precision)
    assert f"a linear layer keeps its weights, of which {'fp16' if precision == 'bf16' else 'int8'}" in caplog.text
    with pytest.raises(RuntimeError, match="probability tensor"):  # coqui-tts's own error
        speak(xtts, voice, **options)
    assert fallbacks(xtts, "GPT.generate") == {"logits that are not finite": 1}
    neuron_xtts.unpatch(xtts)
    with torch.no_grad():
        module.weight[3] = before * 1e7
    theirs, _ = speak(xtts, voice, top_k=1, **options)
    neuron_xtts.patch(xtts, backend="cpu", precision=precision, strict=True)
    ours, _ = speak(xtts, voice, top_k=1, **options)
    assert correlation(torch.tensor(ours["gpt_latents"]), torch.tensor(theirs["gpt_latents"])) > 0.99


def test_weights_of_another_type(xtts, voice):
    """Nothing is converted, and calls fall back, at patch and under it."""
    xtts.gpt.double()
    neuron_xtts.patch(xtts, backend="cpu", precision="int8")
    with torch.inference_mode():
        xtts.gpt.generate(voice[0].double(), torch.ones(1, 5, dtype=torch.long), max_new_tokens=3)
    assert fallbacks(xtts, "GPT.generate") == {"weights of torch.float64": 1}
    xtts.gpt.float()
    speak(xtts, voice, max_new_tokens=5)
    assert neuron_xtts.report(xtts).routes["GPT.generate"].served == 1


def test_int8_rows_do_not_know_of_each_other():
    """Nor of padding: a loud row does not coarsen a quiet one."""
    weight, bias = torch.randn(256, 512) / 16, torch.randn(512)
    packed = pack("int8", weight, bias)
    x = torch.randn(2, 5, 256) * torch.tensor([0.1, 1.0, 30.0, 0.05, 5.0])[:, None]
    x[1, 3] = 0
    together, exact = multiply("int8", x, packed), x @ weight
    for row in range(2):
        for position in range(5):
            alone = multiply("int8", x[row : row + 1, position : position + 1], packed)[0, 0]
            assert torch.equal(alone, together[row, position])
            size = exact[row, position].abs().max()
            assert (alone - bias - exact[row, position]).abs().max() <= 0.03 * size + 1e-6


def test_fp16_product():
    weight, bias = torch.randn(256, 512), torch.randn(512)
    packed = pack("fp16", weight, bias)
    for shape in ((1, 1, 256), (7, 256), (2, 90, 256)):
        x = torch.randn(shape)
        exact = x @ weight.half().float() + bias
        torch.testing.assert_close(multiply("fp16", x, packed), exact, rtol=0, atol=1e-3)


def test_the_quantization_engine_stays(xtts):
    """It is global to torch, and somebody else's."""
    engine = torch.backends.quantized.engine
    others = [name for name in torch.backends.quantized.supported_engines if name not in ("none", "fbgemm")]
    try:
        torch.backends.quantized.engine = others[0]
        neuron_xtts.patch(xtts, backend="cpu", precision="int8")
        assert torch.backends.quantized.engine == others[0]
    finally:
        torch.backends.quantized.engine = engine


@torch.no_grad()
def test_the_vocoder_in_fp32_and_bf16(wide, wide_voice):
    """The layout changes nothing, bf16 keeps the last layer in fp32."""
    graph = Vocoder(wide.hifigan_decoder.waveform_decoder)
    frames, mask = torch.randn(1, 1024, 50), torch.ones(1, 1, 50)
    mask[..., 40:] = 0
    expected = graph(frames[..., :40], wide_voice[1])[0]
    for dtype, db in ((torch.float32, 100), (torch.bfloat16, 20)):
        vocoder = HostVocoder(graph, dtype)
        vocoder.convert()
        assert snr(vocoder(frames[..., :40].contiguous(), wide_voice[1])[0], expected) > db
        audio = vocoder(frames, wide_voice[1], mask)[0][..., : 40 * 256]
        assert audio.dtype == torch.float32
        assert snr(audio, expected) > db
        assert correlation(magnitudes(audio), magnitudes(expected)) > 0.99


@pytest.mark.parametrize(("precision", "size"), [("bf16", 2), ("int8", 1)])
def test_nothing_is_converted_twice(xtts, voice, precision, size):
    neuron_xtts.patch(xtts, backend="cpu", precision=precision)
    backend = find_patch(xtts).runner.backend

    def copies():
        return [*backend._linears._converted.values(), backend._graphs["vocoder"]._copy]

    linears = [layer for block in xtts.gpt.gpt.h for layer in linears_of(block)]
    assert backend._linears.bytes == size * sum(layer.weight.numel() for layer in linears)
    at_patch = copies()
    assert len(at_patch) == 2 * 4 + 1
    for _ in range(2):
        speak(xtts, voice, max_new_tokens=5)
    assert all(a is b for a, b in zip(copies(), at_patch, strict=True))


@pytest.mark.parametrize("precision", ["fp16", "bf16-all", Precision("bf16-all"), "INT8"])
def test_unknown_precision(xtts, precision):
    with pytest.raises(ValueError, match=r"does not exist on the host; choose one of 'fp32', 'bf16', 'int8'"):
        neuron_xtts.patch(xtts, backend="cpu", precision=precision)


def test_nothing_to_release(xtts):
    with pytest.raises(ValueError, match=r"release=True, but 'fp32' on the host converts no weights"):
        neuron_xtts.patch(xtts, backend="cpu", precision=Precision("fp32", release=True))


def test_no_kernels(xtts, monkeypatch):
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", property(lambda _: ["qnnpack", "none"]))
    with pytest.raises(ValueError, match=r"precision='int8' needs FBGEMM.*has qnnpack, none. Choose 'fp32'"):
        neuron_xtts.patch(xtts, backend="cpu", precision="int8")
    neuron_xtts.patch(xtts, backend="cpu")


def mapped(parameter):
    """Whether a parameter's memory is a file without a name."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, last = line.split()
        start, end = (int(address, 16) for address in span.split("-"))
        if start <= parameter.data_ptr() < end:
            return last == "(deleted)"
    return False


@pytest.mark.parametrize("precision", REDUCED)
def test_released_originals(xtts, voice, precision, tmp_path):
    """They are on the disk while the model is patched, whoever needs them finds them, and unpatch brings them back."""
    options = {"backend": "cpu", "precision": Precision(precision, release=True), "store": tmp_path}
    before = dicts(xtts)
    neuron_xtts.unpatch(neuron_xtts.patch(xtts, **options))
    assert dicts(xtts) == before
    theirs = speak(xtts, voice, max_new_tokens=15)
    weight = xtts.gpt.gpt.h[1].mlp.c_fc.weight
    values = weight.detach().clone()
    kept = neuron_xtts.patch(copy.deepcopy(xtts), backend="cpu", precision=precision)
    neuron_xtts.patch(xtts, **options)
    assert mapped(weight)
    assert not list((tmp_path / "aside").iterdir())
    assert_identical(speak(xtts, voice, max_new_tokens=15), speak(kept, voice, max_new_tokens=15))
    fallback = {"max_new_tokens": 15, "typical_p": 0.9}
    plain = copy.deepcopy(xtts)
    assert not mapped(plain.gpt.gpt.h[1].mlp.c_fc.weight)
    assert_identical(speak(plain, voice, max_new_tokens=15), theirs)
    ours, expected = (
        model.gpt.generate(voice[0], torch.ones(1, 5, dtype=torch.long), **fallback) for model in (xtts, plain)
    )
    assert torch.equal(ours, expected)  # by coqui-tts, with the weights on the disk
    assert fallbacks(xtts, "GPT.generate") == {"argument typical_p": 1}
    neuron_xtts.patch(xtts, **options)
    neuron_xtts.unpatch(xtts)
    assert weight is xtts.gpt.gpt.h[1].mlp.c_fc.weight
    assert not mapped(weight)
    assert torch.equal(weight, values)
    assert_identical(speak(xtts, voice, max_new_tokens=15), theirs)


@torch.no_grad()
def test_released_originals_that_change(xtts, voice, tmp_path):
    """New weights are converted and moved in their turn; those in another storage stay there."""
    other = copy.deepcopy(xtts)
    other.gpt.gpt.h[0].mlp.c_fc.weight *= -1
    neuron_xtts.patch(xtts, backend="cpu", precision=Precision("int8", release=True), store=tmp_path)
    xtts.load_state_dict(other.state_dict())
    neuron_xtts.patch(other, backend="cpu", precision="int8")
    assert_identical(speak(xtts, voice, max_new_tokens=15), speak(other, voice, max_new_tokens=15))
    weight = xtts.gpt.gpt.h[1].mlp.c_fc.weight
    replaced = torch.randn_like(weight)
    weight.data = replaced
    neuron_xtts.unpatch(xtts)
    assert weight.data_ptr() == replaced.data_ptr()
    assert torch.equal(xtts.gpt.gpt.h[0].mlp.c_fc.weight, other.gpt.gpt.h[0].mlp.c_fc.weight)


def test_a_full_disk(xtts, voice, tmp_path, monkeypatch, caplog):
    """Then they stay in memory, and nothing else changes."""

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("neuron_xtts.backends.memory.tempfile.NamedTemporaryFile", full)
    neuron_xtts.patch(xtts, backend="cpu", precision=Precision("int8", release=True), store=tmp_path)
    assert caplog.text.count("fp32 weights stay in memory: [Errno 28] No space left on device") == 1
    speak(xtts, voice, max_new_tokens=5)
    neuron_xtts.unpatch(xtts)


def test_a_patch_that_is_refused_brings_weights_back(xtts, tmp_path, monkeypatch):
    """The window has no room beside its halo, which is found when the weights have been moved."""
    weight, moved = xtts.gpt.gpt.h[0].mlp.c_fc.weight, []
    close = CpuBackend.close
    monkeypatch.setattr(CpuBackend, "close", lambda self: moved.append(mapped(weight)) or close(self))
    options = {"backend": "cpu", "precision": Precision("int8", release=True), "store": tmp_path}
    with pytest.raises(ValueError, match="has a window of 5 frames"):
        neuron_xtts.patch(xtts, buckets=BucketPlan(vocoder=(5,)), **options)
    assert moved == [True]
    assert not mapped(weight)
    assert not neuron_xtts.is_patched(xtts)
