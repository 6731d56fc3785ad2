"""The least load of a cluster, against arithmetic that needs no solver."""

import pytest

from qlm_sim.solver.load import least_load


def test_like_instances_share_the_work() -> None:
    demand = {"a": 3.0, "b": 2.0}
    load = least_load(demand, {"gpu": {"a": 4.0, "b": 1.0}}, {"gpu": 5})
    assert load == pytest.approx((3 / 4 + 2 / 1) / 5)


def test_model_that_one_kind_alone_can_serve_drives_the_other_away() -> None:
    capacity = {"large": {"a": 2.0, "b": 2.0}, "small": {"a": 1.0}}
    counts = {"large": 1, "small": 2}
    assert least_load({"a": 2.0}, capacity, counts) == pytest.approx(2 / (2 + 2 * 1))
    assert least_load({"a": 2.0, "b": 2.0}, capacity, counts) == pytest.approx(1.0)
    assert least_load({"b": 4.0}, capacity, counts) == pytest.approx(2.0)
