"""Router: which variant answers this ask, and why."""

from __future__ import annotations

from dataclasses import dataclass

from ..agents.messages import Ask
from ..agents.thinking import ThinkingProfile
from .assignment import BASE, Assignment

__all__ = ["Route", "Router"]


@dataclass(frozen=True, slots=True)
class Route:
    """Where an ask goes: the variant (None is the base itself) and the reason, kept with the ask.

    `thinking` is how long the assignment lets it think, None where that is left to the role.
    """

    variant: str | None
    reason: str
    thinking: ThinkingProfile | None = None

    def send(self, ask: Ask) -> Ask:
        """The ask with what was decided about it."""
        decided = {"variant": self.variant, "thinking": self.thinking}
        update = {name: value for name, value in decided.items() if value is not None}
        return ask.model_copy(update=update) if update else ask


class Router:
    """Sends every ask to the variant its role and round are assigned to; reads, never measures."""

    def __init__(self, assignment: Assignment | None = None) -> None:
        self.assignment = assignment or Assignment()
        self._routes: dict[tuple[str, int], Route] = {}

    def route(self, ask: Ask) -> Route:
        """Choose the variant for one ask; asks of the same role and round always get the same."""
        return self.expect(ask.role, ask.round)

    def expect(self, role: str, round_number: int) -> Route:
        """What an ask that a role may yet make in a round will get."""
        key = (role, round_number)
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._decide(*key)
        return route

    def _decide(self, role: str, round_number: int) -> Route:
        assigned = self.assignment.roles.get(role)
        thinking = None if assigned is None else assigned.thinking_rounds.get(round_number, assigned.thinking)
        if assigned is None:
            variant, reason = self.assignment.default, f"role {role!r} is not assigned: default"
        elif round_number in assigned.rounds:
            variant, reason = assigned.rounds[round_number], f"assigned to {role!r} in round {round_number}"
        else:
            variant, reason = assigned.variant, assigned.reason or f"assigned to {role!r}"
        return Route(None if variant == BASE else variant, reason, thinking)
