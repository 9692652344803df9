"""Questions over a small database: the analyst writes SQL, reads the rows that it gives, and answers with a number.

    metier make examples/recipes/ask_database.yaml
    metier run examples/ask_database.py --tasks test:24 --assignment examples/ask_database_assignment.yaml
    metier run examples/ask_database.py --tasks test:24 --engine scripted     # without a model

The database is made from a seed in a temporary folder when it is first asked, and is opened for reading only. Each
split asks of people and towns of its own, so a model that solves test tasks has not learned their numbers by heart.
`direct` is the same role without the database, to compare with: of people that it never saw it can only guess.
"""

from __future__ import annotations

import atexit
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from pydantic import BaseModel

from metier.agents import (
    Ask,
    Role,
    ScriptedBackend,
    Split,
    Task,
    TaskGraph,
    TaskSet,
    TaskSetError,
    ToolCall,
    ToolCalls,
    TrafficRow,
    taught_rows,
)


class Question(BaseModel):
    text: str


class Answer(BaseModel):
    value: int


# ---- database ---------------------------------------------------------------------------------------------

Pools = dict[Split, tuple[str, ...]]

FIRST_NAMES: Pools = {
    "train": ("Ada", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana", "Ian", "Jill", "Karl", "Lena", "Max", "Nora",
              "Otto", "Pia", "Rolf", "Sara", "Tom", "Uma"),
    "tune": ("Vera", "Will", "Yara"),
    "test": ("Alma", "Bo", "Cleo", "Dirk", "Eva", "Finn"),
}  # fmt: skip
LAST_NAMES: Pools = {
    "train": ("Adler", "Berg", "Cole", "Dunn", "Ellis", "Frost", "Gray", "Holm", "Kent", "Lund", "Marsh", "Noble",
              "Price", "Reed", "Stone", "Vale"),
    "tune": ("Wood", "Young", "Zorn"),
    "test": ("Abbott", "Blake", "Cross", "Drake", "Easton", "Fisher"),
}  # fmt: skip
TOWNS: Pools = {
    "train": ("Arden", "Bexley", "Corby", "Dover", "Epsom", "Foxton", "Goole", "Hythe", "Ilkley", "Kelso", "Leeds",
              "Malton"),
    "tune": ("Neston", "Otley", "Penrith"),
    "test": ("Ripon", "Selby", "Tring", "Usk", "Whitby"),
}  # fmt: skip
JOBS = ("baker", "cook", "driver", "farmer", "nurse", "painter", "tailor", "teacher")
PEOPLE: dict[Split, int] = {"train": 240, "tune": 9, "test": 36}
SEED = 7

MOST_SQL_CHARACTERS = 300
MOST_ROWS = 10
MOST_STEPS = 100_000
"""Instructions of SQLite's machine that a query may take."""
MOST_VALUE_BYTES = 10_000

_making = Lock()
_READS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}


def write_database(path: Path, seed: int = SEED) -> None:
    """Write people with town, job and pay, and towns with their inhabitants; each split lives in towns of its own."""
    rng = random.Random(seed)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE people (name TEXT PRIMARY KEY, town TEXT, job TEXT, pay INTEGER)")
        connection.execute("CREATE TABLE towns (town TEXT PRIMARY KEY, inhabitants INTEGER)")
        for split, number in PEOPLE.items():
            towns = [(town, rng.randint(1_000, 99_999)) for town in TOWNS[split]]
            names = [f"{first} {last}" for first in FIRST_NAMES[split] for last in LAST_NAMES[split]]
            people = [
                (name, rng.choice(TOWNS[split]), rng.choice(JOBS), rng.randint(1_000, 9_999))
                for name in sorted(rng.sample(names, number))
            ]
            connection.executemany("INSERT INTO towns VALUES (?, ?)", towns)
            connection.executemany("INSERT INTO people VALUES (?, ?, ?, ?)", people)


def database() -> Path:
    """The database of this process, made when it is first asked for."""
    with _making:  # tools run in threads
        return _made()


@cache
def _made() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="metier-ask-database-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_database(folder / "people.db")
    return folder / "people.db"


def query(sql: str) -> list[list[Any]]:
    """Runs a SELECT over people(name, town, job, pay) and towns(town, inhabitants).

    Raises: ValueError for anything but one short SELECT that ends soon and gives few rows.
    """
    if len(sql) > MOST_SQL_CHARACTERS:
        raise ValueError(f"more than {MOST_SQL_CHARACTERS} characters")
    with closing(sqlite3.connect(f"{database().as_uri()}?mode=ro", uri=True)) as connection:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_VALUE_BYTES)
        connection.set_authorizer(_may)
        connection.set_progress_handler(lambda: 1, MOST_STEPS)  # the first call of it ends the query
        try:
            rows = connection.execute(sql).fetchmany(MOST_ROWS + 1)
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise ValueError(str(error)) from error
    if len(rows) > MOST_ROWS:
        raise ValueError(f"more than {MOST_ROWS} rows")
    return [list(row) for row in rows]


