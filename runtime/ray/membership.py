"""Which replicas Serve says are running, as this process last heard."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["members", "note_members"]

_members: dict[str, frozenset[str]] = {}


def members(application: str) -> frozenset[str]:
    """The ids of an application's replicas; none before the first call there."""
    return _members.get(application, frozenset())


def note_members(application: str, replicas: Iterable[str]) -> None:
    """Called by Serve's request router, in a thread of Serve's."""
    _members[application] = frozenset(replicas)
