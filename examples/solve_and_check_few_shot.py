"""The workflow of solve_and_check.py by prompt alone: every role on the base, shown four rows of its teacher.

metier run examples/solve_and_check_few_shot.py --tasks test:24
"""

from __future__ import annotations

import puzzles
from few_shot import with_examples

from metier.agents import TaskGraph

graph = TaskGraph("solve-and-check-few-shot", takes=puzzles.Puzzle, gives=puzzles.Answer)
with graph.loop("attempt", max_rounds=3, until=lambda s: s[check].correct):
    plan = graph.step(with_examples(puzzles.planner, puzzles.planner_rows))
    solve = graph.step(with_examples(puzzles.solver, puzzles.solver_rows), after=plan)
    check = graph.step(with_examples(puzzles.critic, puzzles.critic_rows), after=solve)

tasks = puzzles.puzzle_tasks
