"""Step paths: what is written is read back, and everything else is refused."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.agents import GraphError, Role, TaskGraph
from metier.agents.graphs import step_paths
from metier.agents.graphs.step_paths import RESERVED, ROOT, PathStep, StepPath
from tests.agents.workflow import Answer, Plan

NAMES = st.text(st.characters(exclude_characters=RESERVED), min_size=1)
STEPS = st.builds(PathStep, NAMES, st.none() | st.integers(1, 10**15 - 1), st.none() | st.integers(0, 10**15 - 1))
PATHS = st.builds(StepPath, st.lists(STEPS, max_size=5).map(tuple))


@given(PATHS)
def test_what_is_written_is_read_back(path: StepPath) -> None:
    assert StepPath.parse(str(path)) == path


@given(st.text(st.sampled_from(["a", "ä", "/", "[", "]", "#", "~", "0", "1", "٣", "-", " ", "\n"])))
def test_what_is_read_is_what_would_be_written(text: str) -> None:
    try:
        path = StepPath.parse(text)
    except GraphError:
        return
    assert str(path) == text


@pytest.mark.parametrize(
    "text",
    ["/", "a//b", "a/", "a[0]", "a[02]", "a[]", "a[2", "a]", "#1", "a#", "a#01", "a#-1", "a#1[2]", "a[2]#*", "a~0"],
)
def test_what_no_path_is_written_as_is_refused(text: str) -> None:
    with pytest.raises(GraphError, match="step path"):
        StepPath.parse(text)


@pytest.mark.parametrize(
    ("text", "number", "declared", "parent", "together"),
    [
        ("a", None, "a", "", "a"),
        ("a[2]/b", 2, "a/b", "a[2]", "a[2]/b"),
        ("a[2]/b[13]/c#4", 13, "a/b/c", "a[2]/b[13]", "a[2]/b[13]/c#*"),
        ("a[1]/g/c", 1, "a/g/c", "a[1]/g", "a[1]/g/c"),
        ("m#7/a[3]/n#0/c", 3, "m/a/n/c", "m#7/a[3]/n#0", "m#*/a[3]/n#*/c"),
    ],
)
def test_what_is_asked_of_a_path(text: str, number: int | None, declared: str, parent: str, together: str) -> None:
    path = StepPath.parse(text)
    assert (path.round, path.declared, path.items_together) == (number, declared, together)
    assert str(path.parent) == parent and path.name == declared.rpartition("/")[2]
    assert str(path.without_items) == together.replace("#*", "")


def test_a_path_is_put_together_level_by_level() -> None:
    path = (ROOT / "each").at_item(0) / "attempt"
    assert str(path.in_round(2) / "critic") == "each#0/attempt[2]/critic"
    assert [(str(around), str(step)) for around, step in (path / "x").levels()] == [
        ("", "each#0"),
        ("each#0", "attempt"),
        ("each#0/attempt", "x"),
    ]


@pytest.mark.parametrize("sign", RESERVED)
def test_no_step_has_a_name_that_a_path_could_not_tell(sign: str) -> None:
    role = Role("solver", takes=Plan, gives=Answer, instructions="Solve.")
    with pytest.raises(GraphError, match="step name"):
        TaskGraph("g", takes=Plan, gives=Answer).step(role, name=f"a{sign}b")


def test_the_example() -> None:
    assert doctest.testmod(step_paths).failed == 0
