"""The service's time, and when its events are settled.

Times are seconds since the service's start on a clock that never jumps. The wall time of the start is
kept, so that deadlines of durable work can be told across restarts.
"""

import asyncio
import math
import time
from collections.abc import Callable

from qlm_sim.core.events import Event, TimerFired
from qlm_sim.runtime import Runtime

LEAST_TIMER_S = 0.005
"""Least seconds between two timers: a core that wants one at once, again and again, must not spin."""


class WallClock:
    def __init__(self) -> None:
        self._start = time.monotonic()
        self.started_at = time.time()
        """Wall time of the start, in seconds since the epoch."""

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def wall_time(self, at: float) -> float:
        """Seconds since the epoch at ``at`` seconds since the start."""
        return self.started_at + at

    def since_start(self, wall_time: float) -> float:
        return wall_time - self.started_at


class Settler:
    """Gathers events, and settles once behind the callbacks that are ready already.

    ``crashed`` is told the error if the core breaks; nothing is settled after that.
    """

    def __init__(
        self,
        runtime: Runtime,
        clock: WallClock,
        crashed: Callable[[Exception], None],
    ) -> None:
        self._runtime = runtime
        self._clock = clock
        self._crashed = crashed
        self._inbox = runtime.inbox
        self._loop = asyncio.get_running_loop()
        self._due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._fired_at = -math.inf
        self.stopped = False

    def post(self, event: Event) -> None:
        """Let the core hear of ``event`` at the end of this instant."""
        self._inbox.append(event)
        if not self._due:
            self.settle_soon()

    def settle_soon(self) -> None:
        if not self._due:
            self._due = True
            self._loop.call_soon(self._settle_due)

    def settle_now(self) -> None:
        """Decide at once upon what was posted: what is posted next belongs to another instant."""
        if self.stopped:
            return
        try:
            self._runtime.settle(self._clock.now())
        except Exception as error:
            self.stop()
            self._crashed(error)
            raise
        self._set_timer()

    def stop(self) -> None:
        self.stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _settle_due(self) -> None:
        self._due = False
        self.settle_now()

    def _set_timer(self) -> None:
        wake_at = self._runtime.wake_at
        if wake_at == self._timer_at and self._timer is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = wake_at
        if wake_at != math.inf and not self.stopped:
            wait_s = max(wake_at, self._fired_at + LEAST_TIMER_S) - self._clock.now()
            self._timer = self._loop.call_later(max(0.0, wait_s), self._rang)

    def _rang(self) -> None:
        self._timer = None
        now = self._clock.now()
        if self._runtime.core.wake_at <= now:
            self._fired_at = now
            self._inbox.append(TimerFired())
        self.settle_soon()
