"""The arithmetic of experiments/roofline.py, by hand, and that it runs to its end."""

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from neuron_xtts.backends.neuron.lowering import Lowering, Product, lower
from neuron_xtts.backends.neuron.tracing import traceable
from neuron_xtts.buckets import bucket_name
from neuron_xtts.coqui.recognise import make_graphs
from neuron_xtts.coqui.surface import Networks

_FILE = Path(__file__).parents[2] / "experiments" / "roofline.py"
_SPEC = importlib.util.spec_from_file_location("roofline", _FILE)
roofline = importlib.util.module_from_spec(_SPEC)
sys.modules["roofline"] = roofline  # where its dataclasses look for their names
_SPEC.loader.exec_module(roofline)


def line(graph, bucket, **counted):
    """A lowered graph with 400 MB of weights, and 100 products of a vector and a matrix of 1024 x 1024."""
    counted = {"inputs": [1_000_000], "results": [1_000_000], "states": [], **counted}
    ends = sum(counted["inputs"]) + sum(counted["results"]) + 2 * sum(counted["states"])
    operators = {"dot": 100, "add": 7, "tanh": 3, "reshape": 50}
    products = [(100, 1, 1024, 1024)]
    return asdict(
        Lowering(graph, bucket_name(bucket), operators, 1, 400_000_000 + ends, [], [], [], products, **counted)
    )


CACHE = [100_000_000, 100_000_000]
SMALL_CACHE = [20_000_000, 20_000_000]
PLAN = replace(roofline.DEFAULT, decode=(256, 512, 1044), slots=(1, 4), latents=(192, 1044))
LINES = [
    line("prefill", (128,), results=[1_000_000, 1_000_000, *SMALL_CACHE]),
    line("prefill", (448,), results=[1_000_000, 1_000_000, *CACHE]),
    *(line("decode", bucket, states=CACHE) for bucket in PLAN.buckets("decode")),
    *(line(graph, bucket) for graph in ("latents", "vocoder", "conditioning") for bucket in PLAN.buckets(graph)),
]


@pytest.fixture
def counts(tmp_path):
    """What the script counts in `LINES`."""
    (tmp_path / "lowered.json").write_text(json.dumps(LINES))
    return roofline.read(tmp_path / "lowered.json")


@pytest.fixture
def at():
    """One way to assume everything, in numbers to compute with by hand."""
    values = {
        roofline.INF2.clock: 2, roofline.INF2.bandwidth: 400, roofline.TILING: 0, roofline.OVERLAP: 0.75,
        roofline.CACHE_COPIES: 0.5, roofline.STORED: 3, roofline.CALL: 1, roofline.PER_TENSOR: 10, roofline.LINK: 4,
        roofline.COPY: 0.05, roofline.HOST: 1, roofline.SAMPLING: 0.1,
    }  # fmt: skip
    return {assumption: torch.tensor([value], dtype=torch.float64) for assumption, value in values.items()}


@pytest.mark.parametrize(
    ("product", "best", "worst"),
    [
        # 64 tiles of 64 cycles, or 8 rows of tiles past which 1024 columns move.
        (Product(1, 1024, 1024), 64 * 64, 8 * 1024),
        (Product(128, 128, 512), 512, 4 * 128),
        # Four share the array, or two if the longer operand stays, in four tiles.
        (Product(64, 64, 512), 4 * 64 / 2, 512),
        (Product(64, 64, 64), 64 / 4, 64),
        # A tile of 128 and one of 2 stay, or 130 columns move.
        (Product(130, 128, 1), min(64 + 2 / 2, 130 / 2), 130),
        (Product(512, 1000, 513), 8 * 4 * (512 + 64), 8 * (4 * 512 + 512)),
    ],
)
def test_tensore_cycles(product, best, worst):
    assert roofline.product_cycles(product) == (best, worst)
    assert roofline.product_cycles(Product(product.columns, product.inner, product.rows)) == (best, worst)


