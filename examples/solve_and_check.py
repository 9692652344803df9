"""Solve arithmetic puzzles: plan an expression, evaluate it, check it, and try again with the critic's reason.

    metier run examples/solve_and_check.py --tasks test:24 --assignment examples/assignment.yaml \
        --shelf examples/variants

The roles and the puzzles are in `puzzles.py` beside this file.
"""

from __future__ import annotations

from puzzles import Answer, Puzzle, critic, planner, puzzle_tasks, solver

from metier.agents import TaskGraph

graph = TaskGraph("solve-and-check", takes=Puzzle, gives=Answer)
with graph.loop("attempt", max_rounds=3, until=lambda s: s[check].correct):
    plan = graph.step(planner)  # sees the puzzle and, from round 2, the critic's verdict
    solve = graph.step(solver, after=plan)
    check = graph.step(critic, after=solve)

tasks = puzzle_tasks
