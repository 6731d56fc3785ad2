"""A fake engine in this very process, as an instance's server: for tests and trying things out."""

import contextlib
from collections.abc import Callable, Mapping

from live.engines.backend import Backend
from live.engines.supervise import Connect
from live.fake.engine import FakeEngine
from live.fake.serve import serving


class FakeServer:
    """Starts a fake engine of the asked-for model, reached over HTTP like any other."""

    def __init__(self, engines: Mapping[str, Callable[[], FakeEngine]], connect: Connect) -> None:
        """``engines``: by model, what makes one."""
        self._engines = engines
        self._connect = connect
        self._running: contextlib.AsyncExitStack | None = None
        self._backend: Backend | None = None
        self.engine: FakeEngine | None = None
        self._gone: Callable[[str], None] = lambda reason: None

    @property
    def backend(self) -> Backend:
        assert self._backend is not None, "the server has not been started yet"
        return self._backend

    def when_gone(self, gone: Callable[[str], None]) -> None:
        self._gone = gone

    async def start(self, model: str) -> None:
        await self.stop(kill=True)
        self.engine = self._engines[model]()
        running = contextlib.AsyncExitStack()
        url = await running.enter_async_context(serving(self.engine))
        # Not before: it may be stopped while it starts.
        self._running, self._backend = running, self._connect(url, model)

    async def stop(self, *, kill: bool) -> None:
        running, self._running = self._running, None
        if running is not None:
            await self.backend.close()
            await running.aclose()

    async def crash(self) -> None:
        """End without being asked to, as a process does that is killed."""
        running, self._running = self._running, None
        if running is not None:
            await running.aclose()
            self._gone("the fake crashed")
