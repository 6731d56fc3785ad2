"""How an instance is cleared: what is kept of a request that is evicted."""

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlm_sim.core.actions import Evict
from qlm_sim.core.events import FirstToken, RequestArrived
from qlm_sim.core.lso import keeps_kv
from qlm_sim.policies import SchedulerSettings, make_core


def with_moves(spec, kv_restore_token_s):
    """The instance with another price of moving KV."""
    models = {
        name: replace(profile, kv_restore_token_s=kv_restore_token_s) for name, profile in spec.models.items()
    }
    return replace(spec, models=models)


def test_kv_is_kept_where_that_is_cheaper_for_the_requests_own_context(make_instance, make_request):
    """A prefill costs 10 ms and 0.1 ms a token here, moving 0.2 ms there and back: even at 100 tokens."""
    spec = with_moves(make_instance(models=("a", "b")), kv_restore_token_s=1e-4)
    core = make_core("qlm", [spec], SchedulerSettings())
    core.handle(0.0, [RequestArrived(make_request("short", prompt=50, slo_s=3600, slo_class="batch"))])
    core.handle(0.0, [RequestArrived(make_request("long", prompt=800, slo_s=3600, slo_class="batch"))])
    core.handle(0.5, [FirstToken("short", 1, "i0"), FirstToken("long", 1, "i0")])
    orders = core.handle(9.0, [RequestArrived(make_request("other", model="b", slo_s=1.0, at=9.0))])
    kept = {order.request_id: order.keep_kv for order in orders if isinstance(order, Evict)}
    assert kept == {"short": True, "long": False}


@given(tokens=st.integers(1, 8000), move_s=st.floats(1e-7, 1e-3), factor=st.floats(1.0, 10.0))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_dearer_way_to_the_host_never_keeps_more(make_instance, tokens, move_s, factor):
    near, far = (with_moves(make_instance(), each).models["a"] for each in (move_s, factor * move_s))
    assert keeps_kv(near, tokens) or not keeps_kv(far, tokens)
