"""The live service on fake engines: what comes out of it, whatever happens to the engines."""

import asyncio
from dataclasses import replace

import pytest
from fakes import WATCH, expected_text, fake_instance, job, read, serving_jobs, text_of, tokens_of
from msgspec import structs

from live.jobs import Delta, Failed, Finished, joined
from qlm_sim.core.actions import Evict, Pull, SwapModel
from qlm_sim.core.events import InstanceDown, InstanceUp, RequestArrived, RequestEvicted, RequestFinished


async def settled(service):
    """Until nothing is left in the service, and its core knows."""
    async with asyncio.timeout(5.0):
        while service.engines.requests or service.core.requests:
            await asyncio.sleep(0.005)


class Log:
    """All settles of a service."""

    def __init__(self, service):
        self.settles = []
        service.add_listener(lambda now, events, actions: self.settles.append((now, events, actions)))

    def actions(self, kind):
        return [a for _, _, actions in self.settles for a in actions if isinstance(a, kind)]

    def events(self, kind):
        return [e for _, events, _ in self.settles for e in events if isinstance(e, kind)]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_the_output_is_what_the_engine_says(chat, stream):
    async def main():
        async with serving_jobs(fake_instance()[0]) as service:
            tickets = [service.submit(job(service, f"r{i}", chat=chat, stream=stream)) for i in range(6)]
            for i, ticket in enumerate(tickets):
                outputs = await read(ticket)
                assert text_of(outputs) == expected_text(f"r{i}", chat=chat)
                assert outputs[-1] == Finished("length", ticket.request.prompt_tokens, 20)
                assert sum(len(o.token_ids) for o in outputs if isinstance(o, Delta)) == 20
            await settled(service)

    asyncio.run(main())


def test_pieces_that_are_only_text_are_put_together_and_nothing_else():
    def said(text, tokens, index=0, **more):
        return Delta({"index": index, "text": text, "logprobs": None, **more}, tokens)

    def chatted(*, index=0, **delta):
        return Delta({"index": index, "delta": delta, "finish_reason": None}, (7,))

    text = [said("a", (1,)), said("", ()), said("b", (2, 3))]
    other = [said("c", (4,), index=1)]
    last = [said("d", (5,), finish_reason="stop")]
    assert joined([*text, *other, *last]) == [said("ab", (1, 2, 3)), *other, *last]
    role, call = chatted(role="assistant", content=""), chatted(tool_calls=[{"index": 0}])
    words = [chatted(content="x", reasoning=None), chatted(content="y", reasoning=None)]
    (both,) = joined(words)
    assert (both.text, both.token_ids) == ("xy", (7, 7))
    assert joined([role, *words, call, words[0]]) == [role, both, call, words[0]]


def test_an_answer_that_does_not_stream_is_the_same_from_fewer_pieces():
    async def main():
        async with serving_jobs(fake_instance()[0]) as service:
            streamed = await read(service.submit(job(service, "r", output=200)))
            whole = job(service, "w", output=200, stream=False)
            whole = replace(whole, body={**whole.body, "prompt": job(service, "r").body["prompt"]})
            held = await read(service.submit(whole))
            assert text_of(held) == text_of(streamed) == expected_text("r", output=200)
            tokens = [[t for each in outputs[:-1] for t in each.token_ids] for outputs in (held, streamed)]
            assert tokens[0] == tokens[1]
            assert len(held) < len(streamed) / 5

    asyncio.run(main())


@pytest.mark.parametrize("chat", [False, True])
def test_a_job_goes_on_in_another_service_from_its_checkpoint(chat):
    async def main():
        async with serving_jobs(fake_instance()[0]) as service:
            whole = job(service, "r", output=300, chat=chat, stream=False)
            service.submit(whole)
            assert service.checkpoint("r", 1) is None, "nothing is said yet"
            while (resume := service.checkpoint("r", 100)) is None:
                await asyncio.sleep(0.01)
        assert service.checkpoint("r", 100) is None
        async with serving_jobs(fake_instance()[0]) as service:
            log = Log(service)
            outputs = await read(service.submit(whole, resume=resume))
            await settled(service)
        assert text_of(outputs) == expected_text("r", output=300, chat=chat)
        assert outputs[-1] == Finished("length", whole.request.prompt_tokens, 300)
        tokens = [token for output in outputs[:-1] for token in output.token_ids]
        assert tuple(tokens[: len(resume.token_ids)]) == resume.token_ids
        assert len(tokens) == 300
        (arrived,) = log.events(RequestArrived)
        assert arrived.output_tokens == len(resume.token_ids)
        assert sum(each.output_tokens for each in log.events(RequestFinished)) == 300

    asyncio.run(main())


