"""Commands that a message suggests, whole, so that they work when they are pasted."""

from __future__ import annotations

import shlex

__all__ = ["command"]


def command(verb: str, *words: str, store: str) -> str:
    """A verb that reads the run store `store`, quoted for a shell.

    >>> command("resume", "solve-1", "--at", "budget/approve", store="runs/my runs.db")
    "metier resume solve-1 --at budget/approve --store 'runs/my runs.db'"
    """
    return shlex.join(["metier", *verb.split(), *words, "--store", store])
