"""The graphs by themselves, against the modules they are made of."""

import importlib
import inspect
import pkgutil
import sys

import pytest
import torch
from TTS.vocoder.models.hifigan_generator import HifiganGenerator

from neuron_xtts import graphs
from neuron_xtts.backends.host.kernels import linear
from neuron_xtts.backends.host.operators import HostOperators
from neuron_xtts.backends.memory import lazy_zeros
from neuron_xtts.graphs.operators import MASKED, PLAIN
from neuron_xtts.graphs.transformer import Decode, Latents, Prefill, Trunk
from neuron_xtts.graphs.vocoder import Vocoder, receptive_field


@pytest.fixture
def gpt(tts_original):
    """In fp64, where a difference is a mistake and not rounding."""
    import copy

    return copy.deepcopy(tts_original.synthesizer.tts_model.gpt).double()


@pytest.fixture(params=[PLAIN, HostOperators()], ids=["compiled", "host"])
def kind(request):
    """The operators that graphs compute with."""
    return request.param


@pytest.fixture
def trunk(gpt):
    return Trunk(gpt.gpt, gpt.final_norm, gpt.heads)


def using(kind, graph):
    graph.use(kind)
    return graph


def reference(gpt, embeds):
    """Latents by transformers' own trunk."""
    return gpt.final_norm(gpt.gpt(inputs_embeds=embeds, return_dict=True).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 1, 50])
def test_latents_and_prefill(gpt, trunk, padding, kind):
    embeds = torch.randn(2, 20, 64, dtype=torch.double)
    expected = reference(gpt, embeds)
    garbage = torch.randn(2, padding, 64, dtype=torch.double) * 100
    padded = torch.cat([embeds, garbage], dim=1)
    torch.testing.assert_close(using(kind, Latents(trunk))(padded)[0][:, :20], expected)
    latents, logits, *cache = using(kind, Prefill(trunk, gpt.mel_head))(
        padded, torch.tensor([19, 7], dtype=torch.int32)
    )
    torch.testing.assert_close(latents, torch.stack([expected[0, 19], expected[1, 7]]))
    torch.testing.assert_close(logits, gpt.mel_head(latents))
    assert [tuple(tensor.shape) for tensor in cache] == [(2, 2, 20 + padding, 32)] * 4


@torch.no_grad()
def test_decode_rows_at_positions_of_their_own(gpt, trunk, kind):
    """Slots above a row's position hold garbage, which no row sees."""
    embeds = torch.randn(3, 12, 64, dtype=torch.double)
    expected = reference(gpt, embeds)
    decode = using(kind, Decode(trunk, gpt.mel_head))
    cache = [torch.randn(3, 2, 16, 32, dtype=torch.double) * 100 for _ in range(4)]
    lag = torch.tensor([0, 2, 5], dtype=torch.int32)  # row r is lag[r] steps behind
    for step in range(12 + 5):
        positions = (step - lag).clamp(0, 11)
        mask = torch.where(torch.arange(16) <= positions[:, None], 0.0, MASKED).double()[:, None, None]
        current = embeds[torch.arange(3), positions.long()][:, None]
        latents, logits = decode(current, positions.int(), mask, *cache)
        torch.testing.assert_close(latents, expected[torch.arange(3), positions.long()])
        torch.testing.assert_close(logits, gpt.mel_head(latents))


@torch.no_grad()
def test_both_forms_of_attention():
    """The fused kernel of the host and the plain operators that are compiled."""
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.double) for length in (5, 9, 9))
    mask = torch.where(torch.rand(2, 1, 5, 9) < 0.3, MASKED, 0.0).double()
    for given in (mask, None):
        torch.testing.assert_close(PLAIN.attention(q, k, v, given), HostOperators().attention(q, k, v, given))


