"""Engine servers: one that we start, watch and stop, or one that somebody else runs.

Both give a backend for its URL once it answers and generates.
"""

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from live.engines.backend import Backend, EngineError
from live.engines.guard import Guard, dismiss, lead_group

log = logging.getLogger(__name__)

POLL_S = 0.2
"""Between two looks whether a server is up."""
STOP_S = 15.0
"""Seconds to end in peace after SIGTERM; then it is killed."""
PROBE_S = 120.0
"""The first token after a start may take that long: kernels are compiled."""

_PLACEHOLDER = re.compile(r"\{(port|model|name)\}")

Connect = Callable[[str, str], Backend]
"""Makes a backend for a server: its URL, and the model that it serves."""


class AttachedServer:
    """A server that somebody else runs."""

    def __init__(self, url: str, connect: Connect) -> None:
        self._url = url
        self._connect = connect
        self._backend: Backend | None = None

    @property
    def backend(self) -> Backend:
        assert self._backend is not None, "the server has not been found yet"
        return self._backend

    async def start(self, model: str) -> None:
        if self._backend is not None:
            await self._backend.close()
        self._backend = self._connect(self._url, model)
        await _until_it_works(self._backend)

    async def stop(self, *, kill: bool) -> None:
        if self._backend is not None:
            await self._backend.close()

    def when_gone(self, gone: Callable[[str], None]) -> None:
        pass


class SupervisedServer:
    """A server that we start.

    In its command {port} is a free port, {name} the model and {model} what ``paths`` has for it. Other braces
    stay as they are: servers take JSON.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        paths: Mapping[str, str],
        connect: Connect,
        *,
        env: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        log_path: Path | None = None,
        start_timeout_s: float = 900.0,
    ) -> None:
        self._name = name
        self._command = command
        self._paths = paths
        self._connect = connect
        self._env = env or {}
        self._host = host
        self._log_path = log_path
        self._start_timeout_s = start_timeout_s
        self._url: str | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._guard: Guard | None = None
        """Of the server and its workers, which outlive one that is killed."""
        self._backend: Backend | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._gone: Callable[[str], None] = lambda reason: None

    @property
    def backend(self) -> Backend:
        assert self._backend is not None, "the server has not been started yet"
        return self._backend

    @property
    def url(self) -> str:
        assert self._url is not None, "the server has not been started yet"
        return self._url

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def when_gone(self, gone: Callable[[str], None]) -> None:
        self._gone = gone

    async def start(self, model: str) -> None:
        await self.stop(kill=True)
        port = free_port(self._host)
        named = {"port": str(port), "model": self._paths.get(model, model), "name": model}
        command = [_PLACEHOLDER.sub(lambda found: named[found[1]], part) for part in self._command]
        output = self._open_log()
        self._guard = guard = lead_group()
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self._env},
                # Ctrl-C is for us. uvloop does not know the argument process_group.
                preexec_fn=lambda: os.setpgid(0, guard.pid),
            )
        except OSError as error:
            await self.stop(kill=True)
            raise EngineError(f"{command[0]}: {error.strerror or error}") from None
        finally:
            if output not in (None, sys.stderr):
                output.close()
        self._url = f"http://{self._host}:{port}"
        self._backend = backend = self._connect(self._url, model)
        up = asyncio.ensure_future(_until_healthy(backend))
        died = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((up, died), timeout=self._start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                where = f"; its last words are in {self._log_path}" if self._log_path else ""
                raise EngineError(f"{command[0]} ended with {_exit(died.result())} before it served{where}")
            if not up.done():
                raise EngineError(f"{command[0]} does not serve after {self._start_timeout_s:.0f} s")
        except BaseException:
            up.cancel()
            died.cancel()
            await self.stop(kill=True)
            raise
        self._watcher = asyncio.ensure_future(self._watch(process, died))
        await _until_it_works(backend)

    async def _watch(self, process: asyncio.subprocess.Process, died: "asyncio.Future[int]") -> None:
        code = await died
        if self._process is process:
            self._gone(f"its process ended with {_exit(code)}")

    async def stop(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        if self._backend is not None:
            await self._backend.close()
        if process is not None and not kill:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                log.warning("engine %s does not end; it is killed", self._name)
        guard, self._guard = self._guard, None
        if guard is not None:
            dismiss(guard)  # with the workers, also of a server that died
        if process is not None:
            await process.wait()

    def _open_log(self) -> IO[bytes] | None:
        if self._log_path is None:
            return None
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        return self._log_path.open("ab")


async def _until_healthy(backend: Backend) -> None:
    while not await backend.healthy():
        await asyncio.sleep(POLL_S)


async def _until_it_works(backend: Backend) -> None:
    """A server may say that it is well and hang: only a token tells. Raises EngineError."""
    try:
        async with asyncio.timeout(PROBE_S):
            if not await backend.healthy():
                raise EngineError("it is not healthy")
            if not await backend.asleep():
                await backend.probe()
    except TimeoutError:
        raise EngineError(f"it gives no token within {PROBE_S:.0f} s") from None


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def _exit(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
