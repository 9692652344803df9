"""Items of a fan-out that fail: the list goes on without them where the workflow says so, also when it is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from metier.agents import AnswerError, Ask, EngineError, GraphError, LimitError, Role, ScriptedBackend, TaskGraph
from metier.runtime import RunLimits, RunStore, open_session

pytestmark = pytest.mark.anyio


class Library(BaseModel):
    texts: list[str]


class Line(BaseModel):
    line: str


class Count(BaseModel):
    n: int
    lines: list[str]


summarise = Role("summarise", takes={"text": str}, gives=Line)


def count(lines: list[Line]) -> Count:
    return Count(n=len(lines), lines=[line.line for line in lines])


def mapped(inner: Any = summarise, **more: Any) -> TaskGraph:
    graph = TaskGraph("reduce", takes=Library, gives=Count)
    graph.step(count, after=graph.map(inner, name="each", over="input.texts", **more))
    return graph


def bad_at(*numbers: int) -> ScriptedBackend:
    def reply(ask: Ask) -> str:
        number = ask.step_path.split("#")[1].split("/")[0]
        return "no JSON" if int(number) in numbers else f'{{"line": "{number}"}}'

    return ScriptedBackend({"summarise": reply})


FIFTY = Library(texts=[f"text {i}" for i in range(50)])


async def test_the_error_says_role_step_and_item() -> None:
    async with open_session(backend=bad_at(17), store=":memory:") as session:
        with pytest.raises(AnswerError, match=r"role 'summarise' at step 'each#17': reply 'no JSON' is no Line"):
            await session.run(mapped(), FIFTY)


@pytest.mark.parametrize(("on_error", "n", "at_17"), [("skip", 49, "18"), (Line(line="?"), 50, "?")])
async def test_a_map_goes_on_without_an_item(tmp_path: Path, on_error: Any, n: int, at_17: str) -> None:
    backend = bad_at(17)
    async with open_session(backend=backend, store=tmp_path / "runs.db") as session:
        done = await session.run(mapped(on_error=on_error), FIFTY)
        assert (done.n, done.lines[17]) == (n, at_17)
        states = session.store.query("SELECT path, state, error FROM steps WHERE state != 'done'")
    assert [(row["path"], row["state"]) for row in states] == [("each#17", "skipped")]
    assert "step 'each#17'" in states[0]["error"]


async def test_what_was_given_up_stays_so_when_a_run_is_resumed(tmp_path: Path) -> None:
    """The list has to be the one that later steps were given, also if the item would succeed by now."""
    fails = True

    def last(count: Count) -> Line:
        if fails:
            raise ValueError("not yet")
        return Line(line=f"{count.n} lines")

    graph = TaskGraph("reduce", takes=Library, gives=Line)
    graph.step(last, after=graph.step(count, after=graph.map(summarise, over="input.texts", on_error="skip")))
    backend = bad_at(3)
    async with open_session(backend=backend, store=tmp_path / "runs.db") as session:
        (result,) = await session.map(graph, [FIFTY])
        assert "not yet" in str(result.error)
        asked, fails = len(backend.asks), False
        assert await session.resume(graph, result.run_id) == Line(line="49 lines")
        assert len(backend.asks) == asked


async def test_a_graph_that_fails_inside_a_map_is_left_out(tmp_path: Path) -> None:
    inner = TaskGraph("inner", takes=Line, gives=Line)
    first = inner.step(Role("summarise", takes=Line, gives=Line))
    side = inner.step(Role("summarise", takes=Line, gives=Line), name="side")
    inner.returns(first, side)

    def lines(library: Library) -> list[Line]:
        return [Line(line=text) for text in library.texts]

    graph = TaskGraph("reduce", takes=Library, gives=Count)
    over = graph.step(lines)
    graph.step(count, after=graph.map(inner, name="each", over=over, on_error="skip"), inputs={"lines": "each"})
    backend = bad_at(1, 2)
    async with open_session(backend=backend, store=tmp_path / "runs.db") as session:
        assert (await session.run(graph, Library(texts=["a", "b", "c", "d"]))).n == 2
        skipped = session.store.query("SELECT path FROM steps WHERE state = 'skipped' ORDER BY path")
    assert [row["path"] for row in skipped] == ["each#1", "each#2"]


async def test_what_stops_the_run_is_no_fault_of_an_item() -> None:
    async with open_session(backend=bad_at(), store=":memory:") as session:
        with pytest.raises(LimitError):
            await session.run(mapped(on_error="skip"), FIFTY, limits=RunLimits(max_tokens=10))

    def gone(ask: Ask) -> str:
        raise EngineError("the engine is closed")

    async with open_session(backend=ScriptedBackend(default=gone), store=":memory:") as session:
        with pytest.raises(EngineError, match="the engine is closed"):
            await session.run(mapped(on_error="skip"), FIFTY)


async def test_no_more_items_run_at_once_than_the_limit_says() -> None:
    active = peak = 0

    async def slow(text: str) -> Line:
        nonlocal active, peak
        active += 1
        peak = max(peak, active)
        await anyio.lowlevel.checkpoint()
        active -= 1
        return Line(line=text)

    async with open_session(backend=ScriptedBackend(), store=":memory:") as session:
        assert (await session.run(mapped(slow, at_once=3), FIFTY)).n == 50
        assert peak == 3
        assert (await session.run(mapped(slow), Library(texts=[]))).n == 0


@pytest.mark.parametrize(
    ("more", "why"),
    [({"on_error": "leave out"}, "on_error='leave out'"), ({"on_error": None}, "'skip' or a value of Line")],
)
def test_what_stands_for_an_item_has_its_type(more: dict[str, Any], why: str) -> None:
    with pytest.raises(GraphError, match=why):
        mapped(**more).build()


def test_at_least_one_item_runs_at_once() -> None:
    with pytest.raises(GraphError, match="at_once=0"):
        mapped(at_once=0)


def test_stores_of_earlier_versions_can_be_resumed() -> None:
    """The rules of a fan-out are part of a workflow's fingerprint only where they differ from what was always done."""
    assert mapped().build().fingerprint == mapped(at_once=256).build().fingerprint
    assert mapped(on_error="skip").build().fingerprint != mapped().build().fingerprint
    with RunStore(":memory:") as store:
        assert store.skipped_steps("none") == frozenset()
