"""The role that asks a database: it runs without a model, and its tool reads and does nothing else."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from examples import ask_database as team
from metier.agents import TaskSetError
from metier.runtime import open_session


@pytest.mark.anyio
async def test_it_solves_its_tasks_by_asking_the_database() -> None:
    async with open_session(backend=team.scripted(), store=":memory:") as session:
        results = await session.map(team.graph, team.tasks("test", 24, 0))
        assert [result.score for result in results] == [1.0] * 24
        calls = session.store.query("SELECT tool, error FROM steps WHERE tool != ''")
        assert [tuple(row) for row in calls] == [("query", None)] * 24


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("DELETE FROM people", "not authorized"),
        ("INSERT INTO towns VALUES ('X', 1)", "not authorized"),
        ("CREATE TABLE more (x)", "not authorized"),
        ("CREATE TEMP TABLE more (x)", "not authorized"),
        ("DROP TABLE people", "not authorized"),
        ("ATTACH DATABASE 'other.db' AS other", "not authorized"),
        ("VACUUM INTO 'copy.db'", "authorization denied"),
        ("PRAGMA writable_schema = 1", "not authorized"),
        ("SELECT load_extension('x')", "not authorized"),
        ("SELECT 1; DROP TABLE people", "one statement"),
        ("SELECT name FROM nobody", "no such table"),
        ("WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT MAX(x) FROM n", "not authorized"),
        ("SELECT COUNT(*) FROM people a, people b, people c, people d", "interrupted"),
        ("SELECT LENGTH(zeroblob(1000000))", "too big"),
        ("SELECT name FROM people", "more than 10 rows"),
        ("SELECT '" + "x" * 300 + "'", "more than 300 characters"),
    ],
)
def test_the_tool_refuses_all_but_short_reading(
    sql: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = team.database().read_bytes()
    with pytest.raises(ValueError, match=problem):
        team.query(sql)
    assert team.database().read_bytes() == before
    assert not list(tmp_path.iterdir())
    assert team.query("SELECT COUNT(*) FROM towns") == [[20]]


def test_a_seed_makes_one_database_and_each_split_has_people_and_towns_of_its_own(tmp_path: Path) -> None:
    written = []
    for name, seed in (("one.db", team.SEED), ("again.db", team.SEED), ("other.db", team.SEED + 1)):
        team.write_database(tmp_path / name, seed)
        with closing(sqlite3.connect(tmp_path / name)) as connection:
            written.append(connection.execute("SELECT * FROM people ORDER BY name").fetchall())
    assert written[0] == written[1] != written[2]
    for of in (team.FIRST_NAMES, team.LAST_NAMES, team.TOWNS):
        every = [word for words in of.values() for word in words]
        assert len(set(every)) == len(every)


@pytest.mark.parametrize("size", [0, 10_000])
def test_more_questions_than_there_are_is_an_error(size: int) -> None:
    with pytest.raises(TaskSetError, match=f"size={size}"):
        team.tasks("test", size, 0)
