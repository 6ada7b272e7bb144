import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_xtts import BucketPlan
from neuron_xtts.errors import Fallback


@given(st.lists(st.integers(1, 2000), min_size=1), st.integers(1, 2000))
def test_the_smallest_that_holds(sizes, needed):
    plan = BucketPlan(prefill=tuple(sizes))
    fitting = [size for size in sizes if size >= needed]
    if fitting:
        assert plan.choose("prefill", needed) == min(fitting)
    else:
        with pytest.raises(Fallback, match=f"larger than the largest prefill bucket .{max(sizes)}."):
            plan.choose("prefill", needed)


def test_exact_and_none():
    assert BucketPlan().choose("latents", 77) == 77
    with pytest.raises(Fallback, match="no latents graph"):
        BucketPlan.none().choose("latents", 77)
    with pytest.raises(Fallback, match="no decode graph"):
        BucketPlan.none().choose("slots", 1)


def test_sizes_are_sorted_once():
    assert BucketPlan(decode=[512, 64, 512]).decode == (64, 512)


@pytest.mark.parametrize("sizes", [(0,), (-3, 5), (1.5,), (True,), "64", 64, ("64",)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match=r"BucketPlan\.vocoder is .* expected a tuple of positive whole numbers"):
        BucketPlan(vocoder=sizes)


@pytest.mark.parametrize("positions", [100, 512, 1044])
def test_static_plan_holds_the_longest_sequence(positions):
    plan = BucketPlan.static(positions)
    assert plan.choose("prefill", positions) == plan.choose("decode", positions) == positions
    assert plan.prefill == tuple(sorted(set(plan.prefill)))
