"""The best choice on each checkpoint alone, to be run beside the best by prediction before that is believed.

Costs are predicted from replacing one part at a time, where a checkpoint has one part on it and its steps are small and
dear. Moving all parts to one checkpoint at once is what this misjudges most, and it is cheap to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .coupling import Problem

__all__ = ["on_one_checkpoint"]


def on_one_checkpoint(problem: Problem) -> Iterator[Problem]:
    """The problem with the candidates of one checkpoint only, for every one that has some for each part."""
    served = {row.footprint.checkpoint for rows in problem.rows.values() for row in rows.values()}
    for checkpoint in sorted(served):
        rows = {
            part: {c: row for c, row in problem.rows[part].items() if row.footprint.checkpoint == checkpoint}
            for part in problem.parts
        }
        if len(served) > 1 and all(rows.values()):
            yield replace(problem, rows=rows)
