"""The drivers on real vLLM: the contract, evictions, swaps, two engines, a crash. ``make test-vllm``."""

import asyncio
import os
import signal
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest

pytest.importorskip("vllm", reason="needs real vLLM: make test-vllm")

from contract.laws import check_laws, check_outcome
from contract.live_world import body_of, play
from contract.scenarios import SCENARIOS, Run, Scenario
from fakes import read, text_of
from real_vllm.engines_at_hand import Engines, instance, wake

from live.engines.instance import Instance, Status
from live.engines.residency import Sleepers
from live.jobs import CHAT, COMPLETIONS, Finished, Job
from live.service import Service
from qlm_sim.core.actions import Evict, SwapModel
from qlm_sim.core.events import InstanceDown, InstanceUp, ModelSwapped, RequestFinished
from qlm_sim.core.types import Request

pytestmark = pytest.mark.vllm

CRASHLESS = [scenario for scenario in SCENARIOS if "crash" not in scenario.needs]
WITHOUT_SWAPS = [scenario for scenario in CRASHLESS if not scenario.needs]


async def undisturbed(url: str, endpoint: str, model: str, body: Mapping[str, Any]) -> str:
    """What the server says when it is asked directly."""
    asked = {**body, "model": model, "stream": False}
    async with aiohttp.ClientSession() as session, session.post(url + endpoint, json=asked) as response:
        answer = await response.json()
        assert response.status == 200, answer
        choice = answer["choices"][0]
        return choice["message"]["content"] if endpoint == CHAT else choice["text"]


async def play_and_compare(engines: Engines, scenario: Scenario, instances: list[Instance]) -> Run:
    run = await play(scenario, instances, timeout_s=60.0)
    for ask in scenario.asks:
        if ask.id in scenario.finishing:
            url = await wake(engines, ask.model)
            run.expected[ask.id] = await undisturbed(url, COMPLETIONS, ask.model, body_of(ask))
    check_laws(run)
    check_outcome(scenario, run)
    assert run.texts.keys() >= scenario.finishing
    return run


@pytest.mark.parametrize("scenario", CRASHLESS, ids=lambda scenario: scenario.name)
def test_contract_over_http(scenario: Scenario, engines: Engines) -> None:
    async def main() -> None:
        # Two instances of one model on one server: what is evicted here is taken up there.
        instances = [engines.attached(name, *scenario.models) for name in scenario.instances]
        await play_and_compare(engines, scenario, instances)

    engines.run(main())


@pytest.mark.parametrize("scenario", WITHOUT_SWAPS, ids=lambda scenario: scenario.name)
def test_contract_in_process(scenario: Scenario, engines: Engines, in_process: Any) -> None:
    async def main() -> None:
        first = instance("i0", Sleepers({"a": in_process}))
        others = [engines.attached(name, "a") for name in scenario.instances[1:]]
        await play_and_compare(engines, scenario, [first, *others])

    engines.run(main())


class Watched:
    """A service on instances, with all that it settled."""

    def __init__(self, *instances: Instance) -> None:
        self.service = Service(instances, solver_process=False)
        self.run = Run()
        self.service.add_listener(self.run.record)

    async def __aenter__(self) -> "Watched":
        await self.service.start()
        await self.service.wait_up(200.0)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.service.stop()

    def actions(self, kind: type) -> list[Any]:
        return [each for _, _, actions in self.run.settles for each in actions if isinstance(each, kind)]


def make_job(
    service: Service,
    name: str,
    model: str,
    output: int,
    *,
    chat: bool = False,
    slo_s: float = 3600.0,
    **body: Any,
) -> Job:
    prompt = f"def {name}(self):\n    return "
    asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    slo_class = "batch" if slo_s > 60 else "interactive"
    request = Request(name, model, slo_class, slo_s, service.now(), 12, output)
    given = {"max_tokens": output, "temperature": 0, "ignore_eos": True, "stream": True, **body}
    return Job(request, CHAT if chat else COMPLETIONS, {**asked, **given})


