"""Whole workflows on a real engine: three roles on three variants, and every number adds up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from enum import StrEnum
from pathlib import Path

import pytest
from pydantic import BaseModel

from metier.agents import (
    PROMPT_LAYOUT,
    AdapterError,
    AskRejectedError,
    BaseModelError,
    Role,
    TaskGraph,
    UnknownVariantError,
)
from metier.router import Assignment, RoleAssignment
from metier.runtime import RunStore, Session, load_settings, open_session
from metier.runtime.events import Event
from metier.runtime.settings.engine import EngineSettings
from metier.specializers import Recipe, produce
from metier.specializers.shelf.base_model import base_fingerprint
from metier.specializers.shelf.shelf import Shelf
from metier.specializers.shelf.variant import AskSpec, EngineSpec
from tests.runtime.processor import skip_without_int4_kernels, skip_without_int8_kernels
from tests.tiny_model import write_random_lora

pytestmark = [pytest.mark.engine, pytest.mark.anyio]


class Word(StrEnum):
    YES = "yes"
    NO = "no"


class Puzzle(BaseModel):
    text: str


class Plan(BaseModel):
    ready: bool


class Answer(BaseModel):
    word: Word


class Verdict(BaseModel):
    correct: bool


planner = Role("planner", takes=(Puzzle, Verdict | None), gives=Plan, max_tokens=64)
solver = Role("solver", takes=Plan, gives=Answer, max_tokens=64)
critic = Role("critic", takes=(Puzzle, Answer), gives=Verdict, max_tokens=64)

inner = TaskGraph("inner", takes=Puzzle, gives=Answer)
with inner.loop("attempt", max_rounds=2, until=lambda s: False):
    plan = inner.step(planner)
    solve = inner.step(solver, after=plan)
    inner.step(critic, after=solve)

graph = TaskGraph("outer", takes=Puzzle, gives=Verdict)
graph.step(critic, after=graph.step(inner), name="last")

ROLES = ("planner", "solver", "critic")


@pytest.fixture(scope="module")
def shelf(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shelf with a good adapter for each role, and bad ones."""
    root = tmp_path_factory.mktemp("session")
    base = base_fingerprint(tiny_base)
    shelf = Shelf(root / "shelf")
    for seed, (name, layout, of) in enumerate(
        [(role, PROMPT_LAYOUT, base) for role in ROLES] + [("old-layout", 99, base), ("other-base", PROMPT_LAYOUT, "x")]
    ):
        write_random_lora(root / name / "adapter", tiny_base, rank=4, seed=seed)
        record = {
            "base": of,
            "prompt_layout": layout,
            "engine": EngineSpec(base=of),
            "ask": AskSpec(adapter="lora", rank=4),
        }
        shelf.add(root / name, name=name, record=record)
    return shelf.folder


def settings(shelf: Path) -> object:
    engine = EngineSettings(eager=True, kv_cache_mib=32, max_model_tokens=512, threads=1, adapter_slots=2, slot_rank=8)
    return load_settings(None, {"shelf": shelf, "engine": engine.model_dump()})


def assigned(**variants: str) -> Assignment:
    return Assignment(roles={role: RoleAssignment(variant=name) for role, name in variants.items()})


@pytest.fixture
async def session(tiny_base: Path, shelf: Path) -> AsyncIterator[Session]:
    """Three roles on three variants, over two slots."""
    async with AsyncExitStack() as stack:
        store = stack.enter_context(RunStore(":memory:"))
        yield await stack.enter_async_context(
            open_session(
                base=tiny_base,
                assignment=assigned(**{role: role for role in ROLES}),
                store=store,
                settings=settings(shelf),  # type: ignore[arg-type]
            )
        )


async def test_three_roles_on_three_variants_add_up(session: Session) -> None:
    """Tokens and CPU-seconds charged to roles are the engine's own totals; three adapters share two slots."""
    results = await session.map(graph, [Puzzle(text=f"number {i}") for i in range(6)], concurrency=4)
    assert [r.error for r in results] == [None] * 6
    assert session.batch is not None
    rows = session.store.query("SELECT * FROM asks")
    assert len(rows) == 6 * 7
    assert {(row["role"], row["variant"]) for row in rows} == {(role, role) for role in ROLES}
    (totals,) = session.store.engine_totals(session.batch).values()
    prefilled = sum(row["prompt_tokens"] - row["cached_tokens"] for row in rows)
    written = sum(row["answer_tokens"] + row["thinking_tokens"] for row in rows)
    # The first token of an answer comes out of the step that ends its prefill.
    assert totals["prefill_tokens"] == prefilled
    assert totals["decode_tokens"] == written - len(rows)
    assert totals["asks"] == len(rows)
    assert totals["adapter_loads"] == sum(row["swaps"] for row in rows) >= 3
    charged = sum(row["cpu_s"] for row in rows) + totals["overhead_cpu_s"]
    assert charged == pytest.approx(totals["cpu_s"], rel=0.02)
    report = session.report()
    assert "| planner | planner | 12 | 12 |" in report and "CPU-s" in report


