"""Every type of the zoo asked of a real engine: what it writes is recorded, resumed and reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from metier.agents import AnswerError, Role, StepError, TaskGraph
from metier.agents.recorded_values import load
from metier.runtime import RunStore, open_session
from metier.runtime.settings.session import Settings
from tests.agents.answer_zoo import WEAK, YES
from tests.runtime.conftest import TINY
from tests.tiny_model import write_tiny_llama

pytestmark = [pytest.mark.engine, pytest.mark.anyio]


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
    graph = TaskGraph(name, takes=Question, gives=Kept)
    # Sampled: a random model repeats itself for ever when it is greedy.
    role = Role(name, takes=Question, gives=gives, max_tokens=300, temperature=1.0)
    answer = graph.step(role)
    graph.step(later.step(gives), name="keep", inputs={"value": answer}, retries=0)
    return graph


async def test_what_the_build_accepts_holds_on_a_real_engine(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base", vocab=300, weight_std=0.02)
    settings = Settings(engine=TINY.model_copy(update={"max_model_tokens": 2048}), shelf=tmp_path / "shelf")
    later = Later()
    graphs = {name: asking_for(name, gives, later) for name, gives in YES.items()}
    with RunStore(tmp_path / "runs.db") as store:
        async with open_session(base=base, store=store, settings=settings) as session:
            errors: dict[str, BaseException] = {}
            runs: dict[str, str] = {}

            async def run(name: str) -> None:
                (result,) = await session.map(graphs[name], [Question(text="?")], seed=len(name))
                assert result.error is not None or result.output is None  # a null answer is no answer to later steps
                runs[name] = result.run_id
                if result.error is not None:
                    errors[name] = result.error

            async with anyio.create_task_group() as tasks:
                for name in graphs:
                    tasks.start_soon(run, name)
            answered = {
                name for name, error in errors.items() if isinstance(error, StepError) and "not yet" in str(error)
            }
            for name, error in errors.items():
                if name not in answered:
                    assert isinstance(error, AnswerError), error
                    assert name in WEAK or "cut off by max_tokens" in str(error) or "\\ud" in str(error), error
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