def test_an_engine_gets_no_more_than_it_can_run():
    async def main():
        instance, servers = fake_instance(max_num_seqs=2)
        async with serving_jobs(instance) as service:
            waiting = []

            def look(now, events, actions):
                waiting.append(servers["a"].engine.waiting)

            service.add_listener(look)
            tickets = [service.submit(job(service, f"r{i}")) for i in range(8)]
            for ticket in tickets:
                await read(ticket)
            assert max(waiting) <= 1  # one that was sent a moment ago

    asyncio.run(main())


@pytest.mark.parametrize("chat", [False, True])
def test_text_is_the_same_when_models_are_swapped_under_it(chat):
    async def main():
        instance, servers = fake_instance(models=("a", "b"))
        async with serving_jobs(instance) as service:
            log = Log(service)
            long = [
                service.submit(job(service, f"l{i}", output=300, slo_class="batch", slo_s=3600, chat=chat))
                for i in range(3)
            ]
            await asyncio.sleep(0.1)
            urgent = service.submit(job(service, "u", model="b", output=10, slo_s=0.5))
            for i, ticket in enumerate(long):
                outputs = await read(ticket)
                assert text_of(outputs) == expected_text(f"l{i}", "a", 300, chat)
                assert outputs[-1] == Finished("length", ticket.request.prompt_tokens, 300)
            assert text_of(await read(urgent)) == expected_text("u", "b", 10)
            await settled(service)
            assert len(log.actions(SwapModel)) >= 2
            assert log.actions(Evict)
            asleep = {model: server.engine.sleep_level for model, server in servers.items()}
            assert asleep == {"a": 1, "b": 1} | {instance.model: None}

    asyncio.run(main())


@pytest.mark.parametrize("report_s", [0.05, 3.0])
def test_text_is_the_same_when_it_is_evicted_however_seldom_its_engine_reports(report_s):
    async def main():
        instance, _ = fake_instance(max_num_seqs=2, watch=replace(WATCH, report_s=report_s))
        async with serving_jobs(instance) as service:
            log = Log(service)
            patient = {"output": 600, "slo_class": "batch", "slo_s": 3600}
            long = [service.submit(job(service, f"l{i}", stream=i < 2, **patient)) for i in range(4)]
            for i in range(3):
                await asyncio.sleep(0.2)
                urgent = service.submit(job(service, f"u{i}", output=5, slo_s=0.2))
                assert text_of(await read(urgent)) == expected_text(f"u{i}", output=5)
            for i, ticket in enumerate(long):
                outputs = await read(ticket)
                assert text_of(outputs) == expected_text(f"l{i}", output=600)
                assert outputs[-1] == Finished("length", ticket.request.prompt_tokens, 600)
            await settled(service)
            evicted = log.events(RequestEvicted)
            assert any(event.output_tokens > 0 for event in evicted)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_requests_of_a_lost_engine_go_on_elsewhere(how):
    async def main():
        (one, servers), (two, _) = fake_instance("i0"), fake_instance("i1")
        async with serving_jobs(one, two) as service:
            log = Log(service)
            tickets = [service.submit(job(service, f"r{i}", output=150)) for i in range(8)]
            await asyncio.sleep(0.1)
            assert one.running
            if how == "crash":
                await servers["a"].crash()
            else:
                servers["a"].engine.frozen = True
            for i, ticket in enumerate(tickets):
                assert text_of(await read(ticket)) == expected_text(f"r{i}", output=150)
            await settled(service)
            finished = [event.request_id for event in log.events(RequestFinished)]
            assert sorted(finished) == [f"r{i}" for i in range(8)]
            assert [event.instance for event in log.events(InstanceDown)] == ["i0"]
            while not any(event.spec.id == "i0" for event in log.events(InstanceUp)):
                await asyncio.sleep(0.01)  # it is started again
            assert text_of(await read(service.submit(job(service, "after")))) == expected_text("after")

    asyncio.run(main())


