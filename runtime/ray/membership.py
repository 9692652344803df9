"""The running replicas of each application, as Serve last reported them to this process."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["members", "note_members"]

_members: dict[str, frozenset[str]] = {}


def members(application: str) -> frozenset[str]:
    """The ids of an application's replicas; empty before the first call to it."""
    return _members.get(application, frozenset())


def note_members(application: str, replicas: Iterable[str]) -> None:
    """Called by Serve's request router, in a thread of Serve's."""
    _members[application] = frozenset(replicas)
