"""Router: which variant answers this ask, and why."""

from __future__ import annotations

from dataclasses import dataclass

from ..agents.messages import Ask
from ..agents.thinking import ThinkingProfile
from .assignment import BASE, Assignment, RoleAssignment
from .escalation import NO_FAILURES, Failures, climb

__all__ = ["Route", "Router"]


@dataclass(frozen=True, slots=True)
class Route:
    """Where an ask goes: the variant (None is the base itself) and the reason, kept with the ask.

    `thinking` is how long the assignment lets it think, None where that is left to the role. An answer whose mean
    log-probability is below `min_logprob` is asked for again one level up; None where the ladder has no such rule or
    ends. `climbs` is how many levels above its ladder's first the ask is.
    """

    variant: str | None
    reason: str
    thinking: ThinkingProfile | None = None
    min_logprob: float | None = None
    climbs: int = 0

    def send(self, ask: Ask) -> Ask:
        """The ask with what was decided about it."""
        decided = {"variant": self.variant, "thinking": self.thinking}
        update: dict[str, object] = {name: value for name, value in decided.items() if value is not None}
        if self.min_logprob is not None:
            update["confidence"] = True
        return ask.model_copy(update=update) if update else ask


class Router:
    """Sends every ask to the variant its role and round are assigned to; reads, never measures.

    >>> from metier.agents import Ask
    >>> from metier.router import Assignment
    >>> router = Router(Assignment(roles={"solver": {"variant": "solver-lora", "rounds": {2: "base"}}}))
    >>> ask = Ask(run_id="r1", step_path="solver", role="solver", messages=())
    >>> router.route(ask).variant, router.route(ask.model_copy(update={"round": 2})).variant
    ('solver-lora', None)
    """

    def __init__(self, assignment: Assignment | None = None) -> None:
        self.assignment = assignment or Assignment()
        self._routes: dict[tuple[str, int], Route] = {}

    def route(self, ask: Ask, failures: Failures = NO_FAILURES) -> Route:
        """Choose for one ask: the same role, round and failures always get the same."""
        assigned = self.assignment.roles.get(ask.role)
        if assigned is not None and assigned.ladder:
            return _on_ladder(ask.role, ask.round, assigned, failures)
        return self.expect(ask.role, ask.round)

    def expect(self, role: str, round_number: int) -> Route:
        """What a role's later ask in a round will get, if no failure but the rounds before it is counted."""
        key = (role, round_number)
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._decide(*key)
        return route

    def _decide(self, role: str, round_number: int) -> Route:
        assigned = self.assignment.roles.get(role)
        if assigned is not None and assigned.ladder:
            return _on_ladder(role, round_number, assigned, Failures(rejected=round_number - 1))
        thinking = None if assigned is None else assigned.thinking_rounds.get(round_number, assigned.thinking)
        if assigned is None:
            variant, reason = self.assignment.default, f"role {role!r} is not assigned: default"
        elif round_number in assigned.rounds:
            variant, reason = assigned.rounds[round_number], f"assigned to {role!r} in round {round_number}"
        else:
            variant, reason = assigned.variant, assigned.reason or f"assigned to {role!r}"
        return Route(None if variant == BASE else variant, reason, thinking)


def _on_ladder(role: str, round_number: int, assigned: RoleAssignment, failures: Failures) -> Route:
    limit = assigned.climb_limit
    climbs = climb(failures, assigned.climb_on, limit)
    variant, thinking = assigned.level(climbs)
    reason = _why(role, round_number, assigned, failures, climbs)
    threshold = assigned.min_logprob if climbs < limit else None  # the last level
    return Route(None if variant == BASE else variant, reason, thinking, threshold, climbs)


def _why(role: str, round_number: int, assigned: RoleAssignment, failures: Failures, climbs: int) -> str:
    """The last failure that counts and what it changed: `round 2: critic said no, level 1 → 2: thinking 64 → 256`."""
    causes = assigned.climb_on
    if failures.unsure and "unsure" in causes:
        said = "the answer was unsure"
        if failures.logprob is not None:
            said = f"mean log-probability {failures.logprob:.2f} below {assigned.min_logprob:g}"
    elif failures.unparsed and "unparsed" in causes:
        said = "no reply that parses"
    elif failures.rejected and "rejected" in causes:
        said = f"{failures.rejected_by or 'round ' + str(round_number - 1)} said no"
    else:
        return assigned.reason or f"assigned to {role!r}, level 1"
    counted = sum(getattr(failures, cause) for cause in causes)
    if counted > climbs:
        return f"round {round_number}: {said}, stays on level {climbs + 1}: max_climbs is {climbs}"
    (was, thought), (now, thinks) = assigned.level(climbs - 1), assigned.level(climbs)
    changes = [f"variant {was} → {now}"] if was != now else []
    changes += [f"thinking {_short(thought)} → {_short(thinks)}"] if thought != thinks else []
    return f"round {round_number}: {said}, level {climbs} → {climbs + 1}: {', '.join(changes)}"


def _short(profile: ThinkingProfile | None) -> str:
    if profile is None:
        return "as the role says"
    if profile.off:
        return "off"
    more = f" (at least {profile.min_tokens})" if profile.min_tokens else ""
    more += f" with {profile.waits} waits" if profile.waits else ""
    return f"{profile.max_tokens}{more}"