async def test_a_graph_that_holds_a_loop_is_mapped_over_a_list(session: Session) -> None:
    """The pool foresees: it hears of the steps inside each item, and fetches their adapters ahead."""

    def twice(puzzle: Puzzle) -> list[Puzzle]:
        return [puzzle, Puzzle(text=f"{puzzle.text} again")]

    def last(answers: list[Answer]) -> Verdict:
        return Verdict(correct=len(answers) == 2)

    mapped = TaskGraph("mapped", takes=Puzzle, gives=Verdict)
    mapped.step(last, after=mapped.map(inner, over=mapped.step(twice)))
    assert await session.run(mapped, Puzzle(text="number 1")) == Verdict(correct=True)
    rows = session.store.query("SELECT * FROM asks")
    paths = {f"inner#{item}/attempt[{n}]/{role}" for item in (0, 1) for n in (1, 2) for role in ROLES}
    assert {row["path"] for row in rows} == paths and {(row["role"], row["variant"]) for row in rows} == {
        (role, role) for role in ROLES
    }


async def test_two_checkpoints_serve_beside_an_adapter_of_the_base(
    tiny_base: Path, shelf: Path, tmp_path: Path
) -> None:
    """Quantised variants and adapters in one assignment: an engine for each checkpoint, LoRA where it is needed."""
    skip_without_int4_kernels()
    skip_without_int8_kernels()
    for scheme in ("w8a8", "w4a16"):
        method = {"method": "ptq", "scheme": scheme, "perplexity_windows": 0}
        produce(Recipe.model_validate({"name": scheme, "methods": [method]}), shelf=Shelf(shelf), base=tiny_base)
    engines: dict[str, float] = {}

    def on_event(event: Event) -> None:
        if event.kind == "engine_ready":
            engines[event.data["engine"].rpartition("-")[0] or event.data["engine"]] = event.data["seconds"]

    async with open_session(
        base=tiny_base,
        assignment=assigned(planner="w8a8", solver="w4a16", critic="critic"),
        store=tmp_path / "runs.db",
        settings=settings(shelf),  # type: ignore[arg-type]
        on_event=on_event,
    ) as session:
        results = await session.map(graph, [Puzzle(text=f"number {i}") for i in range(3)], concurrency=3)
        assert [r.error for r in results] == [None] * 3
        assert session.batch is not None
        totals = session.store.engine_totals(session.batch)
        rows = session.store.query("SELECT * FROM asks")
        assert {(row["role"], row["variant"]) for row in rows} == {
            ("planner", "w8a8"),
            ("solver", "w4a16"),
            ("critic", "critic"),
        }
        assert sorted(engine.partition("-")[0].partition("@")[0] for engine in totals) == ["base", "w4a16", "w8a8"]
        charged = sum(row["cpu_s"] for row in rows) + sum(t["overhead_cpu_s"] for t in totals.values())
        abandoned = sum(sum(t["abandoned_cpu_s"].values()) for t in totals.values())
        assert charged + abandoned == pytest.approx(sum(t["cpu_s"] for t in totals.values()), rel=0.02)
    assert set(engines) == {"base", "w8a8", "w4a16"}


async def test_a_prompt_longer_than_the_context_fails_its_run_only(session: Session) -> None:
    results = await session.map(graph, [Puzzle(text="x"), Puzzle(text="word " * 2000), Puzzle(text="y")])
    assert [r.error is None for r in results] == [True, False, True]
    assert isinstance(results[1].error, AskRejectedError)
    assert "max_model_tokens" in str(results[1].error)


@pytest.mark.parametrize(
    ("variant", "error", "says"),
    [
        ("nobody", UnknownVariantError, "nobody"),
        ("other-base", AdapterError, "was made for base x"),
        ("old-layout", AdapterError, "trained with prompt layout 99"),
    ],
)
async def test_variants_that_cannot_serve_are_said(
    tiny_base: Path, shelf: Path, variant: str, error: type[Exception], says: str
) -> None:
    """Before anything runs."""
    with pytest.raises(error) as caught:
        async with open_session(
            base=tiny_base,
            assignment=assigned(planner=variant),
            store=":memory:",
            settings=settings(shelf),  # type: ignore[arg-type]
        ):
            pytest.fail("the session opened")
    assert says in str(caught.value)


async def test_a_base_without_tokenizer_is_said(tiny_base: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((tiny_base / file).read_bytes())
    with pytest.raises(BaseModelError, match="tokenizer"):
        async with open_session(base=tmp_path, store=":memory:"):
            pytest.fail("the session opened")