def test_counted(counts):
    decode = counts["decode", (1, 512)]
    assert decode.weights == 400_000_000
    assert decode.bytes == 400_000_000 + 2_000_000 + 200_000_000
    assert decode.cycles == (100 * 64 * 64, 100 * 8 * 1024)
    assert decode.vector == 10


def test_one_run(counts, at):
    """A decode step: 400 MB of weights, 2 of inputs and results, 200 of cache, read, and copied half a time."""
    gpt = roofline.Predictor(counts, roofline.INF2, roofline.EXACT, at)
    memory, tensore, call = 802 / 400, 4 * 0.4096 / 2, 1 + (2 + 2 * 2) * 0.01 + 2 / 4
    assert [part.item() for part in gpt.parts("decode", (1, 512))] == pytest.approx([memory, tensore, call])
    assert gpt.run("decode", (1, 512)).item() == pytest.approx(memory + 0.25 * tensore + call)
    at[roofline.TILING] += 1
    assert gpt.parts("decode", (1, 512))[1].item() == pytest.approx(2 * tensore)


@pytest.mark.parametrize(("variant", "weights"), [("EXACT", 400), ("CAST", 300), ("A", 200)])
def test_weights(counts, at, variant, weights):
    gpt = roofline.Predictor(counts, roofline.INF2, getattr(roofline, variant), at)
    memory, tensore, _ = gpt.parts("latents", (1044,))
    assert memory.item() == pytest.approx((weights + 2) / 400)
    assert tensore.item() == pytest.approx((4 if variant == "EXACT" else 1) * 0.4096 / 2)


def test_a_sentence(counts, at):
    """210 codes after 110 positions: 209 calls, or 53 of 4 codes; prefill's cache over the host, or on the device."""
    device = {"EXACT": 802 / 400 + 0.25 * 4 * 0.4096 / 2, "A": 602 / 400 + 0.25 * 0.4096 / 2}
    call = 1 + (2 + 2 * 2) * 0.01 + 2 / 4
    prefill = {"EXACT": 443 / 400 + 0.25 * 4 * 0.4096 / 2, "A": 243 / 400 + 0.25 * 0.4096 / 2}
    over_host, on_device = 1 + 5 * 0.01 + 43 / 4, 1 + (3 + 2 * 2) * 0.01 + 3 / 4
    to_decode = {False: 200 / 4 + 2 * 0.05, True: 2 * 200 / 400 + 2 * 0.05}
    expected = {
        "EXACT": prefill["EXACT"] + over_host + to_decode[False] + 209 * (device["EXACT"] + call + 1),
        "AB": prefill["A"] + on_device + to_decode[True] + 209 * (device["A"] + call + 1),
        "ABC": prefill["A"] + on_device + to_decode[True] + 53 * (4 * (device["A"] + 0.1) + call + 1),
    }
    for variant, total in expected.items():
        gpt = roofline.Predictor(counts, roofline.INF2, getattr(roofline, variant), at)
        assert gpt.gpt(110, 210).item() == pytest.approx(total)
        assert gpt.rtf(110, 210).item() == pytest.approx(total / 1000 / (210 * 1024 / 22050))
    gpt = roofline.Predictor(counts, roofline.INF2, roofline.EXACT, at, replace(PLAN, slots=(4,)))
    assert gpt.code(110, 210, 4).item() == pytest.approx((device["EXACT"] + call + 4 * 1) / 4)


def test_a_cache_that_outgrows_its_bucket(counts, at):
    """The host reads 200 MB in two tensors and writes them; the device copies them."""
    over_host = roofline.Predictor(counts, roofline.INF2, roofline.EXACT, at)
    assert over_host.moves(310, 203).item() == pytest.approx(200 / 4 + 2 * 0.05)  # position 511 is the last
    assert over_host.moves(310, 204).item() == pytest.approx(200 / 4 + 2 * 0.05 + 400 / 4 + 4 * 0.05)
    on_device = replace(over_host, variant=roofline.AB)
    assert on_device.moves(310, 204).item() == pytest.approx(2 * (400 / 400 + 2 * 0.05))


