"""SimPy's environment, run by instants: all events of one time, then one decision, then the next time.

Knows nothing of requests or engines.
"""

from collections.abc import Callable
from heapq import heappop, heappush

import simpy
from simpy.events import NORMAL, EventPriority

LATE = EventPriority(NORMAL + 1)
"""The SimPy priority of what comes behind the other events of its time."""


class Clock(simpy.Environment):
    """An environment that says when an instant is over, so that ties are decided upon together."""

    def run_instants(self, end_of_instant: Callable[[float], bool], until_s: float) -> None:
        """Process events up to ``until_s`` inclusive, or until none is left.

        ``end_of_instant(now)`` is called behind the last event of each time and may schedule more, at
        the same time too. It returns whether to go on.
        """
        queue = self._queue
        while queue:
            at, _, number, event = heappop(queue)
            if at > until_s:
                self._now = until_s
                return
            if type(event) is Alarm:
                if number == event.number:
                    self._now = at
                    ring = event.ring
                    ring(at)
                elif at > self._now:
                    continue
            else:
                self._now = at
                callbacks, event.callbacks = event.callbacks, None  # type: ignore[assignment]
                for callback in callbacks:
                    callback(event)
                if not event.ok and not event.defused:
                    raise RuntimeError(f"a SimPy event failed: {event!r}") from event.value
            if not (queue and queue[0][0] <= at) and not end_of_instant(at):
                return


class Alarm(simpy.Event):
    """An event that recurs: ``ring(now)`` is called at the time last set.

    SimPy cannot cancel: a setting that was overtaken stays in the queue and is skipped by its number.
    It saves a new event per iteration. Only ``Clock.run_instants`` understands it.
    """

    def __init__(self, clock: Clock, ring: Callable[[float], None], priority: EventPriority = NORMAL) -> None:
        super().__init__(clock)
        self.ring = ring
        self.number = -1
        """Of the setting that counts or counted last; -1 when there is none."""
        self._priority = priority
        self._queue = clock._queue
        self._numbers = clock._eid

    def set(self, at: float) -> None:
        """Ring at that time (seconds), and no more at the one set before."""
        number = self.number = next(self._numbers)
        heappush(self._queue, (at, self._priority, number, self))

    def clear(self) -> None:
        self.number = -1
