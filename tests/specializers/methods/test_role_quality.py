"""A role with tools is measured on its calls and on its answers."""

from __future__ import annotations

import pytest

from examples.calculator_team import Answer, solver, team_rows
from metier.agents import Ask, ScriptedBackend
from metier.specializers.methods.role_quality import measure_role

pytestmark = pytest.mark.anyio


async def test_calls_and_answers_are_asked_for_as_they_were_and_scored() -> None:
    rows = [row for row in team_rows(12, 0) if row.role == "solver"]  # a call and an answer each of four tasks
    replies = {row.messages: row.reply for row in rows}

    def right_but_for_the_last(ask: Ask) -> str:
        assert ask.answer_schema is not None and "anyOf" in ask.answer_schema
        return replies[ask.messages] if ask.messages != rows[-1].messages else Answer(value=0).model_dump_json()

    found = await measure_role(ScriptedBackend(default=right_but_for_the_last), solver, rows, None)
    assert found.scores == (1.0,) * 7 + (0.0,)
    never = await measure_role(ScriptedBackend(default=lambda ask: Answer(value=0)), solver, rows, None)
    assert never.mean == 0.0
