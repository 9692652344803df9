"""Roles that are shown rows of their teachers: what the base can do by prompt alone, to compare trained variants with.

Prompts are those of the trained roles, after rows of the train split as turns of user and assistant. These are the
same in every ask of a role, so the prefix cache holds them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

from metier.agents import Message, Role, TrafficRow

SHOWN_ROWS = 4


def with_examples(role: Role, teacher: Callable[[int, int], Iterator[TrafficRow]]) -> Role:
    """The role, shown the first rows of its teacher (`teacher(size, seed)`)."""
    rows = itertools.islice(teacher(SHOWN_ROWS, 0), SHOWN_ROWS)
    turns = [(row.messages[-1], Message(role="assistant", content=row.reply)) for row in rows]
    return replace(role, examples=tuple(itertools.chain.from_iterable(turns)))
