"""Jobs in processes of their own: order kept, errors and deaths told, nobody left behind."""

import multiprocessing
import os
import time
from functools import partial

import pytest

from qlm_sim.errors import InputError
from qlm_sim.processes import Report, run_jobs


def square(number: int, pause_s: float, report: Report) -> int:
    report(number)
    time.sleep(pause_s)
    return number * number


def refuse(report: Report) -> None:
    raise InputError("no such thing")


def die(report: Report) -> None:
    os._exit(3)


def test_results_keep_the_order_of_jobs_and_reports_name_them() -> None:
    heard = []
    jobs = [partial(square, 3, 0.3), partial(square, 5, 0.0)]
    assert run_jobs(jobs, 2, lambda number, value: heard.append((number, value))) == [9, 25]
    assert sorted(heard) == [(0, 3), (1, 5)]


def test_bad_input_in_a_job_is_raised_here_and_ends_the_others() -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match="no such thing"):
        run_jobs([refuse, partial(square, 1, 60.0)], 2, lambda number, value: None)
    assert time.monotonic() - started < 30
    for process in multiprocessing.active_children():
        process.join(5)
    assert not multiprocessing.active_children()


def test_job_that_dies_is_told() -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        run_jobs([die], 1, lambda number, value: None)
