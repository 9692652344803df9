"""The types, roles and replies that the tests of graphs and runs share."""

from __future__ import annotations

from pydantic import BaseModel

from metier.agents import Role, ScriptedBackend, StepRef, TaskGraph


class Puzzle(BaseModel):
    text: str


class Plan(BaseModel):
    expression: str


class Answer(BaseModel):
    value: int


class Verdict(BaseModel):
    correct: bool
    why: str = ""


class Parts(BaseModel):
    items: list[Plan]


planner = Role("planner", takes=(Puzzle, Verdict | None), gives=Plan, instructions="Plan {{ puzzle.text }}.")
solver = Role("solver", takes=Plan, gives=Answer, instructions="Solve.")
critic = Role("critic", takes=(Puzzle, Answer), gives=Verdict, instructions="Judge.")
splitter = Role("splitter", takes=Puzzle, gives=Parts, instructions="Split.")


def solve_and_check(max_rounds: int = 3, **loop: object) -> tuple[TaskGraph, StepRef]:
    """The workflow of the README: plan, solve, check, again until the critic is content."""
    graph = TaskGraph("solve-and-check", takes=Puzzle, gives=Answer)
    with graph.loop("attempt", max_rounds=max_rounds, until=lambda s: s[check].correct, **loop):  # type: ignore[arg-type]
        plan = graph.step(planner)
        solve = graph.step(solver, after=plan)
        check = graph.step(critic, after=solve)
    return graph, check


def second_time_right() -> ScriptedBackend:
    """The solver is right from round 2 on, and the critic knows."""
    return ScriptedBackend(
        {
            "planner": lambda ask: Plan(expression="1+2"),
            "solver": lambda ask: Answer(value=3 if ask.round > 1 else 4),
            "critic": lambda ask: Verdict(correct="# answer\n3" in ask.messages[1].content, why="it is 3"),
        }
    )
