"""Step paths, `attempt[2]/critic#3`: a step a level, a loop's round in brackets, a fan-out's item after `#`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..errors import GraphError

__all__ = ["RESERVED", "ROOT", "PathStep", "StepPath"]

RESERVED = "/[]#~"
"""Characters that no step's name may have; `~` parts an ask's attempt from its path (`Ask.id`)."""

PARSED_KEPT = 10_000
"""Paths whose parsed form is kept: reports and runs read the same ones again and again."""

_NUMBER = "[1-9][0-9]{0,15}"
_STEP = re.compile(rf"([^{re.escape(RESERVED)}]+)(?:\[({_NUMBER})\])?(?:#(0|{_NUMBER}))?\Z")


class PathStep(NamedTuple):
    """One level of a path: a step, in which round of it when it is a loop, at which item when it fans out."""

    name: str
    round: int | None = None
    """From 1."""
    item: int | None = None
    """From 0."""

    def __str__(self) -> str:
        name, number, item = self
        shown = name if number is None else f"{name}[{number}]"
        return shown if item is None else f"{shown}#{item}"

    @classmethod
    def parse(cls, text: str) -> PathStep:
        """Read one level of a path; raises GraphError for what `str` never writes."""
        found = _STEP.match(text)
        if found is None:
            raise GraphError(f"{text!r} in a step path", expected="a name, name[round] or name#item")
        name, number, item = found.groups()
        return cls(name, None if number is None else int(number), None if item is None else int(item))


@dataclass(frozen=True, slots=True)
class StepPath:
    """Where a step is in a run: through which rounds, items and sub-graphs. No steps at all is the run itself.

    >>> path = StepPath.parse("attempt[2]/critic#3")
    >>> path.steps[0].round, path.name, path.declared, str(path.parent / "solver")
    (2, 'critic', 'attempt/critic', 'attempt[2]/solver')
    """

    steps: tuple[PathStep, ...] = ()

    def __str__(self) -> str:
        return "/".join(map(str, self.steps))

    @classmethod
    def parse(cls, text: str) -> StepPath:
        """Read a path as `str` writes it; raises GraphError for anything else."""
        return _parse(text)

    def __truediv__(self, name: str) -> StepPath:
        """The step of that name one level further in."""
        return self.then(PathStep(name))

    def then(self, step: PathStep) -> StepPath:
        """One level further in."""
        return StepPath((*self.steps, step))

    def in_round(self, number: int) -> StepPath:
        """The same loop in one of its rounds, from 1."""
        return StepPath((*self.steps[:-1], self.steps[-1]._replace(round=number)))

    def at_item(self, index: int) -> StepPath:
        """The same fan-out at one of its items, from 0."""
        return StepPath((*self.steps[:-1], self.steps[-1]._replace(item=index)))

    @property
    def name(self) -> str:
        """Name of the step itself, the last one."""
        return self.steps[-1].name

    @property
    def parent(self) -> StepPath:
        """What the step is in: a round of a loop, a sub-graph, or the run itself."""
        return StepPath(self.steps[:-1])

    @property
    def round(self) -> int | None:
        """Round of the innermost loop around, None outside loops."""
        return next((step.round for step in reversed(self.steps) if step.round is not None), None)

    @property
    def declared(self) -> str:
        """The path as the workflow declares it, without rounds and items: `attempt/critic`."""
        return "/".join(step.name for step in self.steps)

    @property
    def without_items(self) -> StepPath:
        """The path with its rounds only: what all items of a fan-out have in common."""
        return StepPath(tuple(PathStep(step.name, step.round) for step in self.steps))

    @property
    def items_together(self) -> str:
        """The path with all items of a fan-out under one name: `attempt[2]/critic#*`."""
        return "/".join(str(s) if s.item is None else f"{PathStep(s.name, s.round)}#*" for s in self.steps)

    def levels(self) -> Iterator[tuple[StepPath, PathStep]]:
        """Every level as (what it is in, the step there), outermost first."""
        return ((StepPath(self.steps[:depth]), step) for depth, step in enumerate(self.steps))


ROOT = StepPath()
"""The run itself, in which the first level's steps are."""


@lru_cache(PARSED_KEPT)
def _parse(text: str) -> StepPath:
    return StepPath(tuple(map(PathStep.parse, text.split("/"))) if text else ())