def _may(action: int, *_: str | None) -> int:
    return sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY


# ---- roles ------------------------------------------------------------------------------------------------

analyst = Role(
    "analyst",
    takes=Question,
    gives=Answer,
    instructions="Answer from the database.",
    max_tokens=80,
    tools=[query],
    max_calls=3,
)
graph = TaskGraph("ask-database", takes=Question, gives=Answer)
graph.step(analyst)

guesser = Role("analyst", takes=Question, gives=Answer, instructions="Answer the question.", max_tokens=80)
direct = TaskGraph("ask-database-direct", takes=Question, gives=Answer)
direct.step(guesser)

# ---- tasks ------------------------------------------------------------------------------------------------

OF_A_PERSON = (
    ("What does {} earn?", "SELECT pay FROM people WHERE name = '{}'"),
    (
        "How many inhabitants has the town where {} lives?",
        "SELECT inhabitants FROM people JOIN towns USING (town) WHERE name = '{}'",
    ),
)
OF_A_TOWN = (
    ("How many people live in {} on our list?", "SELECT COUNT(*) FROM people WHERE town = '{}'"),
    ("What does the best paid person in {} earn?", "SELECT MAX(pay) FROM people WHERE town = '{}'"),
)
OF_A_JOB = (
    ("How many {1}s work in {0}?", "SELECT COUNT(*) FROM people WHERE town = '{0}' AND job = '{1}'"),
    ("What do all {1}s in {0} earn together?", "SELECT SUM(pay) FROM people WHERE town = '{0}' AND job = '{1}'"),
    ("What does the worst paid {1} in {0} earn?", "SELECT MIN(pay) FROM people WHERE town = '{0}' AND job = '{1}'"),
)


def tasks(split: Split, size: int, seed: int) -> TaskSet:
    """Questions of one split's people and towns, each with its query; the score is 1 for the exact number.

    Raises: TaskSetError when there are not so many.
    """
    every = _questions(split)
    if not 1 <= size <= len(every):
        raise TaskSetError(f"size={size} questions of split {split!r}", expected=f"from 1 to {len(every)}")
    chosen = random.Random(seed).sample(every, size)
    return TaskSet(
        "ask-database",
        split,
        tuple(Task(id=f"ask-database-{question}", input=Question(text=question), key=sql) for question, sql in chosen),
        _score,
    )


def _questions(split: Split) -> list[tuple[str, str]]:
    """Every question of a split with its query, in one order; those without an answer are left out."""
    with closing(sqlite3.connect(database())) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM people")}
    own = [name for first in FIRST_NAMES[split] for last in LAST_NAMES[split] if (name := f"{first} {last}") in names]
    filled = [(form, (name,)) for form in OF_A_PERSON for name in own]
    filled += [(form, (town,)) for form in OF_A_TOWN for town in TOWNS[split]]
    jobs = [(town, job) for town in TOWNS[split] for job in JOBS]
    every = [(text.format(*of), sql.format(*of)) for (text, sql), of in filled]
    every += [(text.format(*of), sql.format(*of)) for text, sql in OF_A_JOB for of in jobs]
    return [(text, sql) for text, sql in every if answer_of(sql) is not None]


def answer_of(sql: str) -> int | None:
    """The number that a query gives; None where it gives no row or no number."""
    rows = query(sql)
    return rows[0][0] if rows else None


def _score(task: Task, answer: Any) -> float:
    return float(isinstance(answer, Answer) and answer.value == answer_of(task.key))


# ---- teachers ---------------------------------------------------------------------------------------------


def analyst_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """What the analyst should say, two rows a question: the query, and the answer behind its rows."""
    return islice((row for task in tasks(split, -(-size // 2), seed) for row in _taught(task, analyst)), size)


def direct_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """What the role without the database should say, a row a question."""
    for task in tasks(split, size, seed):
        yield from _taught(task, guesser)


def _taught(task: Task, who: Role) -> list[TrafficRow]:
    calls = [[_call(task.key)]] if who.tools else []
    return taught_rows(who, {"question": task.input}, calls, Answer(value=answer_of(task.key) or 0))


def _call(sql: str) -> ToolCall:
    return ToolCall(name="query", arguments={"sql": sql})


# ---- without a model --------------------------------------------------------------------------------------


def scripted() -> ScriptedBackend:
    """An analyst that knows every question, and asks the database once."""

    @cache
    def known() -> dict[str, str]:
        splits: tuple[Split, ...] = ("train", "tune", "test")
        return {text: sql for split in splits for text, sql in _questions(split)}

    def answer(ask: Ask) -> ToolCalls | Answer:
        last = ask.messages[-1].content
        if last.startswith("Results:"):
            return Answer(value=int(last.rpartition("[[")[2].rstrip("]")))
        return ToolCalls(tool_calls=(_call(known()[ask.messages[1].content.split("\n")[1]]),))

    return ScriptedBackend({"analyst": answer}, keep_asks=False)
