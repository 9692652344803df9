"""Mixed puzzles for a team of two: a solver for every kind, and a checker that works the puzzle out again.

    metier run examples/mixed_team.py --tasks test:24 --assignment examples/mixed_assignment.yaml \
        --shelf examples/variants

The solver is a T-REX variant: one adapter of rank-one experts, mixed per token and by what kind of puzzle the run
is about. The checker is a LoRA variant. Both are in one batch of one engine. The answer comes with whether the two
agreed: there is no second try, because a puzzle that a small model got wrong it gets wrong again. Do not expect much of
that word: on 96 test puzzles the checker trusted 75 answers, of which 26 were right, and 6 of the 21 others were.
"""

from __future__ import annotations

from mixed_puzzles import Answer, Puzzle, Verdict, checker, mixed_tasks, solver
from pydantic import BaseModel

from metier.agents import TaskGraph


class Result(BaseModel):
    trusted: bool
    answer: str


def conclude(answer: Answer, verdict: Verdict) -> Result:
    """The solver's answer, and whether the checker came to the same."""
    return Result(trusted=verdict.correct, answer=answer.answer)


graph = TaskGraph("mixed-team", takes=Puzzle, gives=Result)
solve = graph.step(solver)
check = graph.step(checker, after=solve)
graph.step(conclude, after=check)

tasks = mixed_tasks
