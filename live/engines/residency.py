"""How an instance brings a model onto its GPU: one server only, servers that sleep, or a server started anew.

A residency knows servers and processes. It knows no request and no scheduler.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from live.engines.backend import Backend, EngineError, EngineFacts

log = logging.getLogger(__name__)


class Server(Protocol):
    """One engine with its process, if that is ours."""

    @property
    def backend(self) -> Backend: ...

    async def start(self, model: str) -> None:
        """Serve ``model``: start the process, or find it running. Raises EngineError."""
        ...

    async def stop(self, *, kill: bool) -> None:
        """End the process, if it is ours; ``kill`` for one that may hang."""
        ...

    def when_gone(self, gone: Callable[[str], None]) -> None:
        """Call ``gone`` with the reason when the process ends though nobody stopped it."""
        ...


class Residency(Protocol):
    async def start(self, model: str) -> Backend:
        """Bring everything up, ``model`` serving. Raises EngineError."""
        ...

    async def swap(self, old: str, new: str, patience_s: float) -> Backend:
        """Serve ``new`` instead of ``old``. Raises EngineError.

        ``patience_s``: for servers that are up; one that is started has its own time for that.
        """
        ...

    def facts_of(self, model: str) -> EngineFacts | None:
        """What its engine told of itself, if the model was ever loaded."""
        ...

    async def stop(self, *, kill: bool) -> None: ...

    def when_gone(self, gone: Callable[[str], None]) -> None: ...


class Sleepers:
    """One server per model, all on one GPU; all but one sleep. With one model there is nothing to swap.

    ``level``: vLLM's sleep level: 1 keeps the weights in host memory, 2 drops them.
    """

    def __init__(self, servers: Mapping[str, Server], level: int = 1) -> None:
        self._servers = dict(servers)
        self._level = level
        self._facts: dict[str, EngineFacts] = {}

    async def start(self, model: str) -> Backend:
        # The one to serve comes last: each needs the GPU to itself while it starts.
        for name in sorted(self._servers, key=lambda name: (name == model, name)):
            server = self._servers[name]
            await server.start(name)
            if name not in self._facts:
                self._facts[name] = await server.backend.facts()
            asleep = await server.backend.asleep()
            if name == model and asleep:
                await server.backend.wake_up(self._level)
            elif name != model and not asleep:
                await server.backend.sleep(self._level)
        return self._servers[model].backend

    async def swap(self, old: str, new: str, patience_s: float) -> Backend:
        try:
            async with asyncio.timeout(patience_s):
                await self._servers[old].backend.sleep(self._level)
                backend = self._servers[new].backend
                await backend.wake_up(self._level)
        except TimeoutError:
            raise EngineError(f"it takes more than {patience_s:.0f} s") from None
        return backend

    def facts_of(self, model: str) -> EngineFacts | None:
        return self._facts.get(model)

    async def stop(self, *, kill: bool) -> None:
        await asyncio.gather(*(server.stop(kill=kill) for server in self._servers.values()))

    def when_gone(self, gone: Callable[[str], None]) -> None:
        for server in self._servers.values():
            server.when_gone(gone)


class Restarter:
    """One server, which is stopped and started with another model."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._facts: dict[str, EngineFacts] = {}

    async def start(self, model: str) -> Backend:
        await self._server.start(model)
        if model not in self._facts:
            self._facts[model] = await self._server.backend.facts()
        return self._server.backend

    async def swap(self, old: str, new: str, patience_s: float) -> Backend:
        await self._server.stop(kill=False)
        return await self.start(new)

    def facts_of(self, model: str) -> EngineFacts | None:
        return self._facts.get(model)

    async def stop(self, *, kill: bool) -> None:
        await self._server.stop(kill=kill)

    def when_gone(self, gone: Callable[[str], None]) -> None:
        self._server.when_gone(gone)
