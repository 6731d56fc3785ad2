"""The process that ``qlm-live serve`` is: an HTTP server around the gateway, drained on SIGTERM."""

import asyncio
import gc
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import uvicorn

from live.build import make_service, scheduler_settings
from live.config import LiveConfig
from live.gateway.app import Gateway
from live.gateway.logs import set_up_logs
from live.service import Service
from live.serving import HttpServer, fast_loop, url_of
from live.store import open_store
from live.store.interface import StoreError
from qlm_sim.core.actions import Action
from qlm_sim.core.events import Event
from qlm_sim.errors import InputError
from qlm_sim.event_log import EventLogWriter, LogHeader

log = logging.getLogger(__name__)

FLUSH_S = 1.0
"""Between two writes of the event log."""


def serve(config: LiveConfig, record: Path | None) -> int:
    """Run until SIGTERM or SIGINT, then drain. Raises InputError where it cannot start."""
    set_up_logs(config.gateway.log)
    with asyncio.Runner(loop_factory=fast_loop()) as runner:
        try:
            runner.run(_serve(config, record))
        except StoreError as error:
            raise InputError(str(error)) from None
    return 0


async def _serve(config: LiveConfig, record: Path | None) -> None:
    listener = _listen(config)
    recordings: list[Recording] = []

    def service() -> Service:
        made = make_service(config)
        if record is not None:
            recordings.append(_recorded(made, config, record))
        return made

    gateway = Gateway(config, await open_store(config.store.url), service, port=listener.getsockname()[1])
    settings = uvicorn.Config(
        gateway.app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=1,
        ssl_certfile=config.gateway.tls_cert,
        ssl_keyfile=config.gateway.tls_key,
    )
    if config.gateway.tls_cert is not None:
        try:
            settings.load()
        except (ssl.SSLError, OSError) as error:
            raise InputError(f"gateway.tls_cert, gateway.tls_key: {error}") from None
    server = HttpServer(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    await gateway.start()
    gc.collect()
    gc.freeze()  # what the start has made stays: later collections need not look at it
    serving = loop.create_task(server.serve([listener]))
    host, port = listener.getsockname()[:2]
    url = url_of(host, port, tls=config.gateway.tls_cert is not None)
    print(f"qlm-live: serving on {url}", file=sys.stderr, flush=True)
    flushing = loop.create_task(_flush(recordings))
    stopping = loop.create_task(stop.wait())
    failing = loop.create_task(gateway.fail())
    await asyncio.wait({serving, stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
    if failing.done():
        failing.result()
    failing.cancel()
    log.info("draining")
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, _give_up, loop)
    await gateway.close()
    server.should_exit = True
    await serving
    flushing.cancel()
    for recording in recordings:
        recording.close()


def _give_up(loop: asyncio.AbstractEventLoop) -> None:
    """A second signal: do not wait for the draining."""
    log.warning("stopped while draining")
    raise KeyboardInterrupt


def _listen(config: LiveConfig) -> socket.socket:
    """Listens before anything else is started, so that a port in use is an error at once."""
    host, port = config.gateway.host, config.gateway.port
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        raise InputError(f"gateway.host, gateway.port: {host}:{port}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


class Recording:
    """A service's event log, which is given up when it cannot be written: serving does not depend on it."""

    def __init__(self, writer: EventLogWriter) -> None:
        self._writer: EventLogWriter | None = writer

    def record(self, now: float, events: Sequence[Event], actions: Sequence[Action]) -> None:
        self._try(lambda writer: writer.record(now, events, actions))

    def flush(self) -> None:
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        self._try(lambda writer: writer.close())

    def _try(self, write: Callable[[EventLogWriter], None]) -> None:
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:
            self._writer = None
            log.error("the event log cannot be written and ends here: %s", error)


def _recorded(service: Service, config: LiveConfig, path: Path) -> Recording:
    header = LogHeader(
        policy=config.scheduler.policy,
        settings=replace(scheduler_settings(config), forecasts=True),
        instances=(),
        slo_classes=config.slo,
    )
    if path.exists():  # of the life before this one, which may have crashed
        path.replace(path.with_name(f"{path.name}.before"))
    recording = Recording(EventLogWriter(path, header))
    service.add_listener(recording.record)
    return recording


async def _flush(recordings: list[Recording]) -> None:
    while True:
        await asyncio.sleep(FLUSH_S)
        for recording in recordings:
            recording.flush()
