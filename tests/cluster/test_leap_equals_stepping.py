"""The leap and the stepping engine tell the same story, at the same times, whatever happens."""

import pytest
from cluster.lab import Log, Script, Step, run
from cluster.worlds import World, worlds
from hypothesis import given, settings

from qlm_sim.core.events import EngineReported


def both(world: World, report_interval_s: float) -> tuple[Log, Log]:
    trace, instances, config, ordered = world
    logs = []
    for engine in ("leap", "stepping"):
        log, end = run(
            trace,
            instances,
            config,
            Script(instances, ordered),
            engine=engine,
            report_interval_s=report_interval_s,
        )
        assert end.unfinished == 0
        logs.append(log)
    return logs[0], logs[1]


@settings(max_examples=300, deadline=None)
@given(worlds(Step(), Step(), Step()) | worlds(Step()))
def test_same_events_and_orders_at_exactly_the_same_times(
    world: World,
) -> None:
    """All costs are sums of powers of two: no rounding, so every tie is a tie in both."""
    leap, stepping = both(world, report_interval_s=0.125)
    assert leap.settles == stepping.settles


@settings(max_examples=100, deadline=None)
@given(
    # Two unlike engines: rounding would break a tie between alike ones in one mode and not in the other.
    worlds(
        Step(base=0.0123, token=0.00037, seq_s=0.00011, kv_token_s=1.7e-5, prefill_pair_s=3.1e-6),
        Step(base=0.0171, token=0.00023, seq_s=0.00019, kv_token_s=1.3e-5, prefill_pair_s=2.3e-6),
    )
)
def test_same_story_up_to_rounding(
    world: World,
) -> None:
    leap, stepping = both(world, report_interval_s=0.1234567)
    assert len(leap.settles) == len(stepping.settles)
    for (now, events, actions), (then, expected_events, expected_actions) in zip(
        leap.settles, stepping.settles, strict=True
    ):
        assert now == pytest.approx(then, rel=1e-9)
        assert actions == expected_actions
        assert len(events) == len(expected_events)
        for event, expected in zip(events, expected_events, strict=True):
            if type(event) is EngineReported and type(expected) is EngineReported:
                assert event.busy_s == pytest.approx(expected.busy_s, rel=1e-9)
                assert (event.kv_tokens, event.running) == (expected.kv_tokens, expected.running)
            else:
                assert event == expected
