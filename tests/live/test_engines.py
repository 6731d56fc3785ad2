"""Instances over their life: processes that die or hang, engines that come and go, fast and slow ones."""

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from fakes import PROFILE, WATCH, QuickStep, expected_text, fake_instance, job, read, serving_jobs, text_of

from live.engines.attempt import Attempt, LiveRequest
from live.engines.backend import EngineError
from live.engines.http import HttpBackend
from live.engines.instance import Instance, Status
from live.engines.residency import Sleepers
from live.engines.supervise import SupervisedServer
from live.engines.watch import Watch
from live.jobs import COMPLETIONS, Job
from qlm_sim.core.events import InstanceDown, InstanceUp, ModelSwapped, RequestFinished
from qlm_sim.core.types import Request

FAKE_ENGINE = [
    *(sys.executable, "-m", "live.cli", "fake-engine", "{model}", "--served-model-name", "{name}"),
    *("--port", "{port}", "--gpu", "a10", "--speed", "10", "--max-num-seqs", "4"),
]


def events_of(service, kind):
    found = []
    service.add_listener(lambda now, events, actions: found.extend(e for e in events if type(e) is kind))
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_process_that_dies_or_hangs_is_started_again_and_its_work_goes_on(how, tmp_path):
    async def main():
        log = tmp_path / "engine.log"
        server = SupervisedServer("i0", FAKE_ENGINE, {"a": "llama-2-7b"}, HttpBackend, log_path=log)
        instance = Instance("i0", Sleepers({"a": server}), {"a": PROFILE}, "a", watch=WATCH)
        async with serving_jobs(instance) as service:
            ups = events_of(service, InstanceUp)
            tickets = [service.submit(job(service, f"r{i}", output=300)) for i in range(6)]
            async with asyncio.timeout(30.0):
                while not any(each.output_tokens > 5 for each in instance.running.values()):
                    await asyncio.sleep(0.01)
            pid = server.pid
            os.kill(pid, how)
            for i, ticket in enumerate(tickets):
                assert text_of(await read(ticket, 60.0)) == expected_text(f"r{i}", output=300)
            assert len(ups) == 1
            assert server.pid != pid
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
            assert instance.models["a"].max_num_seqs == 4
        with pytest.raises(ProcessLookupError):
            os.kill(server.pid or 2**22, 0)

    asyncio.run(main())


async def until_nobody_writes(fifo):
    """The worker of WITH_WORKER holds ``fifo`` open until it ends."""
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        async with asyncio.timeout(20.0):
            while True:
                try:
                    assert os.read(reader, 1) == b""
                    return
                except BlockingIOError:
                    await asyncio.sleep(0.02)
    finally:
        os.close(reader)


WITH_WORKER = ["sh", "-c", 'sleep 1000 <>"$0" & exec "$@"', "{fifo}", *FAKE_ENGINE]
"""A server and a worker process of it that does not care whether the server lives, as vLLM's does not."""


def test_no_worker_outlives_a_server_that_was_killed(tmp_path):
    async def main():
        fifo = tmp_path / "worker"
        os.mkfifo(fifo)
        command = [part.replace("{fifo}", str(fifo)) for part in WITH_WORKER]
        server = SupervisedServer("i0", command, {"a": "llama-2-7b"}, HttpBackend)
        await server.start("a")
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        os.close(reader)
        gone = asyncio.Event()
        server.when_gone(lambda reason: gone.set())
        os.kill(server.pid, signal.SIGKILL)
        await gone.wait()
        await server.stop(kill=True)
        await until_nobody_writes(fifo)

    asyncio.run(main())


