"""Which of the gateways of one store schedules, the one that holds the lease, and where the others reach it.

A leader that cannot renew its lease stops scheduling before another may begin; one that died is replaced when
its lease runs out.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from live.config.schema import GatewayConfig
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
        return config.advertise
    host = config.host
    if host in ("0.0.0.0", "::"):
        host = name = socket.gethostname()
        with suppress(OSError):
            address = socket.gethostbyname(name)
            host = name if address.startswith("127.") else address
    scheme = "http" if config.tls_cert is None else "https"
    return f"{scheme}://{host}:{port}"


async def keep_leading(
    store: Store,
    owner: str,
    url: str,
    lease_s: float,
    begin: Callable[[], Awaitable[None]],
    end: Callable[[], Awaitable[None]],
) -> None:
    """Become the leader when there is none, and stay it. ``begin`` and ``end``: of scheduling."""
    leading = False
    renewed = time.monotonic()
    while True:
        asked = time.monotonic()
        try:
            leads = await asyncio.wait_for(store.lead(owner, url, lease_s), lease_s / RENEWALS)
            renewed = asked if leads else renewed
        except Exception as error:
            leads = leading and time.monotonic() - renewed < lease_s * (1 - 1 / RENEWALS)
            log.warning("the store does not answer: %s", error or type(error).__name__)
        if leads and not leading:
            log.info("this gateway schedules now")
            leading = True
            await begin()
        elif leading and not leads:
            log.warning("another gateway schedules now")
            leading = False
            await end()
        await asyncio.sleep(lease_s / RENEWALS)