async def check_text(engines: Engines, job: Job, outputs: list[Any]) -> None:
    url = await wake(engines, job.request.model)
    body = {name: value for name, value in job.body.items() if name != "stream_options"}
    assert text_of(outputs) == await undisturbed(url, job.endpoint, job.request.model, body)
    assert isinstance(outputs[-1], Finished)


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_a_batch_is_evicted_for_an_urgent_request_of_another_model_and_goes_on(
    chat: bool, engines: Engines
) -> None:
    async def main() -> None:
        async with Watched(engines.attached("i0", "a", "b")) as watched:
            service = watched.service
            batch = [make_job(service, f"batch_{i}", "a", 800, chat=chat) for i in range(3)]
            tickets = [service.submit(job) for job in batch]
            running = service.engines.instances["i0"].running
            while len([attempt for attempt in running.values() if attempt.output_tokens > 20]) < 3:
                await asyncio.sleep(0.01)
            urgent = make_job(service, "urgent", "b", 20, chat=chat, slo_s=0.5)
            spoken = await read(service.submit(urgent), 60.0)
            outputs = [await read(ticket, 120.0) for ticket in tickets]
            evicted = {action.request_id for action in watched.actions(Evict)}
            assert evicted >= {job.request.id for job in batch}
            swapped = watched.run.events(ModelSwapped)
            assert [action.model for action in watched.actions(SwapModel)] == [e.model for e in swapped]
            assert {e.model for e in swapped} == {"a", "b"}
            assert all(0 < e.swap_s < 60 for e in swapped)
            check_laws(watched.run)
        for job, output in zip([urgent, *batch], [spoken, *outputs], strict=True):
            await check_text(engines, job, output)

    engines.run(main())


def test_stop_strings_hold_across_an_eviction(engines: Engines) -> None:
    async def main() -> None:
        url = await wake(engines, "a")
        async with Watched(engines.attached("i0", "a")) as watched:
            service = watched.service
            whole = await undisturbed(url, COMPLETIONS, "a", make_job(service, "stop", "a", 200).body)
            stop = [whole[len(whole) // 2 :][:6], "never to be found"]
            job = make_job(service, "stop", "a", 200, stop=stop)
            ticket = service.submit(job)
            live = service.engines.requests["stop"]
            outputs: list[Any] = []
            for cut in (20, 45, 70):
                while len(live.transcript.token_ids) < cut and not ticket.ended:
                    outputs += await ticket.next_batch()
                attempt = live.attempt
                if attempt is not None:  # as if its engine had lost it
                    assert attempt.instance._backend is not None
                    attempt.instance._backend.abort(attempt)
            outputs += await read(ticket, 60.0)
            async with asyncio.timeout(10.0):
                while service.core.requests:  # its end is known to the client first
                    await asyncio.sleep(0.005)
            assert len({event.attempt for event in watched.run.events(RequestFinished)}) == 1
        assert text_of(outputs) == await undisturbed(url, COMPLETIONS, "a", job.body)
        assert text_of(outputs) == whole[: whole.index(stop[0])]

    engines.run(main())


def test_two_engines_with_two_models_serve_side_by_side(engines: Engines) -> None:
    async def main() -> None:
        await wake(engines, "b")
        async with Watched(engines.attached("i0", "a"), engines.attached("i1", "b")) as watched:
            service = watched.service
            jobs = [make_job(service, f"job_{i}", "ab"[i % 2], 30 + i, chat=i % 3 == 0) for i in range(16)]
            outputs = await asyncio.gather(*(read(service.submit(job), 120.0) for job in jobs))
            finished = {event.request_id: event for event in watched.run.events(RequestFinished)}
            for job in jobs:
                assert finished[job.request.id].instance == {"a": "i0", "b": "i1"}[job.request.model]
            check_laws(watched.run)
        for job, output in zip(jobs, outputs, strict=True):
            await check_text(engines, job, output)

    engines.run(main())


def test_a_killed_engine_loses_nothing_and_is_started_again(engines: Engines, in_process: Any) -> None:
    async def main() -> None:
        server = engines.new_server("a")
        doomed = instance("i0", Sleepers({"a": server}))
        async with Watched(doomed, instance("i1", Sleepers({"a": in_process}))) as watched:
            service = watched.service
            jobs = [make_job(service, f"job_{i}", "a", 200) for i in range(8)]
            reading = [asyncio.ensure_future(read(service.submit(job), 120.0)) for job in jobs]
            while len([attempt for attempt in doomed.running.values() if attempt.output_tokens > 10]) < 4:
                await asyncio.sleep(0.02)
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            outputs = [await each for each in reading]
            assert [event.instance for event in watched.run.events(InstanceDown)] == ["i0"]
            finished = [event.request_id for event in watched.run.events(RequestFinished)]
            assert sorted(finished) == sorted({job.request.id for job in jobs})
            async with asyncio.timeout(120.0):
                while doomed.status is not Status.UP:
                    await asyncio.sleep(0.1)
            after = [make_job(service, f"after_{i}", "a", 20) for i in range(8)]
            outputs += await asyncio.gather(*(read(service.submit(job), 60.0) for job in after))
            ups = [event.spec.id for event in watched.run.events(InstanceUp)]
            assert ups.count("i0") == 2
            assert {event.instance for event in watched.run.events(RequestFinished)} == {"i0", "i1"}
            check_laws(watched.run)
        for job, output in zip([*jobs, *after], outputs, strict=True):
            await check_text(engines, job, output)

    engines.run(main())
