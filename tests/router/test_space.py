"""Parts, candidates and choices, and the assignments they stand for."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from metier.agents import AssignmentError, Role, TaskGraph
from metier.router import Assignment, RoleAssignment, Router
from metier.router.space import Candidate, Part, Space, role_rounds, space_of


class Topic(BaseModel):
    text: str


class Draft(BaseModel):
    text: str


class Remark(BaseModel):
    text: str


class Final(BaseModel):
    text: str


writer = Role("writer", takes=(Topic, Remark | None), gives=Draft)
judge = Role("judge", takes=Draft, gives=Remark)
closer = Role("closer", takes=Draft, gives=Final)


def workflow() -> TaskGraph:
    graph = TaskGraph("w", takes=Topic, gives=Final)
    with graph.loop("again", max_rounds=3, until=lambda s: False) as again:
        graph.step(judge, after=graph.step(writer))
    graph.step(closer, after=again)
    return graph


CANDIDATES = [Candidate(), Candidate("x"), Candidate("x", 64)]


@pytest.mark.parametrize("text", ["base", "solver-lora", "solver@64", "solver@0"])
def test_candidates_are_written_as_they_are_read(text: str) -> None:
    assert str(Candidate.read(text)) == text


@pytest.mark.parametrize("text", ["", "@4", "a@b", "a b"])
def test_other_text_is_no_candidate(text: str) -> None:
    with pytest.raises(AssignmentError, match="cannot be read"):
        Candidate.read(text)


def test_rounds_are_those_of_the_loop_around() -> None:
    built = workflow().build()
    assert role_rounds(built) == {"writer": 3, "judge": 3, "closer": 1}
    assert [str(p) for p in space_of(built, CANDIDATES).parts] == [
        "writer[1]", "writer[2+]", "judge[1]", "judge[2+]", "closer",
    ]  # fmt: skip
    assert [str(p) for p in space_of(built, CANDIDATES, split_rounds=False).parts] == ["writer", "judge", "closer"]


def test_a_choice_survives_its_assignment() -> None:
    space = space_of(workflow().build(), CANDIDATES)
    first, later = Part("writer", "first"), Part("writer", "later")
    choices = {**space.uniform(Candidate()), first: Candidate("x"), Part("closer"): Candidate("x")}
    assignment = space.assignment(choices, {first: "good", later: "cheap"})
    assert assignment.roles["writer"] == RoleAssignment(
        variant="x", rounds={2: "base", 3: "base"}, reason="good; later rounds: cheap"
    )
    assert space.read(assignment) == choices
    assert Router(assignment).expect("writer", 2).variant is None
    assert Router(assignment).expect("judge", 3).variant is None


def test_rounds_that_parts_cannot_tell_apart_are_refused() -> None:
    space = space_of(workflow().build(), CANDIDATES)
    uneven = Assignment(roles={"judge": RoleAssignment(variant="x", rounds={2: "base"})})
    with pytest.raises(AssignmentError, match=r"judge\[2\+\] different variants: base, x"):
        space.read(uneven)
    with pytest.raises(AssignmentError, match="nothing is chosen for closer"):
        space.assignment({p: Candidate() for p in space.parts if p.role != "closer"})
    with pytest.raises(AssignmentError, match="has the candidates none"):
        Space((Part("a"),), {}, {})
