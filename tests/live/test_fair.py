"""Fair shares, without a clock: one server that takes the oldest of what was let in, whoever sent it."""

import math
from collections import deque
from collections.abc import Hashable

from hypothesis import given
from hypothesis import strategies as st

from live.gateway.fair import FairWindows


class Server:
    """Takes one request at a time, in the order in which they were let in."""

    def __init__(self, windows: FairWindows) -> None:
        self.windows = windows
        self.line: deque[Hashable] = deque()
        self.served: list[Hashable] = []

    def arrive(self, key: Hashable, tenant: str, slo_class: str = "c") -> None:
        self.line.extend(self.windows.offer(key, tenant, slo_class))

    def serve(self) -> Hashable | None:
        if not self.line:
            return None
        key = self.line.popleft()
        self.line.extend(self.windows.pulled(key))
        self.line.extend(self.windows.over(key))
        self.served.append(key)
        return key


def test_a_flood_delays_another_tenant_by_one_window_at_most() -> None:
    server = Server(FairWindows(8, {}))
    for number in range(5_000):
        server.arrive(("a", number), "a")
    server.arrive("b", "b")
    before_b = 0
    while server.serve() != "b":
        before_b += 1
    assert before_b <= 8


def test_without_shares_the_flood_goes_first() -> None:
    """The same without a window: what the law above protects from."""
    server = Server(FairWindows(math.inf, {}))
    for number in range(5_000):
        server.arrive(("a", number), "a")
    server.arrive("b", "b")
    before_b = 0
    while server.serve() != "b":
        before_b += 1
    assert before_b == 5_000


def test_tenants_that_always_have_more_are_served_by_weight() -> None:
    server = Server(FairWindows(12, {"a": 1.0, "b": 2.0}))
    for number in range(3_000):
        server.arrive(("a", number), "a")
        server.arrive(("b", number), "b")
    for _ in range(1_500):
        server.serve()
    of_b = sum(1 for tenant, _ in server.served if tenant == "b")  # type: ignore[misc]
    assert abs(of_b / 1_500 - 2 / 3) < 0.02


def test_one_tenant_alone_has_all_places() -> None:
    windows = FairWindows(8, {"a": 1.0, "b": 7.0})
    admitted = [key for number in range(20) for key in windows.offer(number, "a", "c")]
    assert admitted == list(range(8))
    assert windows.ahead(10) == 2
    assert windows.ahead(3) is None


def test_classes_do_not_take_each_others_places() -> None:
    windows = FairWindows(2, {})
    for number in range(10):
        windows.offer(("batch", number), "a", "batch")
    assert windows.offer("now", "a", "interactive") == ["now"]


def test_a_tenant_that_left_gives_its_places_back() -> None:
    windows = FairWindows(8, {})
    windows.offer("b", "b", "c")
    admitted = [key for number in range(20) for key in windows.offer(number, "a", "c")]
    assert len(admitted) == 4
    assert windows.over("b") == [4, 5, 6, 7]


@given(
    st.lists(
        st.tuples(st.sampled_from(["offer", "pulled", "over"]), st.sampled_from("abc"), st.integers(0, 30)),
        max_size=200,
    ),
    st.integers(1, 6),
)
def test_nothing_is_lost_or_let_in_twice(steps: list[tuple[str, str, int]], window: int) -> None:
    windows = FairWindows(window, {"a": 0.5, "b": 3.0})
    there: dict[Hashable, str] = {}
    let_in: set[Hashable] = set()
    for step, tenant, number in steps:
        key = (tenant, number)
        if step == "offer" and key not in there:
            there[key] = tenant
            new = windows.offer(key, tenant, "c")
        elif step == "over" and key in there:
            del there[key]
            let_in.discard(key)
            new = windows.over(key)
        elif step == "pulled":
            new = windows.pulled(key)
        else:
            continue
        assert not let_in.intersection(new)
        let_in.update(new)
        assert let_in <= set(there)
        assert windows.held == len(there) - len(let_in)
    for key in list(there):
        let_in.update(windows.over(key))
    assert windows.held == 0
