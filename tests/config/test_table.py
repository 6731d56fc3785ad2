"""Strict reading: what is wrong is named by its place, with what was found and what would be right."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_sim.config.table import Limit, Source, read_table, table_of
from qlm_sim.config.toml import toml_text
from qlm_sim.errors import InputError


@dataclass(frozen=True)
class Leaf:
    name: str
    wait_s: float = 1.0
    count: int | None = None
    bounds: tuple[int, int] | None = None


@dataclass(frozen=True)
class Tree:
    leaf: tuple[Leaf, ...]
    named: Mapping[str, Leaf] = field(default_factory=dict)
    on: bool = False


SOURCE = Source("file.toml", {"wait_s": Limit(above=0), "count": Limit(at_least=1, at_most=9)})


def read(text: str) -> Tree:
    return read_table(Tree, tomllib.loads(text), SOURCE)


def test_whole_numbers_are_numbers_and_absent_keys_take_defaults() -> None:
    tree = read('on = true\n[[leaf]]\nname = "a"\nwait_s = 2\n[named."x.1"]\nname = "b"\nbounds = [1, 5]')
    assert tree == Tree((Leaf("a", 2.0),), {"x.1": Leaf("b", bounds=(1, 5))}, True)
    assert isinstance(tree.leaf[0].wait_s, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file.toml: leaf: missing, expected a list"),
        (
            'leaf = []\n[named.x]\nname = "b"\nwaits = 1',
            "file.toml: named.x.waits: unknown key; did you mean 'wait_s'?",
        ),
        ("leaf = 3", "file.toml: leaf: found 3, expected a list"),
        ("leaf = [3]", "file.toml: leaf[0]: found 3, expected a table"),
        ("leaf = []\nnamed = []", "file.toml: named: found [], expected a table"),
        ("[[leaf]]\nname = 3", "file.toml: leaf[0].name: found 3, expected a text"),
        ('[[leaf]]\nname = "a"\nwait_s = 0', "leaf[0].wait_s: found 0, expected a number above 0"),
        ('[[leaf]]\nname = "a"\nwait_s = inf', "leaf[0].wait_s: found inf, expected a number above 0"),
        ('[[leaf]]\nname = "a"\nwait_s = nan', "leaf[0].wait_s: found nan, expected a number above 0"),
        ('[[leaf]]\nname = "a"\nwait_s = true', "leaf[0].wait_s: found true, expected a number"),
        ('[[leaf]]\nname = "a"\ncount = 1.5', "leaf[0].count: found 1.5, expected a whole number"),
        ('[[leaf]]\nname = "a"\ncount = 10', "expected a whole number at least 1 and at most 9"),
        ('[[leaf]]\nname = "a"\nbounds = [1]', "leaf[0].bounds: found [1], expected a list of 2"),
        ('[[leaf]]\nname = "a"\nbounds = [1, "b"]', "bounds[1]: found 'b', expected a whole number"),
        ('leaf = []\non = "yes"', "file.toml: on: found 'yes', expected true or false"),
    ],
)
def test_wrong_value_is_named_by_place_found_and_right(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_value_that_a_flag_set_is_named_by_the_flag() -> None:
    source = Source("file.toml", SOURCE.limits, {"leaf": "--leaf", "on": "--on"})
    with pytest.raises(InputError, match=r"^--on: found 1, expected true or false$"):
        read_table(Tree, {"leaf": [], "on": 1}, source)
    with pytest.raises(InputError, match=r"^--leaf: leaf\[0\].wait_s: found -1, expected a number above 0$"):
        read_table(Tree, {"leaf": [{"name": "a", "wait_s": -1}]}, source)


leaves = st.builds(
    Leaf,
    st.text(st.characters(exclude_categories=["Cs"])),
    st.floats(min_value=1e-300, allow_infinity=False),
    st.none() | st.integers(1, 9),
    st.none() | st.tuples(st.integers(-9, 9), st.integers(-9, 9)),
)


@given(
    st.builds(
        Tree,
        st.lists(leaves).map(tuple),
        st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), leaves),
        st.booleans(),
    )
)
def test_what_is_written_reads_back_equal(tree: Tree) -> None:
    assert read(toml_text(table_of(tree))) == tree
