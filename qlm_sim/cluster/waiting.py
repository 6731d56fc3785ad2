"""The order in which requests wait inside an engine, by vLLM's ``--scheduling-policy``.

"fcfs" is a plain deque: new requests at the end, preempted ones at the head.
"""

from collections import deque
from heapq import heapify, heappop, heappush

from qlm_sim.cluster.requests import SimRequest
from qlm_sim.errors import InputError


def priority(seq: SimRequest) -> tuple[float, float]:
    """Lowest first: the deadline is the priority number that a request is sent with."""
    return seq.request.deadline, seq.request.arrived_at


class PriorityQueue:
    """The part of a deque's interface that an engine uses, in order of ``priority``, then id."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, float], str, SimRequest]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __getitem__(self, index: int) -> SimRequest:
        """Only the head, 0, is in its place."""
        return self._heap[index][2]

    def append(self, seq: SimRequest) -> None:
        heappush(self._heap, (priority(seq), seq.request.id, seq))

    appendleft = append

    def popleft(self) -> SimRequest:
        return heappop(self._heap)[2]

    def remove(self, seq: SimRequest) -> None:
        self._heap.remove((priority(seq), seq.request.id, seq))
        heapify(self._heap)


Waiting = deque[SimRequest] | PriorityQueue


def waiting_queue(scheduling_policy: str) -> Waiting:
    if scheduling_policy == "fcfs":
        return deque()
    if scheduling_policy == "priority":
        return PriorityQueue()
    raise InputError(f'scheduling_policy = {scheduling_policy!r}; wanted "fcfs" or "priority"')
