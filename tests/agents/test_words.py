"""The public words: errors survive pickling, the fake behaves, traffic and task sets are checked."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from metier import agents
from metier.agents import (
    Ask,
    AskRejectedError,
    MetierError,
    RunInterrupted,
    ScriptedBackend,
    Task,
    TaskSet,
    TaskSetError,
    TrafficRow,
    read_traffic,
    write_traffic,
)
from tests.agents.workflow import Answer, Puzzle

pytestmark = pytest.mark.anyio
ERRORS = [n for n in agents.errors.__all__ if n not in ("MetierError", "first_error")]


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_keeps_its_words_when_pickled(name: str) -> None:
    error = getattr(agents.errors, name)("value 3", expected="4", remedy="Write 4.")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, MetierError) and type(again) is type(error)
    assert str(again) == str(error) == "value 3; expected 4. Write 4."


def test_every_error_is_drawn_in_the_tree() -> None:
    assert all(name in (agents.errors.__doc__ or "") for name in ERRORS)


def test_interrupt_carries_its_questions() -> None:
    assert RunInterrupted("waits", questions={"a": "b?"}).questions == {"a": "b?"}


def _ask(role: str = "solver") -> Ask:
    return Ask(run_id="r", step_path="solver", role=role, messages=())


async def test_scripts_answer_in_order_and_run_out() -> None:
    backend = ScriptedBackend({"solver": ["one", Answer(value=2), {"value": 3}]})
    texts = [(await backend.reply(_ask())).text for _ in range(3)]
    assert texts == ["one", '{"value":2}', '{"value":3}']
    with pytest.raises(AskRejectedError, match="has run out"):
        await backend.reply(_ask())
    with pytest.raises(AskRejectedError, match="no script for role 'critic'; expected one of \\['solver'\\]"):
        await backend.reply(_ask("critic"))
    assert len(backend.asks) == 5


async def test_streamed_pieces_join_to_the_text() -> None:
    pieces: list[str] = []
    text = "  two words\nand a line "
    await ScriptedBackend(default=lambda ask: text).reply(_ask(), on_text=pieces.append)
    assert "".join(pieces) == text


def test_traffic_goes_round(tmp_path: Path) -> None:
    rows = [TrafficRow(role="solver", messages=(), reply=str(i), score=1.0) for i in range(3)]
    assert write_traffic(tmp_path / "t.jsonl", rows) == 3
    assert list(read_traffic(tmp_path / "t.jsonl")) == rows
    assert not (tmp_path / "t.jsonl.part").exists()


def test_traffic_names_the_broken_line(tmp_path: Path) -> None:
    write_traffic(tmp_path / "t.jsonl", [TrafficRow(role="solver", messages=(), reply="1")])
    with (tmp_path / "t.jsonl").open("a") as file:
        file.write('{"role": "solver"}\n')
    with pytest.raises(TaskSetError, match="line 2"):
        list(read_traffic(tmp_path / "t.jsonl"))


@pytest.mark.parametrize("score", [float("nan"), 2.0, "high"])
def test_scores_outside_their_range_are_refused(score: object) -> None:
    tasks = TaskSet("t", "test", (Task("0", Puzzle(text="x")),), lambda task, output: score)  # type: ignore[arg-type, return-value]
    with pytest.raises(TaskSetError, match="from 0 to 1"):
        tasks.score(tasks.tasks[0], Answer(value=1))


def test_failed_runs_score_nothing_and_ids_are_unique() -> None:
    task = Task("0", Puzzle(text="x"))
    assert TaskSet("t", "test", (task,), lambda task, output: 1.0).score(task, None) == 0.0
    with pytest.raises(TaskSetError, match="two tasks of one id"):
        TaskSet("t", "test", (task, task), lambda task, output: 1.0)
