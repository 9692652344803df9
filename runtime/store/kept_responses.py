"""Responses that a server keeps, so that a client can go on from one, fetch it again, or have it deleted."""

from __future__ import annotations

from dataclasses import dataclass

from .store import RunStore

__all__ = ["KeptResponse", "KeptResponses"]

DAY_S = 86_400


@dataclass(frozen=True)
class KeptResponse:
    """One response: `body` as it was sent, `messages` all that was said until its answer; both are JSON text.

    `owner` stands for the key of the client, "" where the server has none.
    """

    id: str
    owner: str
    created_at: float
    messages: str
    body: str


class KeptResponses:
    """The responses of a run store: at most `most` of them, and none older than `days`."""

    def __init__(self, store: RunStore, most: int, days: float) -> None:
        self._store = store
        self._most = most
        self._days = days

    def add(self, response: KeptResponse) -> None:
        """Keep a response; those that are too old or too many by now are deleted, oldest first."""
        with self._store.transaction() as db:
            db.execute(
                "INSERT INTO responses (id, owner, created_at, messages, body) VALUES (?, ?, ?, ?, ?)",
                (response.id, response.owner, response.created_at, response.messages, response.body),
            )
            db.execute("DELETE FROM responses WHERE created_at < ?", (response.created_at - self._days * DAY_S,))
            db.execute("DELETE FROM responses WHERE rowid <= (SELECT max(rowid) FROM responses) - ?", (self._most,))

    def get(self, id: str, owner: str) -> KeptResponse | None:
        """A response of this owner; None when there is none, or it is another's."""
        rows = self._store.query("SELECT * FROM responses WHERE id = ? AND owner = ?", id, owner)
        return KeptResponse(**dict(rows[0])) if rows else None

    def delete(self, id: str, owner: str) -> bool:
        """Delete a response of this owner; whether there was one. Those that went on from it keep what was said."""
        with self._store.transaction() as db:
            deleted = db.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (id, owner))
            return deleted.rowcount > 0
