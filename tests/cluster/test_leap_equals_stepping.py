"""The leap and the stepping engine tell the same story, at the same times, whatever happens."""

import pytest
from cluster.lab import Log, Order, Script, Step, instance, model, run, workload
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_sim.core.events import EngineReported
from qlm_sim.core.types import InstanceSpec
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.workload.workload import Workload

moments = st.integers(0, 4096).map(lambda n: n / 1024)
"""Times on a grid on which sums are exact, so that ties are real."""

rows = st.lists(st.tuples(moments, st.integers(1, 90), st.integers(1, 120)), min_size=1, max_size=14).map(
    lambda rows: sorted(rows)
)

orders = st.lists(
    st.builds(
        Order,
        at=moments,
        kind=st.sampled_from(["evict", "keep", "pull", "swap"]),
        which=st.integers(0, 9),
        where=st.integers(0, 9),
    ),
    max_size=14,
)


@st.composite
def worlds(draw: st.DrawFn, *steps: Step) -> tuple[Workload, list[InstanceSpec], EngineConfig, list[Order]]:
    """Engines so small that KV blocks, sequences and budget all run out now and then."""
    trace = draw(rows)
    names = draw(st.lists(st.sampled_from(["m", "n"]), min_size=len(trace), max_size=len(trace)))
    slos = draw(st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=len(trace), max_size=len(trace)))
    block_size = draw(st.sampled_from([1, 4, 16]))
    instances = [
        instance(
            f"i{i}",
            {
                name: model(
                    step,
                    kv_capacity_tokens=draw(st.integers(100, 400)),
                    max_num_seqs=draw(st.integers(1, 8)),
                    max_num_batched_tokens=draw(st.integers(8, 64)),
                    kv_restore_token_s=draw(st.sampled_from([0.0, 2**-12])),
                    swap_in_s=0.25,
                    load_s=1.0,
                )
                for name in ("m", "n")
            },
            resident="mn"[i % 2],
            host_bytes=draw(st.sampled_from([0, 1100, 5000])),
        )
        for i, step in enumerate(steps)
    ]
    config = EngineConfig(
        block_size=block_size,
        scheduling_policy=draw(st.sampled_from(["fcfs", "priority"])),
        scheduler_reserve_full_isl=draw(st.booleans()),
    )
    return workload(trace, names, slos), instances, config, draw(orders)


def both(
    world: tuple[Workload, list[InstanceSpec], EngineConfig, list[Order]], report_interval_s: float
) -> tuple[Log, Log]:
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
    world: tuple[Workload, list[InstanceSpec], EngineConfig, list[Order]],
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
    world: tuple[Workload, list[InstanceSpec], EngineConfig, list[Order]],
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
