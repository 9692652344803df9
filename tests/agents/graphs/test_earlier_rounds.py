"""Inputs from all earlier rounds of a loop: found by type, named, and refused where two could be meant."""

from __future__ import annotations

import pytest

from metier.agents import GraphError, Role, ScriptedBackend, TaskGraph
from metier.agents.graphs.nodes import BuiltNode, EarlierRounds, StepOutput
from metier.agents.graphs.pictures import to_dot, to_mermaid
from metier.agents.graphs.step_paths import StepPath
from metier.runtime import open_session
from tests.agents.workflow import Answer, Plan, Puzzle, Verdict, critic, splitter

reader = Role("reader", takes={"puzzle": Puzzle, "verdicts": list[Verdict]}, gives=Answer)


def judged(role: Role = reader, rounds: int = 3, **inputs: str) -> TaskGraph:
    """A role that reads all verdicts so far, and a critic."""
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    with graph.loop("attempt", max_rounds=rounds):
        answer = graph.step(role, inputs=inputs)
        graph.step(critic, after=answer)
    graph.returns(answer)
    return graph


def node(graph: TaskGraph, *names: str) -> BuiltNode:
    return graph.build().step_at(StepPath.parse("/".join(names)))


@pytest.mark.anyio
async def test_a_list_is_what_all_earlier_rounds_gave() -> None:
    backend = ScriptedBackend(
        {
            "reader": lambda ask: Answer(value=ask.round),
            "critic": lambda ask: Verdict(correct=False, why=f"{ask.round}"),
        }
    )
    async with open_session(backend=backend, store=":memory:") as session:
        await session.run(judged(), Puzzle(text="x"))
    prompts = [ask.messages[-1].content for ask in backend.asks if ask.role == "reader"]
    shown = [prompt.partition("# verdicts\n")[2].partition("\n\n#")[0] for prompt in prompts]
    one, two = "- correct: false\nwhy: 1", "- correct: false\nwhy: 2"
    assert shown == ["[]", one, f"{one}\n{two}"]


@pytest.mark.parametrize("inputs", [{}, {"verdicts": "critic"}])
def test_found_by_type_or_named(inputs: dict[str, str]) -> None:
    step = node(judged(**inputs), "attempt", "reader")
    assert step.sources["verdicts"] == EarlierRounds(0, ("critic",))
    assert step.after == () and step.reads_earlier == {"critic": True}


def test_a_field_and_its_own_outputs_can_be_meant() -> None:
    reasons = Role("reader", takes={"puzzle": Puzzle, "whys": list[str]}, gives=Answer)
    step = node(judged(reasons, whys="critic.why"), "attempt", "reader")
    assert step.sources["whys"] == EarlierRounds(0, ("critic",), "why")
    own = Role("reader", takes={"puzzle": Puzzle, "mine": list[Answer]}, gives=Answer)
    assert node(judged(own), "attempt", "reader").sources["mine"] == EarlierRounds(0, ("reader",))


@pytest.mark.parametrize("inputs", [{}, {"verdicts": "critic"}])
@pytest.mark.anyio
async def test_rounds_without_an_output_are_left_out(inputs: dict[str, str]) -> None:
    """The critic is skipped in round 2, and gives null in round 3."""
    mild = Role("critic", takes=(Puzzle, Answer), gives=Verdict | None)
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    with graph.loop("attempt", max_rounds=4):
        answer = graph.step(reader, inputs=inputs)
        graph.step(mild, after=answer, when=lambda s: s[answer].value != 2)
    graph.returns(answer)
    verdicts = {1: Verdict(correct=False, why="first"), 3: None, 4: None}
    backend = ScriptedBackend(
        {"reader": lambda ask: Answer(value=ask.round), "critic": lambda ask: verdicts[ask.round]}
    )
    async with open_session(backend=backend, store=":memory:") as session:
        await session.run(graph, Puzzle(text="x"))
    prompts = [ask.messages[-1].content for ask in backend.asks if ask.role == "reader"]
    assert ["why: first" in prompt for prompt in prompts] == [False, True, True, True]
    assert all(prompt.count("- correct") == (number > 0) for number, prompt in enumerate(prompts))


def test_a_step_before_and_an_outer_loop_can_be_meant() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Verdict)
    summary = Role("summary", takes={"puzzle": Puzzle, "answers": list[Answer], "verdicts": list[Verdict]}, gives=Plan)
    with graph.loop("outer", max_rounds=2):
        answer = graph.step(Role("solver", takes=Puzzle, gives=Answer))
        with graph.loop("inner", max_rounds=2, after=answer):
            graph.step(summary, inputs={"answers": answer})
        graph.returns(graph.step(critic, after="inner"))
    sources = node(graph, "outer", "inner", "summary").sources
    assert sources["answers"] == EarlierRounds(1, ("solver",))
    assert sources["verdicts"] == EarlierRounds(1, ("critic",))


def test_a_list_that_a_step_gives_comes_first() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    merger = Role("merger", takes=list[Plan], gives=Plan)
    checked = graph.map(Role("checker", takes=Plan, gives=Plan), over=graph.step(splitter).field("items"))
    with graph.loop("again", max_rounds=2, after=checked):
        graph.returns(graph.step(merger))
    assert node(graph, "again", "merger").sources == {"plans": StepOutput(1, ("checker",))}


def test_pictures_say_that_all_rounds_are_read() -> None:
    built = judged().build()
    for picture in (to_mermaid(built), to_dot(built)):
        assert "all later rounds" in picture and "next round" not in picture


def test_two_that_could_be_meant_are_named() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    with graph.loop("attempt", max_rounds=2):
        answer = graph.step(reader)
        graph.step(critic, after=answer)
        graph.step(critic, name="second", after=answer)
    graph.returns(answer)
    with pytest.raises(GraphError, match="2 steps could be the input 'verdicts' of step 'reader': critic, second"):
        graph.build()


def test_outside_a_loop_there_are_no_earlier_rounds() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    check = graph.step(Role("judge", takes=Puzzle, gives=Verdict))
    graph.step(reader, inputs={"verdicts": check})
    with pytest.raises(GraphError, match=r"takes list\[Verdict\], but 'judge' gives Verdict"):
        graph.build()
