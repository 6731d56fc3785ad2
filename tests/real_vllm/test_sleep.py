"""Sleep mode of real vLLM, at both levels: a model that was put away says the same when it is back."""

import asyncio

import aiohttp
import pytest

pytest.importorskip("vllm", reason="needs real vLLM: make test-vllm")

from real_vllm.engines_at_hand import Engines

from live.jobs import COMPLETIONS

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("level", [1, 2])
def test_a_model_says_the_same_after_its_sleep(level: int, engines: Engines) -> None:
    async def main() -> None:
        server = engines.servers["a"]
        backend = server.backend
        body = {"model": "a", "prompt": [300, 301, 302, 303], "max_tokens": 40, "temperature": 0}

        async def ask() -> str:
            url = server.url + COMPLETIONS
            async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
                assert response.status == 200, await response.text()
                text: str = (await response.json())["choices"][0]["text"]
                return text

        if await backend.asleep():
            await backend.wake_up(1)
        before = await ask()
        await backend.sleep(level)
        assert await backend.asleep()
        await asyncio.sleep(0.1)
        await backend.wake_up(level)
        assert not await backend.asleep()
        assert await ask() == before

    engines.run(main())
