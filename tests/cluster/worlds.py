"""Random worlds for property tests: engines so small that KV blocks, sequences and budget run out."""

from cluster.lab import Order, Step, instance, model, workload
from hypothesis import strategies as st

from qlm_sim.core.types import InstanceSpec
from qlm_sim.models.engine_config import EngineConfig
from qlm_sim.workload.workload import Workload

World = tuple[Workload, list[InstanceSpec], EngineConfig, list[Order]]

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
def worlds(draw: st.DrawFn, *steps: Step) -> World:
    """One instance for each of ``steps``."""
    trace = draw(rows)
    names = draw(st.lists(st.sampled_from(["m", "n"]), min_size=len(trace), max_size=len(trace)))
    slos = draw(st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=len(trace), max_size=len(trace)))
    beginnings = st.sampled_from(["", "talk", "chat", "system:20 talk", "system:20", "system:33 chat"])
    content = draw(st.lists(beginnings, min_size=len(trace), max_size=len(trace)))
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
                    intake_s=draw(st.sampled_from([0.0, 2**-7])),
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
        watermark=draw(st.sampled_from([0.0, 0.1])),
        enable_prefix_caching=draw(st.booleans()),
    )
    return workload(trace, names, slos, content), instances, config, draw(orders)