def test_no_server_and_no_worker_outlives_us_however_we_end(tmp_path):
    fifo = tmp_path / "worker"
    os.mkfifo(fifo)
    command = [part.replace("{fifo}", str(fifo)) for part in WITH_WORKER]
    script = f"""
import asyncio
from live.engines.http import HttpBackend
from live.engines.supervise import SupervisedServer
async def main():
    server = SupervisedServer("i0", {command!r}, {{"a": "llama-2-7b"}}, HttpBackend)
    await server.start("a")
    print(server.pid, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as us:
        pid = int(us.stdout.readline())
        os.kill(pid, 0)
        us.kill()
    asyncio.run(until_nobody_writes(fifo))


def test_a_command_that_ends_at_once_is_an_error_of_one_line():
    async def main():
        server = SupervisedServer("i0", [sys.executable, "-c", "exit(3)"], {}, HttpBackend)
        with pytest.raises(EngineError, match="ended with exit code 3 before it served"):
            await server.start("a")
        with pytest.raises(EngineError, match="No such file"):
            await SupervisedServer("i0", ["/no/such/engine"], {}, HttpBackend).start("a")

    asyncio.run(main())


def test_json_in_a_command_is_left_as_it_is():
    async def main():
        command = ["sh", "-c", 'test "$0" = \'{"port": {}}\' && exec "$@"', '{"port": {}}', *FAKE_ENGINE]
        server = SupervisedServer("i0", command, {"a": "llama-2-7b"}, HttpBackend)
        await server.start("a")
        await server.stop(kill=False)

    asyncio.run(main())


@pytest.mark.parametrize("error", [EngineError("broken"), KeyError("broken")], ids=["expected", "not"])
def test_starts_that_fail_are_tried_again_ever_more_slowly(error):
    class Broken:
        def __init__(self):
            self.tried = []

        async def start(self, model):
            self.tried.append(asyncio.get_running_loop().time())
            raise error

        async def stop(self, *, kill):
            pass

        def when_gone(self, gone):
            pass

    async def main():
        broken = Broken()
        watch = Watch(backoff_s=0.02, most_backoff_s=0.16)
        instance = Instance("i0", broken, {"a": PROFILE}, "a", watch=watch)
        instance.connect({}, lambda event: None, lambda: None, asyncio.get_running_loop().time)
        instance.start()
        while len(broken.tried) < 7:
            await asyncio.sleep(0.01)
        assert instance.status is Status.STARTING
        await instance.stop()
        waits = [after - before for before, after in zip(broken.tried, broken.tried[1:], strict=False)]
        for wait, least in zip(waits, [0.02, 0.04, 0.08, 0.16, 0.16, 0.16], strict=True):
            assert wait >= 0.95 * least

    asyncio.run(main())


def test_an_engine_that_joins_helps_and_one_that_leaves_loses_nothing():
    async def main():
        async with serving_jobs(fake_instance("i0")[0]) as service:
            finished = events_of(service, RequestFinished)
            tickets = [service.submit(job(service, f"r{i}", output=60)) for i in range(24)]
            service.add_instance(fake_instance("i1")[0])
            while len(finished) < 3 or "i1" not in service.core.ledgers:
                await asyncio.sleep(0.005)
            await service.remove_instance("i0")
            for i, ticket in enumerate(tickets):
                assert text_of(await read(ticket)) == expected_text(f"r{i}", output=60)
            while service.core.requests:
                await asyncio.sleep(0.005)
            assert sorted(event.request_id for event in finished) == sorted(f"r{i}" for i in range(24))
            assert {event.instance for event in finished} == {"i0", "i1"}
            assert list(service.engines.instances) == ["i1"]
            assert service.models["a"].instances == ("i1",)

    asyncio.run(main())


def test_a_fast_engine_gets_more_of_the_work_than_a_slow_one():
    async def main():
        fast, _ = fake_instance("fast", step=QuickStep(base=4e-3))
        slow, _ = fake_instance("slow", step=QuickStep(base=16e-3))
        async with serving_jobs(fast, slow) as service:
            finished = events_of(service, RequestFinished)
            jobs = [job(service, f"r{i:02}", output=20, slo_s=3600, slo_class="batch") for i in range(60)]
            for ticket in [service.submit(each) for each in jobs]:
                await read(ticket)
            share = sum(event.instance == "fast" for event in finished) / len(finished)
            assert 0.65 < share < 0.95  # 0.8 by their speeds

    asyncio.run(main())


@pytest.mark.parametrize("swap", ["sleep", "restart"])
def test_a_measured_swap_corrects_the_profile(swap):
    async def main():
        instance, _ = fake_instance(models=("a", "b"), swap=swap)
        async with serving_jobs(instance) as service:
            swaps = events_of(service, ModelSwapped)
            instance.models["b"]  # promised before
            for name, model in (("r0", "b"), ("r1", "a"), ("r2", "b")):
                await read(service.submit(job(service, name, model=model, output=5)))
            ledger = service.core.ledgers["i0"]
            measured = [event.swap_s for event in swaps if event.model == "b"]
            assert len(measured) == 2
            assert min(measured) <= ledger.swap_s("b") <= max(measured)
            profile = instance.models["b"]  # what the core is told when the instance comes up anew
            assert (profile.swap_in_s if swap == "sleep" else profile.load_s) == measured[-1]

    asyncio.run(main())


def test_weights_that_were_dropped_are_loaded_again():
    """Sleep level 2: the swap takes as long as loading from storage, and that is what is learnt of it."""

    async def main():
        _, servers = fake_instance(models=("a", "b"))
        instance = Instance("i0", Sleepers(servers, 2), dict.fromkeys(("a", "b"), PROFILE), "a", watch=WATCH)
        async with serving_jobs(instance) as service:
            swaps = events_of(service, ModelSwapped)
            for name, model in (("r0", "b"), ("r1", "a")):
                outputs = await read(service.submit(job(service, name, model=model, output=5)))
                assert text_of(outputs) == expected_text(name, model, 5)
            assert all(event.swap_s > PROFILE.load_s for event in swaps)
            assert instance.models["a"].load_s == swaps[-1].swap_s
            assert instance.models["a"].swap_in_s == PROFILE.swap_in_s

    asyncio.run(main())


def test_a_swap_that_hangs_is_given_up_after_some_times_what_it_was_to_take():
    async def main():
        instance, servers = fake_instance(models=("a", "b"), watch=replace(WATCH, least_swap_s=0.1))
        async with serving_jobs(instance) as service:
            downs = events_of(service, InstanceDown)

            async def hang():
                await asyncio.Event().wait()

            servers["b"].engine.wake_up = hang
            began_at = service.now()
            outputs = await read(service.submit(job(service, "r0", model="b", output=5)), 20.0)
            assert text_of(outputs) == expected_text("r0", "b", 5)
            assert [event.instance for event in downs] == ["i0"]
            assert service.now() - began_at > 2 * WATCH.swap_times * PROFILE.swap_in_s

    asyncio.run(main())


@pytest.mark.parametrize(("order", "model"), [("wake_up", "b"), ("state", "a")])
def test_an_engine_that_fails_in_an_unknown_way_is_started_again(order, model):
    async def main():
        instance, servers = fake_instance(models=("a", "b"))
        async with serving_jobs(instance) as service:
            downs = events_of(service, InstanceDown)

            async def fail(*arguments):
                raise ValueError("the engine speaks in riddles")

            setattr(servers[model].backend, order, fail)
            outputs = await read(service.submit(job(service, "r0", model=model, output=300)))
            assert text_of(outputs) == expected_text("r0", model, 300)
            assert [event.instance for event in downs] == ["i0"]

    asyncio.run(main())


def test_an_engine_that_cannot_say_whether_it_is_well_is_started_again():
    """Else a request that it lost would wait for as long as others are heard."""

    async def main():
        instance, servers = fake_instance(watch=replace(WATCH, stall_s=60))
        async with serving_jobs(instance) as service:
            downs = events_of(service, InstanceDown)

            async def fail():
                raise ValueError("the engine speaks in riddles")

            servers["a"].backend.healthy = fail
            ticket = service.submit(job(service, "r0", output=300))
            while not any(each.output_tokens > 5 for each in instance.running.values()):
                await asyncio.sleep(0.005)
            instance.running["r0"].lost("the connection broke")
            assert text_of(await read(ticket)) == expected_text("r0", output=300)
            assert [event.instance for event in downs] == ["i0"]

    asyncio.run(main())


def test_a_pinned_request_is_left_alone_once_it_has_spoken():
    async def main():
        instance, servers = fake_instance(models=("a", "b"))
        async with serving_jobs(instance) as service:
            pinned = service.submit(job(service, "p", output=150, slo_class="batch", slo_s=3600, pinned=True))
            while not pinned._ready:
                await asyncio.sleep(0.005)
            urgent = service.submit(job(service, "u", model="b", output=5, slo_s=0.3))
            assert text_of(await read(pinned)) == expected_text("p", output=150)
            assert servers["a"].engine.aborted == 0
            assert text_of(await read(urgent)) == expected_text("u", "b", 5)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_pinned_request_whose_engine_is_lost_starts_anew_only_if_nobody_heard_it(stream):
    async def main():
        instance, servers = fake_instance()
        async with serving_jobs(instance) as service:
            ticket = service.submit(job(service, "p", output=100, pinned=True, stream=stream))
            while not any(each.output_tokens > 5 for each in instance.running.values()):
                await asyncio.sleep(0.005)
            await servers["a"].crash()
            outputs = await read(ticket)
            if stream:
                assert outputs[-1].status == 502
            else:
                assert text_of(outputs) == expected_text("p", output=100)

    asyncio.run(main())


def test_a_request_that_breaks_every_engine_fails_at_last():
    async def main():
        instance, servers = fake_instance()
        async with serving_jobs(instance) as service:
            ticket = service.submit(job(service, "poison", output=2000))
            while not ticket.ended:
                if any(each.began for each in instance.running.values()):
                    await servers["a"].crash()
                await asyncio.sleep(0.005)
            assert (await read(ticket))[-1].status == 502
            assert instance.crashes == 6
            assert text_of(await read(service.submit(job(service, "fine")))) == expected_text("fine")

    asyncio.run(main())


def test_text_is_not_said_twice_when_tokens_that_came_together_are_cut_off_whole():
    class Here:
        id = "i0"

        def heard(self):
            pass

    async def main():
        request = Request("r0", "a", "all", 20.0, 0.0, 3, 10)
        live = LiveRequest(Job(request, COMPLETIONS, {"prompt": "x", "stream": True, "temperature": 0}), None)
        first = Attempt(live, 1, Here(), lambda event: None)
        first.said({"index": 0, "text": " one two"}, (5, 6), (1, 2, 3))
        assert live.cut() == 0  # the second token may end within a character
        second = Attempt(live, 2, Here(), lambda event: None)
        assert second.call.body["prompt"] == [1, 2, 3]
        for text, token in ((" one", 5), (" two", 6), (" three", 7)):
            second.said({"index": 0, "text": text}, (token,), None)
        assert text_of(await live.ticket.next_batch()) == " one two three"
        assert live.transcript.token_ids == [5, 6, 7]

    asyncio.run(main())


def test_a_fake_server_that_is_stopped_while_it_starts_leaves_nothing_behind():
    async def main():
        _, servers = fake_instance()
        ((model, server),) = servers.items()
        starting = asyncio.create_task(server.start(model))
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await server.stop(kill=False)
        await server.start(model)
        assert await server.backend.healthy()
        await server.stop(kill=False)

    asyncio.run(main())