def test_ranges(counts):
    """Each end of what is assumed with each of the rest; a figure that does not depend on it has one end."""
    at = roofline.corners(roofline.INF2)
    ranged = [assumption for assumption in at if assumption.low < assumption.high]
    combinations = torch.stack([at[assumption] for assumption in ranged], 1)
    assert len(combinations.unique(dim=0)) == len(combinations) == 2 ** len(ranged)
    assert all({*at[each].tolist()} == {each.low, each.high} for each in at)
    gpt = roofline.Predictor(counts, roofline.INF2, roofline.A, at)
    bandwidth = roofline.INF2.bandwidth
    expected = f"{202 / bandwidth.high:.2f} to {202 / bandwidth.low:.2f}"
    assert roofline.between(gpt.parts("latents", (1044,))[0], 2) == expected
    assert roofline.between(torch.tensor([-0.001, 0.002]), 1) == "0.0"


def test_everything_assumed_has_a_source():
    for core in roofline.CORES:
        for assumption in core.assumptions:
            assert assumption.low <= assumption.high
            assert assumption.source
            assert any(word in assumption.certainty for word in ("documented", "reported", "measured", "guess"))


def test_to_the_end(tmp_path, monkeypatch, capsys):
    (tmp_path / "lowered.json").write_text(json.dumps(LINES))
    monkeypatch.setattr(sys, "argv", ["roofline.py", str(tmp_path / "lowered.json")])
    roofline.main()
    printed = capsys.readouterr().out
    assert "PREDICTED, NOT MEASURED" in printed
    assert all(f"| {entry['graph']} {entry['bucket']} | fp32 |" in printed for entry in LINES)
    for before, after in roofline.CHANGES:
        assert f"| {before.name} -> {after.name} |" in printed
    assert all(printed.count(f"| {each.what} |") == 1 + (each.low < each.high) for each in roofline.COMMON)
    rows = printed.partition("## Plans")[2].splitlines()
    assert sum(row.startswith("| ") for row in rows) == 2 + len(roofline.PLANS)
    assert "nan" not in printed


def test_one_graph_that_was_really_lowered(tts_original, tmp_path, monkeypatch, capsys):
    """What the file lacks, the script says; of a small model, its sizes are counted, not those of XTTS v2."""
    pytest.importorskip("torch_xla")
    graphs, _ = make_graphs(Networks.of(tts_original.synthesizer.tts_model))
    decode = traceable(graphs)["decode"]
    lowered = lower("decode", "1x512", decode.in_bucket(1, 512).to("xla"), decode.example(1, 512))
    (tmp_path / "lowered.json").write_text(json.dumps([asdict(lowered)]))
    counted = roofline.read(tmp_path / "lowered.json")["decode", (1, 512)]
    trunk = sum(parameter.numel() for parameter in graphs["decode"].parameters())
    assert counted.weights == pytest.approx(4 * trunk, rel=0.01)  # and a few scalars
    assert len(counted.states) == 4
    assert sum(counted.states) == 4 * 4 * 512 * 64
    monkeypatch.setattr(sys, "argv", ["roofline.py", str(tmp_path / "lowered.json")])
    roofline.main()
    printed = capsys.readouterr().out
    assert "| decode 1x512 | fp32 |" in printed
    assert "the file lacks: prefill 128, prefill 448, decode 1x1044" in printed
    assert "## Plans" not in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("graph  bucket", "expected what `neuron-xtts graphs --lower --json` prints"),
        ('{"graph": "decode"}', "expected what `neuron-xtts graphs --lower --json` prints"),
        (json.dumps([{"graph": "decode", "bucket": "1x512"}]), "decode 1x512 has no products: .*; lower again"),
        (json.dumps([line("decode", (1, 512)) | {"rejected": ["sort: x"]}]), r"decode 1x512 cannot be .*\(sort: x\)"),
    ],
)
def test_files_that_are_something_else(tmp_path, content, message):
    (tmp_path / "lowered.json").write_text(content)
    with pytest.raises(SystemExit, match=message):
        roofline.read(tmp_path / "lowered.json")
