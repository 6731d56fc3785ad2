"""What operators see: the dashboard, its events, and the key that locks both."""

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from browser import CHROMIUM, open_page
from live_batches import leading
from live_gateway import LONG, MODEL, engines, eventually, in_background, queued, running_gateway


def test_what_all_tenants_share_can_be_locked(tmp_path: Path) -> None:
    config = engines().replace("port = 0", 'port = 0\nadmin_key = "admin"')
    with running_gateway(tmp_path, config) as gateway:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            gateway.get("/metrics")
        assert "qlm_leader 1.0" in gateway.get("/metrics", {"authorization": "Bearer admin"})
        assert "<title>QLM live</title>" in gateway.get("/dashboard?key=admin")


def test_the_dashboard_is_sent_the_state(tmp_path: Path) -> None:
    with (
        running_gateway(tmp_path, engines(slots=2, speed=0.5)) as gateway,
        in_background(gateway, [LONG] * 5),
    ):
        eventually(lambda: len(queued(gateway)) == 3)
        with urllib.request.urlopen(f"{gateway.url}/dashboard/events", timeout=20) as events:
            states = (json.loads(line.removeprefix(b"data: ")) for line in events if line.strip())
            # Until both of those that run have their first token.
            state = next(each for each in states if each["totals"]["waiting"] == 3)
    assert state["totals"]["running"] == 2
    (instance,) = state["instances"]
    assert instance["running"] == {"interactive": 2}
    assert sum(group["requests"] for group in instance["queue"]) == 3
    assert [each["name"] for each in state["classes"]] == ["interactive", "batch-1", "batch-2"]
    assert len(state["waits"]) == 2


@pytest.mark.anyio
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
async def test_the_page_shows_it_in_a_browser(tmp_path: Path) -> None:
    with (
        running_gateway(tmp_path, engines(slots=2, speed=0.5)) as gateway,
        in_background(gateway, [LONG] * 5),
    ):
        eventually(lambda: len(queued(gateway)) == 3)
        async with open_page(f"{gateway.url}/dashboard", tmp_path / "profile") as page, asyncio.timeout(20):
            while "3 queued in" not in (shown := await page.text()):
                await asyncio.sleep(0.2)
    for told in ("2 running", "policy qlm", "interactive", MODEL):
        assert told in shown


@pytest.mark.anyio
async def test_a_page_is_told_no_more_of_a_gateway_that_schedules_no_more(tmp_path: Path) -> None:
    async with leading(tmp_path, engines()) as (gateway, house, _):
        states = aiter(house.feed.stream().body_iterator)
        assert await anext(states)
        await gateway.close()
        async with asyncio.timeout(10):
            assert [state async for state in states] == []
