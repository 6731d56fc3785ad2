"""The engines' side of the port: hands the core's orders to the instances that carry them out."""

from collections.abc import Callable, Iterable

from live.engines.attempt import LiveRequest
from live.engines.instance import Instance
from live.jobs import Rejected
from qlm_sim.core.actions import Evict, Pull, Reject, SwapModel
from qlm_sim.core.events import Event


class LiveEngines:
    """All instances, and every request that is in the service."""

    def __init__(self) -> None:
        self.instances: dict[str, Instance] = {}
        self.requests: dict[str, LiveRequest] = {}

    def connect(
        self,
        instances: Iterable[Instance],
        post: Callable[[Event], None],
        settle_now: Callable[[], None],
        now: Callable[[], float],
    ) -> None:
        for instance in instances:
            assert instance.id not in self.instances, f"two instances are named {instance.id}"
            instance.connect(self.requests, post, settle_now, now)
            self.instances[instance.id] = instance

    def execute(self, action: Pull | Evict | SwapModel | Reject) -> None:
        if isinstance(action, SwapModel):
            self.instances[action.instance].swap(action.model)
            return
        if isinstance(action, Reject):
            rejected = self.requests.pop(action.request_id)
            rejected.ticket.end(Rejected(action.estimated_wait_s))
            return
        live = self.requests.get(action.request_id)
        if live is None:
            return  # it ended in this instant; the core hears of it next
        instance = self.instances[action.instance]
        if isinstance(action, Pull):
            instance.pull(live, action.attempt)
        else:
            instance.evict(live, action.attempt)
