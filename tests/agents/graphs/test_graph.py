"""Every mistake in a workflow is caught when it is built, with a message that says what to change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import BaseModel

from metier.agents import GraphError, Role, TaskGraph
from metier.agents.graphs.nodes import Alternatives, GraphInput, PreviousRound, StepOutput
from tests.agents.workflow import (
    Answer,
    Parts,
    Plan,
    Puzzle,
    Verdict,
    critic,
    planner,
    solve_and_check,
    solver,
    splitter,
)


def test_inputs_resolve_by_type() -> None:
    built = solve_and_check()[0].build()
    loop = built.body["attempt"].work
    nodes = {node.name: node for node in loop.body.nodes}  # type: ignore[union-attr]
    assert nodes["planner"].sources == {"puzzle": GraphInput(), "verdict": PreviousRound(0, ("critic",))}
    assert nodes["solver"].sources == {"plan": StepOutput(0, ("planner",))}
    assert nodes["critic"].sources == {"puzzle": GraphInput(), "answer": StepOutput(0, ("solver",))}
    assert built.output == StepOutput(0, ("attempt", "solver"))
    assert set(built.roles()) == {"planner", "solver", "critic"}


def test_previous_round_falls_back_to_what_came_before_the_loop() -> None:
    class Draft(BaseModel):
        text: str

    writer = Role("writer", takes=Puzzle, gives=Draft)
    reviser = Role("reviser", takes=Draft, gives=Draft)
    graph = TaskGraph("g", takes=Puzzle, gives=Draft)
    first = graph.step(writer)
    with graph.loop("polish", max_rounds=2, after=first):
        revised = graph.step(reviser)
    graph.returns(revised)
    loop = graph.build().body["polish"].work
    source = loop.body["reviser"].sources["draft"]  # type: ignore[union-attr]
    assert source == PreviousRound(0, ("reviser",), fallback=StepOutput(1, ("writer",)))


def test_a_pinned_step_declared_later_means_the_previous_round() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=str)
    writer = Role("writer", takes={"puzzle": Puzzle, "critique": str | None}, gives=str)
    reader = Role("reader", takes={"draft": str}, gives=str)
    with graph.loop("rounds", max_rounds=2):
        draft = graph.step(writer, inputs={"critique": "reader"})
        graph.step(reader, inputs={"draft": draft})
    graph.returns(draft)
    body = graph.build().body["rounds"].work.body  # type: ignore[union-attr]
    assert body["writer"].sources["critique"] == PreviousRound(0, ("reader",))
    assert body["reader"].sources["draft"] == StepOutput(0, ("writer",))


def test_fan_out_takes_items_of_a_list_field() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=list[Answer])
    parts = graph.step(splitter)
    graph.map(solver, over=parts.field("items"))
    node = graph.build().body["solver"]
    assert node.each == "plan"
    assert node.gives == list[Answer]
    assert node.sources["plan"] == StepOutput(0, ("splitter",), "items")


def test_alternatives_and_functions() -> None:
    def fallback(puzzle: Puzzle) -> Answer:
        return Answer(value=0)

    graph = TaskGraph("g", takes=Puzzle, gives=Verdict)
    plan = graph.step(planner)
    solve = graph.step(solver, after=plan, when=lambda s: s[plan].expression)
    zero = graph.step(fallback, after=plan, when=lambda s: not s[plan].expression)
    graph.step(critic, inputs={"answer": (solve, zero)})
    source = graph.build().body["critic"].sources["answer"]
    assert source == Alternatives((StepOutput(0, ("solver",)), StepOutput(0, ("fallback",))))


def test_steps_may_name_later_ones_by_string() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    graph.step(solver, after="planner")
    graph.step(planner)
    assert [node.name for node in graph.build().body.nodes] == ["planner", "solver"]


def test_a_graph_is_a_step_of_another() -> None:
    inner, _ = solve_and_check()
    outer = TaskGraph("outer", takes=Puzzle, gives=Verdict)
    answer = outer.step(inner)
    outer.step(critic, after=answer)
    paths = [path for path, _ in outer.build().walk()]
    assert paths[:2] == ["solve-and-check", "solve-and-check/attempt"]


def test_fingerprint_changes_with_instructions_only_when_they_change() -> None:
    assert solve_and_check()[0].build().fingerprint == solve_and_check()[0].build().fingerprint
    assert solve_and_check(2)[0].build().fingerprint != solve_and_check(3)[0].build().fingerprint


def test_a_run_stored_by_an_earlier_version_is_of_the_same_graph() -> None:
    assert solve_and_check()[0].build().fingerprint == "3129fa34f52a94a2"


def test_pictures_name_every_step() -> None:
    from metier.agents.graphs.pictures import to_dot

    graph, _ = solve_and_check()
    for picture in (graph.to_mermaid(), to_dot(graph.build())):
        for word in ("planner", "solver", "critic", "attempt: at most 3 rounds", "next round", "Puzzle"):
            assert word in picture


def _unknown_name() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    graph.step(planner, after="plannr")
    graph.build()


def _step_of_another_graph() -> None:
    other = TaskGraph("other", takes=Puzzle, gives=Plan)
    plan = other.step(planner)
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    graph.step(solver, after=plan)
    graph.build()


def _nothing_gives_it() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    graph.step(solver)
    graph.build()


def _forgotten_after() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    graph.step(planner)
    graph.step(solver)
    graph.build()


def _type_mismatch() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Verdict)
    plan = graph.step(planner)
    graph.step(critic, inputs={"answer": plan})
    graph.build()


def _cycle() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    graph.step(planner, after="solver")
    graph.step(solver, after="planner")
    graph.build()


def _endless_loop() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    with graph.loop("again"):
        graph.step(planner)


def _empty_loop() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    with graph.loop("again", max_rounds=2):
        pass
    graph.build()


def _unreachable() -> None:
    def dice() -> Answer:
        return Answer(value=4)

    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    graph.step(planner)
    graph.step(dice)
    graph.build()


def _two_candidates() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    one = graph.step(planner, name="one")
    two = graph.step(planner, name="two")
    graph.step(solver, after=[one, two])
    graph.build()


def _two_outputs() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    graph.step(planner, name="one")
    graph.step(planner, name="two")
    graph.build()


def _no_output() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    graph.step(planner)
    graph.build()


def _same_name() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    graph.step(planner)
    graph.step(planner)


def _unknown_template_name() -> None:
    Role("planner", takes=Puzzle, gives=Plan, instructions="Plan {{ puzle.text }}.")


def _broken_template() -> None:
    Role("planner", takes=Puzzle, gives=Plan, instructions="Plan {{ puzzle.text.")


def _fan_out_over_no_list() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=list[Answer])
    plan = graph.step(planner)
    graph.map(solver, over=plan)
    graph.build()


def _unknown_field() -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=list[Answer])
    graph.step(splitter).field("item")


def _function_without_annotation() -> None:
    def check(answer):  # type: ignore[no-untyped-def]
        return answer

    TaskGraph("g", takes=Puzzle, gives=Plan).step(check)


def _previous_round_in_round_one() -> None:
    strict = Role("strict", takes=(Puzzle, Verdict), gives=Answer)
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    with graph.loop("attempt", max_rounds=2):
        answer = graph.step(strict, inputs={"verdict": "critic"})
        graph.step(critic, after=answer)
    graph.build()


def _no_steps() -> None:
    TaskGraph("g", takes=Puzzle, gives=Plan).build()


def _wrong_bounds() -> None:
    TaskGraph("g", takes=Puzzle, gives=Plan).step(planner, timeout_s=0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (_unknown_name, "unknown step 'plannr'; expected one of planner"),
        (_step_of_another_graph, "unknown step 'other:planner'"),
        (_nothing_gives_it, "takes Plan, which nothing before it gives"),
        (_forgotten_after, "Add after=planner"),
        (_type_mismatch, "takes Answer, but 'planner' gives Plan"),
        (_cycle, "wait for each other: planner → solver → planner"),
        (_endless_loop, "max_rounds=None; expected 1 to 1000"),
        (_empty_loop, "loop 'again' has no steps"),
        (_unreachable, "'dice' cannot be reached from the graph's input"),
        (_two_candidates, "2 steps could be the input 'plan' of step 'solver': one, two"),
        (_two_outputs, "2 steps of graph 'g' give Plan"),
        (_no_output, "gives Answer, but none of its steps does"),
        (_same_name, "two steps named 'planner'"),
        (_unknown_template_name, "use 'puzle'; expected only its inputs: puzzle"),
        (_broken_template, "are not a template"),
        (_fan_out_over_no_list, "fans out over Plan, which fits 0 of its inputs"),
        (_unknown_field, "no field 'item'; expected one of items"),
        (_function_without_annotation, "no annotation for answer, return"),
        (_previous_round_in_round_one, "comes from the previous round, and round 1 has none"),
        (_no_steps, "has no steps"),
        (_wrong_bounds, "timeout_s=0"),
    ],
)
def test_mistakes_are_named(wrong: Callable[[], None], says: str) -> None:
    with pytest.raises(GraphError) as caught:
        wrong()
    assert says in str(caught.value)


def test_inputs_of_one_type_need_names() -> None:
    with pytest.raises(GraphError, match="two inputs named 'plan'"):
        Role("judge", takes=(Plan, Plan), gives=Verdict)
    judge = Role("judge", takes={"pro": Plan, "con": Plan}, gives=Verdict)
    graph = TaskGraph("g", takes=Puzzle, gives=Verdict)
    one, two = graph.step(planner, name="one"), graph.step(planner, name="two")
    graph.step(judge, inputs={"pro": one, "con": two})
    assert graph.build().body["judge"].sources == {"pro": StepOutput(0, ("one",)), "con": StepOutput(0, ("two",))}


def test_roles_need_names_for_plain_types() -> None:
    with pytest.raises(GraphError, match="takes str without a name"):
        Role("reader", takes=str, gives=Parts)


@pytest.mark.parametrize("pinned", [False, True])
def test_an_answer_that_may_be_null_is_an_input_that_may_be_missing(pinned: bool) -> None:
    doubter = Role("doubter", takes=Puzzle, gives=Plan | None)
    reader = Role("reader", takes=(Puzzle, Plan | None), gives=Answer)
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    doubts = graph.step(doubter)
    graph.step(reader, after=doubts, inputs={"plan": doubts} if pinned else {})
    sources = graph.build().body["reader"].sources
    assert sources == {"puzzle": GraphInput(), "plan": StepOutput(0, ("doubter",))}


def test_an_answer_that_may_be_null_is_none_where_one_is_needed() -> None:
    doubter = Role("doubter", takes=Puzzle, gives=Plan | None)
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    graph.step(solver, after=graph.step(doubter))
    with pytest.raises(GraphError, match=r"Write Plan \| None in `takes`: doubter may give null"):
        graph.build()
