"""Packed ids are the ids, wherever a block ends and whatever characters they have."""

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_sim.core import ids as module
from qlm_sim.core.ids import Ids

PLACES = st.none() | st.integers(-30, 30)


@settings(max_examples=200)
@given(
    parts=st.lists(st.lists(st.text(max_size=3), max_size=9), max_size=4),
    part=st.builds(slice, PLACES, PLACES, st.sampled_from([None, 1, 2, -1])),
)
def test_an_id_column_reads_like_the_list_of_its_ids(parts, part):
    whole = module._BLOCK
    module._BLOCK = 4
    try:
        ids, expected = Ids(), []
        for some in parts:
            ids.extend(some)
            expected += some
        assert len(ids) == len(expected)
        assert list(ids) == expected
        assert ids[part] == expected[part]
        assert [ids[place] for place in range(-len(expected), len(expected))] == expected * 2
    finally:
        module._BLOCK = whole


def test_a_hundred_thousand_ids_take_their_characters_and_little_more():
    tracemalloc.start()
    try:
        ids = Ids(f"request-{number:08d}" for number in range(100_000))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ids[99_999] == "request-00099999"
    assert held < 100_000 * (16 + 8)
