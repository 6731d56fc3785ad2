"""Which of the gateways of one store schedules, the one that holds the lease, and where the others reach it.

A leader that cannot renew its lease stops scheduling before another may begin; one that died is replaced when
its lease runs out.
"""

import asyncio
import ipaddress
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress

from live.config.schema import GatewayConfig
from live.serving import url_of
from live.store.interface import Store

log = logging.getLogger(__name__)

RENEWALS = 3
"""Times that a lease is renewed before it would run out."""


def own_url(config: GatewayConfig, port: int) -> str:
    """Where the other gateways reach this one. May ask the name service, and block.

    One that listens on every address tells that of its host: a host's name, as that of a pod in Kubernetes,
    often means nothing elsewhere. An address that only the host itself can reach means less than the name.
    """
    if config.advertise is not None:
        return config.advertise.rstrip("/")
    host = config.host
    if host in ("0.0.0.0", "::"):
        name = socket.gethostname()
        families = [socket.AF_INET] if host == "0.0.0.0" else [socket.AF_INET, socket.AF_INET6]
        host = next(_addresses(name, families), name)
    return url_of(host, port, tls=config.tls_cert is not None)


def _addresses(name: str, families: Sequence[int]) -> Iterator[str]:
    """Those that others can reach."""
    for family in families:
        with suppress(OSError):
            for *_, address in socket.getaddrinfo(name, None, family, socket.SOCK_STREAM):
                found = ipaddress.ip_address(str(address[0]).partition("%")[0])
                if not (found.is_loopback or found.is_link_local):
                    yield str(found)


class Leadership:
    """Start ``keep`` as a task; cancel it to stop."""

    def __init__(self, store: Store, owner: str, url: str, lease_s: float) -> None:
        self.known = asyncio.Event()
        """Set once this gateway schedules, or another one."""
        self._store = store
        self._owner = owner
        self._url = url
        self._lease_s = lease_s

    async def keep(self, begin: Callable[[], Awaitable[None]], end: Callable[[], Awaitable[None]]) -> None:
        """Become the leader when there is none, and stay it. ``begin`` and ``end``: of scheduling."""
        lease_s = self._lease_s
        leading = False
        began = renewed = time.monotonic()
        while True:
            asked = time.monotonic()
            try:
                async with asyncio.timeout(lease_s / RENEWALS):
                    leads = await self._store.lead(self._owner, self._url, lease_s)
                    renewed = asked if leads else renewed
                    if not leads and not self.known.is_set():
                        # A life of this gateway that ended before this one began has lost its lease by then.
                        await self._look_at_other(lives=asked - began > lease_s)
            except Exception as error:
                leads = leading and time.monotonic() - renewed < lease_s * (1 - 1 / RENEWALS)
                log.warning("the store does not answer: %s", error or type(error).__name__)
            if leads and not leading:
                log.info("this gateway schedules now")
                leading = True
                await begin()
                self.known.set()
            elif leading and not leads:
                log.warning("another gateway schedules now")
                leading = False
                await end()
            await asyncio.sleep(lease_s / RENEWALS)

    async def _look_at_other(self, *, lives: bool) -> None:
        """``lives``: whether the leader is known to be no former life of this gateway."""
        url = await self._store.leader()
        if url is None or (url == self._url and not lives):
            return
        if url == self._url:
            log.error(
                "the gateway that schedules has this one's address, %s: nothing can be passed on to it; "
                "gateway.advertise must be another for each gateway",
                url,
            )
        self.known.set()

    async def resign(self) -> None:
        """Give the lease back, if this gateway holds it. Raises StoreError or TimeoutError."""
        async with asyncio.timeout(self._lease_s):
            await self._store.resign(self._owner)