@pytest.mark.parametrize("tanh", [False, True])
def test_both_forms_of_gelu(tanh):
    x = torch.linspace(-12, 12, 9999)
    torch.testing.assert_close(PLAIN.gelu(x, tanh=tanh), HostOperators().gelu(x, tanh=tanh), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_lazy_zeros(dtype):
    zeros = lazy_zeros((2, 3, 5), dtype)
    assert torch.equal(zeros, torch.zeros(2, 3, 5, dtype=dtype))
    zeros += 1
    assert zeros.sum() == 30


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_linear_layers(gpt, threads, dtype):
    """Any number of threads, whether or not it divides the channels; in fp64, which oneDNN does not have, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    headless = torch.nn.Linear(6, 7, bias=False)
    try:
        for module in (gpt.mel_head, headless, gpt.gpt.h[0].attn.c_attn, gpt.gpt.h[0].mlp.c_proj):
            module.to(dtype)
            for rows in (1, 5, 40):
                channels = module.weight.shape[1 if isinstance(module, torch.nn.Linear) else 0]
                x = torch.randn(rows, 1, channels, dtype=dtype)
                torch.testing.assert_close(linear(module, x), module(x), rtol=1e-5, atol=1e-5)
        handle = module.register_forward_hook(lambda module, inputs, output: output + 1)
        for rows in (1, 5):
            torch.testing.assert_close(linear(module, x[:rows]), module(x[:rows]))
        handle.remove()
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_linear_layers_of_another_kind(gpt):
    """A subclass may compute what it likes, and weights may lie as they like."""

    class Twice(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(3, 64)
    twice, strided, conv = Twice(64, 5), torch.nn.Linear(64, 5), gpt.gpt.h[0].attn.c_attn.float()
    strided.weight.data = torch.randn(64, 5).t()
    conv.weight.data = torch.randn(192, 64).t()
    for module in (twice, strided, conv):
        for rows in (1, 3):
            torch.testing.assert_close(linear(module, x[:rows]), module(x[:rows]), rtol=1e-5, atol=1e-5)


@pytest.fixture
def generator():
    """The layers of XTTS v2's, with fewer channels."""
    return make_generator(
        upsample_kernel_sizes=[16, 16, 4, 4], upsample_factors=[8, 8, 2, 2], upsample_initial_channel=32,
        conv_pre_weight_norm=False, conv_post_weight_norm=False, conv_post_bias=False,
    )  # fmt: skip


OTHER_SHAPES = {
    "type 2": {"resblock_type": "2", "resblock_dilation_sizes": [[1, 3]] * 3},
    "one kernel": {"resblock_kernel_sizes": [5], "resblock_dilation_sizes": [[1, 2, 3]]},
    "conditioned once": {"cond_in_each_up_layer": False},
}


def make_generator(**changes):
    torch.manual_seed(0)
    options = {
        "in_channels": 24, "out_channels": 1, "resblock_type": "1", "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "resblock_kernel_sizes": [3, 7, 11], "upsample_kernel_sizes": [8, 4], "upsample_initial_channel": 16,
        "upsample_factors": [4, 2], "inference_padding": 0, "cond_channels": 6, "cond_in_each_up_layer": True,
        **changes,
    }  # fmt: skip
    return HifiganGenerator(**options).double()


@torch.no_grad()
@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_other_hifigans(shape):
    generator = make_generator(**OTHER_SHAPES[shape])
    frames, speaker = torch.randn(2, 24, 19, dtype=torch.double), torch.randn(1, 6, 1, dtype=torch.double)
    vocoder = Vocoder(generator)
    for kind in (HostOperators(), PLAIN):
        vocoder.use(kind)
        torch.testing.assert_close(vocoder(frames, speaker)[0], generator(frames, g=speaker))
    check_receptive_field(vocoder, speaker)


def check_receptive_field(vocoder, speaker):
    """Measured: which frames change the audio of one frame."""
    left, right = receptive_field(vocoder)
    middle, length = left + 3, left + right + 7
    frames = torch.randn(1, 24, length, dtype=torch.double)
    audio = vocoder(frames, speaker)[0]
    hop = audio.shape[2] // length
    span = slice(middle * hop, (middle + 1) * hop)
    matters = []
    for frame in range(length):
        changed = frames.clone()
        changed[:, :, frame] += 5
        if not torch.equal(vocoder(changed, speaker)[0][:, :, span], audio[:, :, span]):
            matters.append(frame)
    assert middle - matters[0] <= left <= middle - matters[0] + 1  # a bound, and a tight one
    assert matters[-1] - middle <= right <= matters[-1] - middle + 1


@torch.no_grad()
def test_receptive_field_of_xtts(generator):
    vocoder, speaker = Vocoder(generator), torch.randn(1, 6, 1, dtype=torch.double)
    assert receptive_field(vocoder) == (13, 13)
    check_receptive_field(vocoder, speaker)


@torch.no_grad()
@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (0, 9), (3, 40)])
def test_mask_restores_the_ends(generator, left, right):
    """What stands in the padding does not matter, and it is as if it were not there."""
    vocoder, speaker = Vocoder(generator), torch.randn(1, 6, 1, dtype=torch.double)
    frames = torch.randn(1, 24, 17, dtype=torch.double)
    expected = generator(frames, g=speaker)
    padded = torch.randn(1, 24, left + 17 + right, dtype=torch.double)
    padded[:, :, left : left + 17] = frames
    mask = torch.zeros(1, 1, left + 17 + right, dtype=torch.double)
    mask[:, :, left : left + 17] = 1
    audio = vocoder(padded, speaker, mask)[0][:, :, left * 256 : (left + 17) * 256]
    torch.testing.assert_close(audio, expected)
    wrong = vocoder(padded, speaker)[0][:, :, left * 256 : (left + 17) * 256]
    assert torch.allclose(wrong, expected) == (left == right == 0)


@torch.no_grad()
def test_mask_reaches_every_convolution(generator):
    """Each of the 78 that run over time has zeros where the padding is."""
    vocoder = Vocoder(generator)
    frames, mask = torch.randn(1, 24, 20, dtype=torch.double), torch.ones(1, 1, 20, dtype=torch.double)
    mask[:, :, 15:] = 0
    seen = []

    def check(module, inputs):
        (x,) = inputs
        if x.shape[2] > 1:
            seen.append(module)
            valid = x.shape[2] * 15 // 20
            assert x[:, :, valid:].abs().max() == 0
            assert x[:, :, :valid].abs().max() > 0

    for module in generator.modules():
        if isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
            module.register_forward_pre_hook(check)
    vocoder(frames, torch.randn(1, 6, 1, dtype=torch.double), mask)
    assert len(seen) == len(set(seen)) == 78


def test_graphs_know_torch_alone():
    """No coqui-tts, no wrapt, nothing of the rest: `graphs/` can be read and used on its own."""
    for found in pkgutil.iter_modules(graphs.__path__, "neuron_xtts.graphs."):
        module = importlib.import_module(found.name)
        imports = [line for line in inspect.getsource(module).splitlines() if line.startswith(("import ", "from "))]
        names = {line.split()[1] for line in imports if not line.split()[1].startswith("neuron_xtts.graphs.")}
        assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"torch"}
