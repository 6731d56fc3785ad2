"""The solver's process: plans come from it, the newest question is answered, its death survived."""

import asyncio
import os
import signal

from live.solver import ProcessSolver
from qlm_sim.core.plan import GroupService, InstanceState, PlanProblem, WaitingGroup
from qlm_sim.solver.search import solve


def problem(number, groups=6):
    service = {"i0": GroupService(0.1, 0.5, 0.1, 8.0), "i1": GroupService(0.1, 0.5, 0.1, 8.0)}
    return PlanProblem(
        number=number,
        groups=tuple(
            WaitingGroup(i, "ab"[i % 2], "c", 4, 1.0, False, 2.0 + i, 3.0 + i, service) for i in range(groups)
        ),
        instances=tuple(
            InstanceState(name, name, model, 0.0, 1.0, 0, 0.0, {"a": 1.0, "b": 1.0})
            for name, model in (("i0", "a"), ("i1", "b"))
        ),
        current={"i0": tuple(range(groups)), "i1": ()},
    )


async def ready(solver, timeout_s=30.0):
    async with asyncio.timeout(timeout_s):
        while solver.ready_at > 1e9:
            await asyncio.sleep(0.005)
    return solver.collect()


def test_the_process_solves_as_the_simulation_does():
    async def main():
        solver = ProcessSolver(lambda: None)
        solver.start()
        try:
            solver.submit(0.0, problem(1))
            assert await ready(solver) == solve(problem(1))
            assert solver.ready_at > 1e9
        finally:
            solver.stop()

    asyncio.run(main())


def test_only_the_newest_question_is_answered():
    async def main():
        solver = ProcessSolver(lambda: None)
        solver.start()
        try:
            for number in range(1, 6):
                solver.submit(0.0, problem(number))
            assert (await ready(solver)).number == 5
            assert solver.solved == 1
        finally:
            solver.stop()

    asyncio.run(main())


def test_a_killed_process_is_replaced_and_plans_go_on():
    async def main():
        solver = ProcessSolver(lambda: None)
        solver.start()
        try:
            solver.submit(0.0, problem(1))
            await ready(solver)
            os.kill(solver._process.pid, signal.SIGKILL)
            while solver._connection is not None:
                await asyncio.sleep(0.005)
            solver.submit(0.0, problem(2))
            assert (await ready(solver)).number == 2  # in place
            while solver._connection is None:
                await asyncio.sleep(0.01)
            solver.submit(0.0, problem(3))
            assert (await ready(solver)).number == 3
            assert solver.solve_s > 0
        finally:
            solver.stop()

    asyncio.run(main())


def test_a_process_that_cannot_be_started_is_tried_again(monkeypatch):
    monkeypatch.setattr("live.solver.RESTART_S", 0.01)

    async def main():
        solver = ProcessSolver(lambda: None)
        solver.start()
        try:
            tries = []
            works = solver.start

            def start():
                tries.append(0)
                if len(tries) < 3:
                    raise BlockingIOError("Resource temporarily unavailable")
                works()

            monkeypatch.setattr(solver, "start", start)
            os.kill(solver._process.pid, signal.SIGKILL)
            async with asyncio.timeout(30.0):
                while not (tries and solver._connection is not None):
                    await asyncio.sleep(0.005)
            solver.submit(0.0, problem(1))
            assert (await ready(solver)).number == 1
            assert len(tries) == 3
        finally:
            solver.stop()

    asyncio.run(main())


def test_a_solver_that_was_stopped_starts_nothing_more(monkeypatch):
    monkeypatch.setattr("live.solver.RESTART_S", 0.1)

    async def main():
        solver = ProcessSolver(lambda: None)
        solver.start()
        os.kill(solver._process.pid, signal.SIGKILL)
        while solver._connection is not None:
            await asyncio.sleep(0.005)
        solver.stop()
        await asyncio.sleep(0.3)
        assert solver._process is None

    asyncio.run(main())
