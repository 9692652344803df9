"""What the roles were trained on is what a run asks, message for message."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from metier.agents import Ask, ScriptedBackend, render_prompt
from metier.runtime import open_session

pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.anyio
EXAMPLES = Path(__file__).parents[2] / "examples"


async def test_serving_asks_what_training_showed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("puzzles", "solve_and_check"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import puzzles
    import solve_and_check

    task = puzzles.puzzle_tasks("test", 1).tasks[0]
    terms = puzzles.right_terms(task.key)
    plan = puzzles.Plan(expression=puzzles.write_terms(terms))
    answer = puzzles.work_out(terms)
    verdicts = [puzzles.Verdict(why=f"{plan.expression}={answer.steps}", correct=correct) for correct in (False, True)]

    def reply(ask: Ask) -> object:
        return {"planner": plan, "solver": answer, "critic": verdicts[ask.round - 1]}[ask.role]

    backend = ScriptedBackend(default=reply)
    async with open_session(backend=backend, store=tmp_path / "runs.sqlite") as session:
        await session.run(solve_and_check.graph, task.input)
    expected = [
        render_prompt(puzzles.planner, {"puzzle": task.input, "verdict": None}),
        render_prompt(puzzles.solver, {"plan": plan}),
        render_prompt(puzzles.critic, {"puzzle": task.input, "answer": answer}),
        render_prompt(puzzles.planner, {"puzzle": task.input, "verdict": verdicts[0]}),
        render_prompt(puzzles.solver, {"plan": plan}),
        render_prompt(puzzles.critic, {"puzzle": task.input, "answer": answer}),
    ]
    assert [ask.messages for ask in backend.asks] == expected
