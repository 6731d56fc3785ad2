"""What holds of every event log, whatever the world and the orders."""

from contract.scenarios import Run, Scenario

from qlm_sim.core.actions import Pull, SwapModel
from qlm_sim.core.events import (
    EngineReported,
    FirstToken,
    InstanceDown,
    InstanceUp,
    ModelSwapped,
    Progress,
    RequestEvicted,
    RequestFailed,
    RequestFinished,
)

ENDS = (RequestFinished, RequestEvicted, RequestFailed)


def check_laws(run: Run) -> None:
    times = [now for now, _, _ in run.settles]
    assert times == sorted(times)
    _check_attempts(run)
    _check_swaps(run)
    for report in run.events(EngineReported):
        assert 0 <= report.kv_utilization <= 1
        assert min(report.running, report.waiting, report.kv_tokens, report.busy_s, report.preemptions) >= 0


def _check_attempts(run: Run) -> None:
    """Each attempt is pulled, begins at most once and ends at most once, in this order; tokens only grow,
    but for those that an eviction cuts off. (Of one instant, the core hears ends before beginnings.)"""
    under_way: dict[str, tuple[int, str]] = {}
    begun: set[tuple[str, int]] = set()
    tokens: dict[str, int] = {}
    finished: set[str] = set()
    for _, events, actions in run.settles:
        for event in sorted(events, key=lambda event: not isinstance(event, FirstToken)):
            if isinstance(event, InstanceDown):
                under_way = {r: where for r, where in under_way.items() if where[1] != event.instance}
            if not isinstance(event, (*ENDS, FirstToken, Progress)):
                continue
            request_id = event.request_id
            assert under_way.get(request_id) == (event.attempt, event.instance), event
            if isinstance(event, FirstToken):
                assert (request_id, event.attempt) not in begun, event
                begun.add((request_id, event.attempt))
            elif isinstance(event, Progress):
                tokens[request_id] = event.output_tokens
            else:
                del under_way[request_id]
            if isinstance(event, RequestEvicted):
                assert event.output_tokens >= 0
                tokens[request_id] = event.output_tokens
            elif isinstance(event, RequestFinished):
                assert request_id not in finished, event
                assert (request_id, event.attempt) in begun, event
                assert event.output_tokens >= tokens.get(request_id, 0), event
                finished.add(request_id)
        for action in actions:
            if isinstance(action, Pull):
                assert action.request_id not in under_way, action
                under_way[action.request_id] = (action.attempt, action.instance)


def _check_swaps(run: Run) -> None:
    """Between the order and the answer of a swap nothing begins there."""
    swapping: dict[str, tuple[str, float]] = {}
    for now, events, actions in run.settles:
        for event in events:
            if isinstance(event, ModelSwapped):
                model, ordered_at = swapping.pop(event.instance)
                assert event.model == model
                assert 0 < event.swap_s <= now - ordered_at + 1e-6
            elif isinstance(event, FirstToken):
                assert event.instance not in swapping, event
        for action in actions:
            if isinstance(action, SwapModel):
                swapping[action.instance] = (action.model, now)
    assert not swapping


def check_outcome(scenario: Scenario, run: Run) -> None:
    finished = {event.request_id: event for event in run.events(RequestFinished)}
    assert finished.keys() == scenario.finishing
    wanted = {ask.id: ask.output_tokens for ask in scenario.asks}
    assert {name: event.output_tokens for name, event in finished.items()} == {
        name: wanted[name] for name in scenario.finishing
    }
    assert {event.request_id for event in run.events(RequestEvicted)} == scenario.evicted
    assert {event.request_id for event in run.events(RequestFailed)} == scenario.failed
    models = {ask.id: ask.model for ask in scenario.asks}
    serving: dict[str, str] = {}
    for _, events, _ in run.settles:
        for event in events:
            if isinstance(event, InstanceUp) and event.spec.resident is not None:
                serving[event.spec.id] = event.spec.resident
            elif isinstance(event, ModelSwapped):
                serving[event.instance] = event.model
            elif isinstance(event, FirstToken) and event.instance in serving:
                assert models[event.request_id] == serving[event.instance]
    for name, text in run.texts.items():
        if name in scenario.finishing:
            assert text == run.expected[name], name
