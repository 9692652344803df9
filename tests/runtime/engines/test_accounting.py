"""The report's tokens are the engine's: counted once by us and once from what vLLM itself says, to the last token."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from metier.agents import AnswerError, Role, TaskGraph, ThinkingProfile
from metier.router import Assignment, RoleAssignment
from metier.router.route import Router
from metier.runtime import RunStore, Session, load_settings
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.engines.pool import EnginePool
from metier.runtime.engines.variant_targets import EngineStart
from metier.runtime.report.costs import Cost
from metier.runtime.report.ledger import read_ledger
from metier.specializers.shelf.variant import Variant
from tests.runtime.conftest import TINY

pytestmark = [pytest.mark.engine, pytest.mark.anyio]


class Puzzle(BaseModel):
    text: str


class Plan(BaseModel):
    ready: bool


class Note(BaseModel):
    text: str


planner = Role("planner", takes=Puzzle, gives=Plan, max_tokens=48)
# Cut off long before it is JSON: every try is two asks, the second with the correction.
solver = Role("solver", takes=Plan, gives=Note, max_tokens=4)
critic = Role("critic", takes=Puzzle, gives=Plan, max_tokens=48, thinking=ThinkingProfile(max_tokens=12))
writer = Role("writer", takes=Puzzle, gives=str, max_tokens=300)

inner = TaskGraph("inner", takes=Puzzle, gives=Plan)
with inner.loop("attempt", max_rounds=2, until=lambda s: False):
    inner.step(planner)

nested = TaskGraph("nested", takes=Puzzle, gives=Plan)
nested.returns(nested.step(critic, after=nested.step(inner), name="last"))

failing = TaskGraph("failing", takes=Puzzle, gives=Note)
failing.step(solver, after=failing.step(planner), retries=1)

writing = TaskGraph("writing", takes=Puzzle, gives=str)
writing.step(writer)


class EnginesOwnCounts:
    """Reads vLLM's outputs and statistics of every step of an engine, knowing nothing of our asks but their names."""

    def __init__(self, engine: InProcessEngine) -> None:
        self.prompt: Counter[str] = Counter()
        self.cached: Counter[str] = Counter()
        self.generated: Counter[str] = Counter()
        self.all_prompt = self.all_cached = self.all_generated = 0
        self._seen: defaultdict[str, int] = defaultdict(int)
        llm: Any = engine._llm._llm
        step = llm.step

        def counted() -> Any:
            outputs = step()
            for output in outputs:
                role = output.request_id.rpartition("-")[0]
                if not self._seen[output.request_id]:
                    self.prompt[role] += len(output.prompt_token_ids)
                    self.cached[role] += output.num_cached_tokens
                tokens = len(output.outputs[0].token_ids)
                self._seen[output.request_id] += tokens
                self.generated[role] += tokens
            return outputs

        llm.step = counted
        llm.logger_manager = self
        self._llm = llm

    def record(self, *, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any) -> None:
        """vLLM's own statistics, as its Prometheus exporter gets them."""
        if iteration_stats is not None:
            self.all_prompt += iteration_stats.num_prompt_tokens
            self.all_cached += iteration_stats.prompt_token_stats.cached_tokens
            self.all_generated += iteration_stats.num_generation_tokens

    def log(self) -> None:
        """Asked for now and then; there is nothing to log."""


@pytest.fixture
async def counted(
    tiny_base: Path, tiny_variants: dict[str, tuple[Variant, Path]]
) -> AsyncIterator[tuple[Session, EnginesOwnCounts]]:
    """A session of three roles on three adapters over two slots, and what its engine counts itself."""
    engines: list[EnginesOwnCounts] = []

    async def start(wanted: EngineStart) -> InProcessEngine:
        engine = await InProcessEngine.start(wanted.weights, wanted.settings, adapters=wanted.adapters, name="counted")
        engines.append(EnginesOwnCounts(engine))
        return engine

    def resolve(name: str) -> tuple[Variant, Path]:
        return tiny_variants[name]

    chosen = {role: RoleAssignment(variant=f"lora{at}") for at, role in enumerate(("planner", "solver", "critic"))}
    with RunStore(":memory:") as store:
        pool = EnginePool(tiny_base, resolve, TINY, on_abandoned=store.record_abandoned, start_engine=start)
        async with pool:
            await pool.warm()
            settings = load_settings(None, {})
            router = Router(Assignment(roles=chosen))
            yield Session(pool, router, store, settings, totals=pool.totals, other_roles=chosen), engines[0]


async def test_tokens_of_roles_are_the_engines(counted: tuple[Session, EnginesOwnCounts]) -> None:
    """Loops in sub-graphs, thinking, corrections and retries that fail, streams, and asks given up in the middle."""
    session, engine = counted
    batches = []

    async def note_batch() -> None:
        assert session.batch is not None
        batches.append(session.batch)

    results = await session.map(nested, [Puzzle(text=f"number {i}") for i in range(4)], concurrency=4)
    assert [r.error for r in results] == [None] * 4
    await note_batch()
    results = await session.map(failing, [Puzzle(text=f"number {i}") for i in range(2)])
    assert [type(r.error) for r in results] == [AnswerError] * 2
    await note_batch()
    async with session.stream(nested, Puzzle(text="streamed")) as events:
        kinds = [event.kind async for event in events]
    assert "text" in kinds and kinds[-1] == "run_finished"
    await note_batch()
    async with session.stream(writing, Puzzle(text="left early")) as events:
        async for event in events:
            if event.kind == "text":
                break
    await note_batch()
    before = engine.all_generated
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(session.run, writing, Puzzle(text="given up"))
        while engine.all_generated < before + 5:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    await note_batch()
    # What was given up is told by the engine's thread; the next ask of it is behind that.
    await session.map(nested, [Puzzle(text="last")])
    await note_batch()

    costs: defaultdict[str, Cost] = defaultdict(Cost)
    for batch in batches:
        for ask in read_ledger(session.store, batch).spent:
            costs[ask.role].add(ask)
    for role in ("planner", "solver", "critic"):
        assert costs[role].prompt_tokens == engine.prompt[role]
        assert costs[role].cached_tokens == engine.cached[role]
        assert costs[role].thinking_tokens + costs[role].answer_tokens == engine.generated[role]
    assert sum(cost.prompt_tokens for cost in costs.values()) == engine.all_prompt
    assert sum(cost.cached_tokens for cost in costs.values()) == engine.all_cached > 0
    assert sum(cost.thinking_tokens + cost.answer_tokens for cost in costs.values()) == engine.all_generated
    assert costs["solver"].corrected == 8 and costs["writer"].lost == 2
    assert costs["critic"].thinking_tokens == 12 * 6
    (totals,) = session.store.engine_totals(batches[-1]).values()
    assert totals["prefill_tokens"] == sum(cost.prefilled_tokens for cost in costs.values())
