"""Graphs mapped over lists, in loops and in each other: on a backend that foresees as on one that does not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pydantic import BaseModel

from metier.agents import AnswerError, Ask, Role, ScriptedBackend, TaskGraph
from metier.router import Assignment, RoleAssignment
from metier.runtime import RunStore, open_session
from metier.runtime.report.critical_path import critical_path_s
from metier.runtime.report.graph_picture import draw_workflow
from metier.runtime.report.ledger import read_ledger
from metier.runtime.simulator.recorded_programs import read_programs
from tests.runtime.runs.listening import Listening

pytestmark = pytest.mark.anyio


class Items(BaseModel):
    items: list[str]


class Item(BaseModel):
    text: str


class Draft(BaseModel):
    text: str


class Verdict(BaseModel):
    good: bool


class Joined(BaseModel):
    text: str


drafter = Role("drafter", takes=(Item, Verdict | None), gives=Draft, instructions="Draft.")
judge = Role("judge", takes=Draft, gives=Verdict, instructions="Judge.")


def split(items: Items) -> list[Item]:
    return [Item(text=text) for text in items.items]


def letters(item: Item) -> list[Item]:
    return [Item(text=letter) for letter in item.text]


def spell(drafts: list[Draft]) -> Draft:
    return Draft(text="".join(draft.text for draft in drafts))


def join(drafts: list[Draft]) -> Joined:
    return Joined(text=",".join(draft.text for draft in drafts))


def one_draft() -> TaskGraph:
    graph = TaskGraph("one", takes=Item, gives=Draft)
    graph.step(drafter, name="draft")
    return graph


def with_a_loop() -> TaskGraph:
    """Drafts until the judge is content: a sub-graph that holds a loop."""
    graph = TaskGraph("looping", takes=Item, gives=Draft)
    with graph.loop("attempt", max_rounds=3, until=lambda s: s[verdict].good):
        verdict = graph.step(judge, after=graph.step(drafter, name="draft"))
    return graph


def with_a_graph_in_a_loop() -> TaskGraph:
    graph = TaskGraph("looping-graph", takes=Item, gives=Draft)
    with graph.loop("attempt", max_rounds=3, until=lambda s: s[verdict].good):
        verdict = graph.step(judge, after=graph.step(one_draft(), name="inner"))
    return graph


def with_a_map() -> TaskGraph:
    """A draft for each letter: a map inside what is mapped."""
    graph = TaskGraph("spelling", takes=Item, gives=Draft)
    graph.step(spell, after=graph.map(with_a_loop(), name="letter", over=graph.step(letters)))
    return graph


def mapped(inner: TaskGraph) -> TaskGraph:
    graph = TaskGraph("outer", takes=Items, gives=Joined)
    graph.step(join, after=graph.map(inner, name="each", over=graph.step(split)))
    return graph


def in_a_loop(inner: TaskGraph) -> TaskGraph:
    """The map itself in a loop, two rounds of it."""
    graph = TaskGraph("rounds", takes=Items, gives=Joined)
    with graph.loop("again", max_rounds=2):
        graph.step(join, after=graph.map(inner, name="each", over=graph.step(split)))
    return graph


def text_of(ask: Ask) -> str:
    return ask.messages[1].content.split("\n")[1]


def scripted(kind: type[ScriptedBackend]) -> ScriptedBackend:
    """Drafts repeat the item; the judge is content with everything the second time he sees it in one place."""
    seen: Counter[str] = Counter()

    def judged(ask: Ask) -> Verdict:
        place = ask.step_path.replace("[1]", "").replace("[2]", "")
        seen[place] += 1
        return Verdict(good=seen[place] > 1 or text_of(ask) == "c")

    return kind({"drafter": lambda ask: Draft(text=text_of(ask)), "judge": judged})


CASES = {
    "a graph": (mapped(one_draft()), "ab,c", {"each#0/draft", "each#1/draft"}),
    "a loop in a graph": (
        mapped(with_a_loop()),
        "ab,c",
        {f"each#0/attempt[{n}]/{step}" for n in (1, 2) for step in ("draft", "judge")}
        | {"each#1/attempt[1]/draft", "each#1/attempt[1]/judge"},
    ),
    "a graph in a loop in a graph": (
        mapped(with_a_graph_in_a_loop()),
        "ab,c",
        {f"each#0/attempt[{n}]/{step}" for n in (1, 2) for step in ("inner/draft", "judge")}
        | {"each#1/attempt[1]/inner/draft", "each#1/attempt[1]/judge"},
    ),
    "a map in a graph": (
        mapped(with_a_map()),
        "ab,c",
        {f"each#0/letter#{i}/attempt[{n}]/{s}" for i in (0, 1) for n in (1, 2) for s in ("draft", "judge")}
        | {"each#1/letter#0/attempt[1]/draft", "each#1/letter#0/attempt[1]/judge"},
    ),
    "a map in a loop": (
        in_a_loop(one_draft()),
        "ab,c",
        {f"again[{n}]/each#{i}/draft" for n in (1, 2) for i in (0, 1)},
    ),
}


@pytest.mark.parametrize("kind", [ScriptedBackend, Listening])
@pytest.mark.parametrize("case", CASES)
async def test_what_is_mapped_runs_where_it_is(tmp_path: Path, case: str, kind: type[ScriptedBackend]) -> None:
    """The foreseeing backend also asserts that every ask was announced when its step began."""
    graph, text, asked = CASES[case]
    assignment = Assignment(roles={role: RoleAssignment(variant=f"{role}'s") for role in graph.build().roles()})
    backend = scripted(kind)
    with RunStore(tmp_path / "runs.db") as store:
        async with open_session(backend=backend, store=store, assignment=assignment) as session:
            output = await session.run(graph, Items(items=["ab", "c"]))
            assert session.batch is not None
        assert output == Joined(text=text)
        assert sorted(ask.step_path for ask in backend.asks) == sorted(asked)
        if isinstance(backend, Listening):
            assert backend.announced == {} and len(backend.forgotten) == 1
        ledger = read_ledger(store, session.batch)
        assert set(critical_path_s(ledger)) == {run.id for run in ledger.runs}
        assert "not asked" not in draw_workflow(ledger)
    (program,) = read_programs(tmp_path / "runs.db").programs
    assert {step.path for step in program.steps if step.ask} == asked


@pytest.mark.parametrize("case", CASES)
async def test_an_empty_list_gives_an_empty_list(case: str) -> None:
    with RunStore(":memory:") as store:
        async with open_session(backend=scripted(Listening), store=store) as session:
            assert await session.run(CASES[case][0], Items(items=[])) == Joined(text="")


async def test_a_mapped_graph_that_was_stopped_goes_on_item_by_item(tmp_path: Path) -> None:
    """The first time the judge fails at one item's second round; what the other items had is not asked again."""
    fails = True
    asked: list[str] = []

    def judged(ask: Ask) -> Verdict | str:
        asked.append(ask.step_path)
        if fails and ask.step_path.startswith("each#0/attempt[2]"):
            return "neither good nor bad"
        return Verdict(good=ask.round == 2)

    backend = Listening({"drafter": lambda ask: Draft(text=text_of(ask)), "judge": judged})
    graph = mapped(with_a_loop())
    with RunStore(tmp_path / "runs.db") as store:
        async with open_session(backend=backend, store=store) as session:
            (result,) = await session.map(graph, [Items(items=["ab", "c"])])
            assert isinstance(result.error, AnswerError)
            before, fails = set(asked), False
            asked.clear()
            assert await session.resume(graph, result.run_id) == Joined(text="ab,c")
    assert "each#0/attempt[1]/judge" in before and "each#0/attempt[1]/judge" not in asked
    assert set(asked) <= {f"each#{i}/attempt[2]/judge" for i in (0, 1)}
