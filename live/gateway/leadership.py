"""Which of the gateways of one store schedules: the one that holds the lease.

A leader that cannot renew its lease stops scheduling before another may begin; one that died is replaced when
its lease runs out.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from live.store.interface import Store

log = logging.getLogger(__name__)

RENEWALS = 3
"""Times that a lease is renewed before it would run out."""


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