def test_with_its_only_engine_gone_work_waits_for_it():
    async def main():
        instance, servers = fake_instance()
        async with serving_jobs(instance) as service:
            early = service.submit(job(service, "early", output=100))
            await asyncio.sleep(0.05)
            await servers["a"].crash()
            late = service.submit(job(service, "late"))
            assert text_of(await read(early)) == expected_text("early", output=100)
            assert text_of(await read(late)) == expected_text("late")

    asyncio.run(main())


@pytest.mark.parametrize("after_s", [0.0, 0.03])
def test_a_cancelled_request_frees_its_place(after_s):
    async def main():
        instance, _ = fake_instance(max_num_seqs=1)
        async with serving_jobs(instance) as service:
            first = service.submit(job(service, "first", output=2000))
            second = service.submit(job(service, "second", output=5))
            await asyncio.sleep(after_s)
            service.cancel("first")
            assert isinstance((await read(first))[-1], Failed)
            assert text_of(await read(second)) == expected_text("second", output=5)
            await settled(service)

    asyncio.run(main())


def test_a_request_that_is_too_long_fails_alone():
    async def main():
        instance, _ = fake_instance(max_model_len=64)
        async with serving_jobs(instance) as service:
            long = job(service, "long", prompt="x" * 1000)
            outputs = await read(service.submit(long))
            assert isinstance(outputs[-1], Failed)
            assert outputs[-1].status == 400
            assert "maximum context length" in outputs[-1].reason
            assert text_of(await read(service.submit(job(service, "ok")))) == expected_text("ok")

    asyncio.run(main())


@pytest.mark.parametrize("crash", [False, True])
def test_a_chat_without_a_limit_takes_what_its_context_leaves(crash):
    """However long its prompt was taken to be, and when it goes on from its tokens too."""

    async def main():
        instance, servers = fake_instance(max_model_len=300)
        async with serving_jobs(instance) as service:
            asked = job(service, "r", chat=True, max_tokens=None)
            asked = replace(asked, request=structs.replace(asked.request, prompt_tokens=5000, max_tokens=1))
            ticket = service.submit(asked)
            if crash:
                while not any(each.output_tokens > 5 for each in instance.running.values()):
                    await asyncio.sleep(0.005)
                await servers["a"].crash()
            outputs = await read(ticket)
            prompt_tokens = len(tokens_of("r", chat=True))
            room = 300 - prompt_tokens
            assert text_of(outputs) == expected_text("r", output=room, chat=True)
            assert outputs[-1] == Finished("length", prompt_tokens, room)

    asyncio.run(main())


@pytest.mark.parametrize("bad", [{"user": "\ud800"}, {"max_tokens": "many"}], ids=["call", "attempt"])
def test_a_request_that_cannot_be_sent_fails_alone(bad):
    async def main():
        instance, _ = fake_instance()
        async with serving_jobs(instance) as service:
            (refused,) = await read(service.submit(job(service, "bad", **bad)))
            assert refused.status == 400
            assert refused.reason.startswith("the request cannot be sent to an engine: ")
            assert text_of(await read(service.submit(job(service, "ok")))) == expected_text("ok")
            await settled(service)
            assert not instance.running
            assert service.failure is None

    asyncio.run(main())


def test_draining_ends_what_runs_and_gives_back_what_waits():
    async def main():
        instance, _ = fake_instance(max_num_seqs=1)
        async with serving_jobs(instance) as service:
            log = Log(service)
            running = service.submit(job(service, "running", output=50))
            waiting = service.submit(job(service, "waiting"))
            while not log.actions(Pull):
                await asyncio.sleep(0.005)
            await service.drain(5.0)
            assert text_of(await read(running)) == expected_text("running", output=50)
            assert (await read(waiting)) == [Failed(503, "the server is shutting down")]
            assert isinstance((await read(service.submit(job(service, "late"))))[-1], Failed)

    asyncio.run(main())


def test_forecasts_that_take_long_are_made_seldom(monkeypatch):
    clock = iter((0.0, 0.05, 1.0, 3.0))
    monkeypatch.setattr("live.service.time.perf_counter", lambda: next(clock))

    async def main():
        async with serving_jobs(fake_instance()[0]) as service:
            forecaster = service.core.forecaster
            assert forecaster.fresh_s == 0.0
            assert service.forecast_new(job(service, "r0").request) is not None
            assert forecaster.fresh_s == pytest.approx(0.25)
            service.forecast_new(job(service, "r0").request)
            assert forecaster.fresh_s == 1.0

    asyncio.run(main())
