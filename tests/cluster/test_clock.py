"""The clock tells when an instant is over."""

import pytest

from qlm_sim.cluster.clock import LATE, Alarm, Clock


def alarms(clock: Clock, told: list[str], *names: str) -> list[Alarm]:
    return [Alarm(clock, lambda now, name=name: told.append(f"{name} {now:g}")) for name in names]  # type: ignore[misc]


def run(clock: Clock, told: list[str], until_s: float = 99.0) -> list[str]:
    def end_of_instant(now: float) -> bool:
        told.append(f"end {now:g}")
        return True

    clock.run_instants(end_of_instant, until_s)
    return told


def test_instant_ends_once_behind_all_its_events() -> None:
    clock, told = Clock(), []
    a, b, c = alarms(clock, told, "a", "b", "c")
    c.set(2.0)
    a.set(1.0)
    b.set(1.0)
    assert run(clock, told) == ["a 1", "b 1", "end 1", "c 2", "end 2"]


def test_setting_that_was_overtaken_neither_rings_nor_hides_the_end_of_its_instant() -> None:
    clock, told = Clock(), []
    a, b = alarms(clock, told, "a", "b")
    a.set(1.0)
    b.set(0.5)
    b.set(1.0)
    b.set(3.0)
    assert run(clock, told) == ["a 1", "end 1", "b 3", "end 3"]


def test_cleared_alarm_is_silent() -> None:
    clock, told = Clock(), []
    a, b = alarms(clock, told, "a", "b")
    a.set(1.0)
    a.clear()
    b.set(2.0)
    assert run(clock, told) == ["b 2", "end 2"]


def test_late_alarm_rings_behind_the_others_of_its_time() -> None:
    clock, told = Clock(), []
    late = Alarm(clock, lambda now: told.append("late"), LATE)
    late.set(1.0)
    alarms(clock, told, "a")[0].set(1.0)
    assert run(clock, told) == ["a 1", "late", "end 1"]


def test_horizon_is_included_and_nothing_behind_it() -> None:
    clock, told = Clock(), []
    a, b = alarms(clock, told, "a", "b")
    a.set(1.0)
    b.set(1.5)
    assert run(clock, told, until_s=1.0) == ["a 1", "end 1"]
    assert clock.now == 1.0


def test_processes_of_simpy_run_beside_alarms() -> None:
    clock, told = Clock(), []

    def process():  # type: ignore[no-untyped-def]
        yield clock.timeout(1.0)
        told.append("process")
        yield clock.timeout(1.0)
        raise ValueError("from the process")

    clock.process(process())
    alarms(clock, told, "a")[0].set(1.0)
    with pytest.raises(RuntimeError, match="a SimPy event failed") as failure:
        run(clock, told)
    assert told == ["end 0", "a 1", "process", "end 1"]
    assert str(failure.value.__cause__) == "from the process"
