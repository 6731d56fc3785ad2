"""The closed form of consecutive iterations against adding them up one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_sim.cluster.leap import Leap

seconds = st.floats(1e-6, 1.0)
leaps = st.tuples(st.floats(0.0, 1e6), st.integers(1, 3000), seconds, seconds | st.just(0.0))


@given(leaps)
def test_end_is_the_sum_of_the_iterations(numbers: tuple[float, int, float, float]) -> None:
    start, iterations, first_s, growth_s = numbers
    end = Leap().set(*numbers)
    assert end == pytest.approx(start + sum(first_s + i * growth_s for i in range(iterations)), rel=1e-9)


@given(leaps, st.floats(0.0, 1.0), st.booleans())
def test_cut_is_at_the_first_end_not_before_now(
    numbers: tuple[float, int, float, float], share: float, on_a_boundary: bool
) -> None:
    leap = Leap()
    end = leap.set(*numbers)
    iterations = numbers[1]
    now = leap.end(round(share * iterations)) if on_a_boundary else leap.start + share * (end - leap.start)
    ends = [leap.end(k) for k in range(iterations + 1)]
    done = leap.done(now)
    assert ends[done] <= now or done == 0
    assert done == iterations or ends[done + 1] > now
    assert leap.cut(now) == ends[leap.iterations]
    assert ends[leap.iterations] >= min(now, end)
    assert leap.iterations == 1 or ends[leap.iterations - 1] < now


@given(leaps, seconds, st.floats(0.0, 1.0), st.booleans())
def test_an_iteration_put_before_counts_with_the_others(
    numbers: tuple[float, int, float, float], lead_s: float, share: float, in_the_lead: bool
) -> None:
    leap = Leap()
    start, iterations = numbers[:2]
    end = leap.set(*numbers)
    began_at = start - lead_s
    leap.put_before(began_at)
    ends = [leap.end(k) for k in range(iterations + 2)]
    assert (ends[0], ends[1], leap.iterations) == (began_at, start, iterations + 1)
    assert ends[-1] == pytest.approx(end)
    now = began_at + share * (start - began_at) if in_the_lead else start + share * (end - start)
    done = leap.done(now)
    assert ends[done] <= now or done == 0
    assert done == iterations + 1 or ends[done + 1] > now
    assert leap.cut(now) == ends[leap.iterations]
    assert leap.iterations == 1 or ends[leap.iterations - 1] < now
