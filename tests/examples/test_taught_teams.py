"""Teams that are trained to use a tool: what teaches them is what a served run asks, and solves its tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from examples import ask_database, calculator_team
from metier.agents import Ask, ScriptedBackend, TaskGraph, TrafficRow
from metier.runtime import open_session

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Taught:
    team: Any
    graph: TaskGraph
    rows: Callable[[int, int], Iterator[TrafficRow]]
    tasks_of: Callable[[int], int]
    """How many tasks so many rows are about."""


TAUGHT = {
    "calculator": Taught(calculator_team, calculator_team.graph, calculator_team.team_rows, lambda rows: rows // 3),
    "calculator-direct": Taught(
        calculator_team, calculator_team.direct, calculator_team.direct_rows, lambda rows: rows // 3 * 2
    ),
    "database": Taught(ask_database, ask_database.graph, ask_database.analyst_rows, lambda rows: rows // 2),
    "database-direct": Taught(ask_database, ask_database.direct, ask_database.direct_rows, lambda rows: rows),
}
ROWS = 48


@pytest.mark.parametrize("name", TAUGHT)
async def test_a_model_that_says_what_the_rows_say_solves_their_tasks_and_is_asked_nothing_else(name: str) -> None:
    taught = TAUGHT[name]
    rows = list(taught.rows(ROWS, 3))
    assert len(rows) == ROWS
    known = {row.messages: row for row in rows}
    reader = calculator_team.scripted()

    async def say(ask: Ask) -> str:
        if ask.messages not in known and name == "calculator-direct":  # every second task has no row of the reader's
            return (await reader.reply(ask)).text
        return known[ask.messages].reply

    roles = {row.role for row in rows}
    async with open_session(backend=ScriptedBackend(dict.fromkeys(roles, say)), store=":memory:") as session:
        results = await session.map(taught.graph, taught.team.tasks("train", taught.tasks_of(ROWS), 3))
        assert [result.score for result in results] == [1.0] * taught.tasks_of(ROWS)
        served = {row.messages: row for row in session.store.traffic()}
    for messages, row in known.items():
        assert served[messages].reply == row.reply
        assert served[messages].prompt_layout == row.prompt_layout
        assert served[messages].role == row.role
        assert row.score == 1.0


@pytest.mark.parametrize("team", [calculator_team, ask_database])
async def test_no_task_is_in_two_splits(team: Any) -> None:
    sizes = {"train": 500, "tune": 50, "test": 150}
    asked = {split: {task.input.text for task in team.tasks(split, size, 1)} for split, size in sizes.items()}
    assert {split: len(texts) for split, texts in asked.items()} == sizes
    assert (
        not asked["train"] & asked["tune"] and not asked["tune"] & asked["test"] and not asked["train"] & asked["test"]
    )


def test_the_team_without_the_calculator_learns_as_many_rows_of_each_role() -> None:
    with_it, without = (sorted(row.role for row in rows(ROWS, 3)) for rows in
                        (calculator_team.team_rows, calculator_team.direct_rows))  # fmt: skip
    assert with_it == without
