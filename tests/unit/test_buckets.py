import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_xtts import BucketPlan
from neuron_xtts.buckets import Buckets
from neuron_xtts.errors import Fallback

SIZES = st.lists(st.integers(1, 2000), min_size=1)


def choose(plan, graph, *needed, missing=(), **options):
    return Buckets(plan, dict.fromkeys(missing, "not compiled")).choose(graph, *needed, **options)


@given(SIZES, st.integers(1, 2000))
def test_the_smallest_that_holds(sizes, needed):
    plan = BucketPlan(prefill=tuple(sizes))
    fitting = [size for size in sizes if size >= needed]
    if fitting:
        assert choose(plan, "prefill", needed) == (min(fitting),)
    else:
        with pytest.raises(Fallback, match=f"larger than the largest prefill bucket .{max(sizes)}."):
            choose(plan, "prefill", needed)


@given(SIZES, SIZES, st.integers(1, 2000), st.integers(1, 2000), st.data())
def test_what_is_missing_is_never_chosen(slots, decode, rows, positions, data):
    plan = BucketPlan(slots=tuple(slots), decode=tuple(decode))
    buckets = plan.buckets("decode")
    missing = data.draw(st.sets(st.sampled_from(buckets)))
    fitting = [b for b in buckets if b not in missing and b[0] >= rows and b[1] >= positions]
    named = [("decode", bucket) for bucket in missing]
    if fitting:
        assert choose(plan, "decode", rows, positions, missing=named) == min(fitting)
    else:
        with pytest.raises(Fallback, match=r"no decode graph: not compiled|larger than the largest decode bucket"):
            choose(plan, "decode", rows, positions, missing=named)


def test_exact_and_none():
    assert choose(BucketPlan(), "latents", 77) == (77,)
    assert choose(BucketPlan(decode=(100,)), "decode", 3, 77) == (3, 100)
    with pytest.raises(Fallback, match="no latents graph"):
        choose(BucketPlan.none(), "latents", 77)
    with pytest.raises(Fallback, match="no decode graph"):
        choose(BucketPlan.none(), "decode", 1, 5)


def test_a_dimension_that_must_be_met():
    """Rows when a cache grows, and lengths that cannot be padded."""
    plan = BucketPlan(slots=(1, 4), decode=(50, 90), conditioning=(345, 517))
    missing = [("decode", (1, 90))]
    assert choose(plan, "decode", 1, 60, missing=missing) == (4, 90)
    with pytest.raises(Fallback, match="no decode graph: not compiled"):
        choose(plan, "decode", 1, 60, missing=missing, exact=1)
    assert choose(plan, "conditioning", 345, exact=1) == (345,)
    with pytest.raises(Fallback, match="not a length that there is a conditioning graph for"):
        choose(plan, "conditioning", 400, exact=1)


def test_windows_that_are_missing():
    plan = BucketPlan(vocoder=(64, 96, 128))
    assert Buckets(plan, {("vocoder", (96,)): "broken"}).sizes("vocoder") == (64, 128)
    assert Buckets(BucketPlan(), {}).sizes("vocoder") is None
    everything = {("vocoder", (size,)): f"{size} does not compile" for size in plan.vocoder}
    with pytest.raises(Fallback, match="no vocoder graph: 64 does not compile"):
        Buckets(plan, everything).sizes("vocoder")


def test_sizes_are_sorted_once():
    assert BucketPlan(decode=[512, 64, 512]).decode == (64, 512)


@pytest.mark.parametrize("sizes", [(0,), (-3, 5), (1.5,), (True,), "64", 64, ("64",)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match=r"BucketPlan\.vocoder is .* expected a tuple of positive whole numbers"):
        BucketPlan(vocoder=sizes)


def test_static_plan_holds_whatever_xtts_may_say():
    plan = BucketPlan.static()
    assert choose(plan, "prefill", 32 + 404 + 1) == (448,)
    assert choose(plan, "decode", 1, 32 + 404 + 608) == choose(plan, "decode", 1, 1044) == (1, 1044)
    assert choose(plan, "latents", 1044) == (1044,)
