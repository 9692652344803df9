"""The priority of one run's asks: what the graph says it still has before it, and what it has had so far."""

from __future__ import annotations

from dataclasses import dataclass

from ..agents.messages import Usage
from ..router.priority import PrioritySettings, order_key_s, priority_of
from .remaining_path import RemainingPath

__all__ = ["AttainedService", "RunPriority"]


@dataclass
class AttainedService:
    """Computed tokens per ask over all runs of a session, which turns a run's tokens into asks' worth of work."""

    tokens: int = 0
    asks: int = 0

    def note(self, tokens: int) -> None:
        """An ask was answered."""
        self.tokens += tokens
        self.asks += 1

    def asks_worth(self, tokens: int) -> float:
        """How many average asks `tokens` are; 0 before the first one."""
        return tokens * self.asks / self.tokens if self.tokens else 0.0


class RunPriority:
    """Gives the asks of one run their priority; `began_s` is when it began, on the session's clock.

    Attained service is counted in tokens that had to be computed (prompt without what was cached, and output), since
    every backend reports them. A resumed run begins anew: what it had before it was stopped holds nobody up now.
    """

    def __init__(
        self, path: RemainingPath, settings: PrioritySettings, session: AttainedService, *, began_s: float
    ) -> None:
        self._path = path
        self._settings = settings
        self._session = session
        self._began_s = began_s
        self._tokens = 0

    def of(self, step_path: str) -> int:
        """The engine priority of an ask at a step; the smallest goes first."""
        attained_s = self._session.asks_worth(self._tokens) * self._settings.ask_s
        return priority_of(order_key_s(self._began_s, self._path.at(step_path), attained_s, self._settings))

    def note(self, usage: Usage) -> None:
        """An ask of this run was answered."""
        tokens = usage.prefilled_tokens + usage.output_tokens
        self._tokens += tokens
        self._session.note(tokens)
