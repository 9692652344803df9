"""The calculator team: it runs without a model, and its calculator works out sums only."""

from __future__ import annotations

import pytest

from examples import calculator_team as team
from metier.runtime import open_session

pytestmark = pytest.mark.anyio


async def test_it_solves_its_tasks_by_calling() -> None:
    async with open_session(backend=team.scripted(), store=":memory:") as session:
        results = await session.map(team.graph, team.tasks("test", 24, 0))
        assert [result.score for result in results] == [1.0] * 24
        calls = session.store.query("SELECT tool, error FROM steps WHERE tool != ''")
        assert [tuple(row) for row in calls] == [("calculator", None)] * 24


@pytest.mark.parametrize("expression", ["2**9", "__import__('os')", "1/2", "x", "1 if 2 else 3", "1+" * 60 + "1"])
def test_the_calculator_works_out_sums_only(expression: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        team.calculator(expression)
    assert team.calculator("-(3 - 10) * 2") == 14
