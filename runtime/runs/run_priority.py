"""The remaining time of a run: the longest chain of asks from a step to the end, read from the built graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...agents.graphs.nodes import BuiltBody, BuiltGraph, BuiltNode, GraphWork, LoopWork, RoleWork
from ...agents.graphs.step_paths import StepPath
from ...agents.messages import Usage
from ...router.priority import PrioritySettings, order_key_s, priority_of

__all__ = ["AttainedService", "RemainingPath", "RunPriority"]

KNOWN_LIMIT = 10_000
"""Places whose answer is kept; only very long loops have more."""


class RemainingPath:
    """Seconds of the longest chain of asks from each step to the end of the run, the step itself included.

    `seconds_of` is what one ask of a role takes. Loops count all the rounds they may have, conditions as if they held,
    and the items of a fan-out run side by side; functions and people count nothing.
    """

    def __init__(self, graph: BuiltGraph, seconds_of: Callable[[str], float]) -> None:
        self._graph = graph
        self._seconds_of = seconds_of
        self._bodies: dict[int, dict[str, float]] = {}
        self._known: dict[str, float] = {}

    def at(self, path: str) -> float:
        """Seconds from the step at `path` (`attempt[2]/critic`, `solve#3`) on."""
        known = self._known.get(path)
        if known is None:
            if len(self._known) >= KNOWN_LIMIT:
                self._known.clear()
            known = self._known[path] = self._look(StepPath.parse(path))
        return known

    def _look(self, at: StepPath) -> float:
        body, total = self._graph.body, 0.0
        for around in at.parent.steps:
            node = body[around.name]
            total += self._from(body)[node.name] - self._of(node)  # what follows the loop or the sub-graph
            assert node.inner is not None
            body = node.inner
            if isinstance(node.work, LoopWork):
                total += (node.work.max_rounds - (around.round or 1)) * self._longest(body)
        return total + self._from(body)[at.name]

    def _from(self, body: BuiltBody) -> dict[str, float]:
        """Node → seconds from its start to the end of its body."""
        known = self._bodies.get(id(body))
        if known is not None:
            return known
        found: dict[str, float] = {}

        def look(node: BuiltNode) -> float:
            if node.name not in found:
                found[node.name] = self._of(node) + max(
                    (look(after) for after in body.followers[node.name]), default=0.0
                )
            return found[node.name]

        for node in body.nodes:
            look(node)
        self._bodies[id(body)] = found
        return found

    def _longest(self, body: BuiltBody) -> float:
        return max(self._from(body).values(), default=0.0)

    def _of(self, node: BuiltNode) -> float:
        match node.work:
            case RoleWork(role=role):
                return self._seconds_of(role.name)
            case LoopWork(body=body, max_rounds=rounds):
                return rounds * self._longest(body)
            case GraphWork(graph=graph):
                return self._longest(graph.body)
            case _:
                return 0.0


@dataclass
class AttainedService:
    """Mean computed tokens per ask over all runs of a session, to convert a run's tokens into a number of asks."""

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
    every backend reports them. A resumed run starts at 0: what it had before it was stopped delays no other run now.
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
