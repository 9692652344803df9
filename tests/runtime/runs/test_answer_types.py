"""Every type of the zoo asked of a backend and of a real engine: what is answered is recorded, resumed, reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from metier.agents import AnswerError, Ask, Role, ScriptedBackend, StepError, TaskGraph
from metier.agents.answers.answer_schema import described_schema
from metier.agents.answers.sample_answer import sample_answer
from metier.agents.recorded_values import load
from metier.runtime import Session, open_session
from metier.runtime.settings.session import Settings
from tests.agents.answer_zoo import WEAK, YES
from tests.runtime.conftest import TINY
from tests.tiny_model import write_tiny_llama

pytestmark = pytest.mark.anyio


class Question(BaseModel):
    text: str


class Kept(BaseModel):
    value: str


class Later:
    """A step after the role's: it fails until it is told otherwise, so that its run has to be resumed."""

    def __init__(self) -> None:
        self.fails = True

    def step(self, gives: Any) -> Callable[..., Kept]:
        def keep(value: Any) -> Kept:
            if self.fails:
                raise ValueError("not yet")
            return Kept(value=repr(value))

        keep.__annotations__ = {"value": gives, "return": Kept}
        return keep


def asking_for(name: str, gives: Any, later: Later) -> TaskGraph:
    """A graph that asks for a type, and then has a step that takes the answer."""
    graph = TaskGraph(name, takes=Question, gives=Kept)
    # Sampled: a random model repeats itself for ever when it is greedy.
    role = Role(name, takes=Question, gives=gives, max_tokens=300, temperature=1.0)
    answer = graph.step(role)
    graph.step(later.step(gives), name="keep", inputs={"value": answer}, retries=0)
    return graph


async def ask_and_resume(session: Session) -> dict[str, BaseException]:
    """Ask for every type, then resume every run whose answer is recorded; returns the errors of the other runs."""
    later = Later()
    graphs = {name: asking_for(name, gives, later) for name, gives in YES.items()}
    store, errors, runs = session.store, {}, {}

    async def run(name: str) -> None:
        (result,) = await session.map(graphs[name], [Question(text="?")], seed=len(name))
        runs[name] = result.run_id
        if result.error is None:
            assert result.output is None  # a null answer is no answer to later steps
        else:
            errors[name] = result.error

    async with anyio.create_task_group() as tasks:
        for name in graphs:
            tasks.start_soon(run, name)
    answered = [name for name, error in errors.items() if isinstance(error, StepError)]
    assert len(answered) > 0.6 * len(YES)
    asks = store.query("SELECT count(*) AS n FROM asks")[0]["n"]
    later.fails = False
    for name in answered:
        kept = await session.resume(graphs[name], runs[name])
        recorded = store.finished_steps(runs[name])[name][0]
        assert recorded is not None
        assert kept == Kept(value=repr(load(recorded, YES[name])))
    assert store.query("SELECT count(*) AS n FROM asks")[0]["n"] == asks
    report = session.report()
    assert all(name in report for name in YES)
    return {name: error for name, error in errors.items() if name not in answered}


async def test_what_is_answered_is_recorded_resumed_and_reported() -> None:
    def answer(ask: Ask) -> str:
        return json.dumps(sample_answer(described_schema(YES[ask.role])))

    async with open_session(backend=ScriptedBackend(default=answer), store=":memory:") as session:
        errors = await ask_and_resume(session)
    assert errors.keys() <= WEAK | {"pattern"}  # of whose rules the sample knows nothing


@pytest.mark.engine
async def test_what_the_build_accepts_holds_on_a_real_engine(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", vocab=300, weight_std=0.02)
    settings = Settings(engine=TINY.model_copy(update={"max_model_tokens": 2048}), shelf=tmp_path / "shelf")
    async with open_session(base=base, store=tmp_path / "runs.db", settings=settings) as session:
        errors = await ask_and_resume(session)
    for name, error in errors.items():
        assert isinstance(error, AnswerError), error
        assert name in WEAK or "cut off by max_tokens" in str(error) or "\\ud" in str(error), error
