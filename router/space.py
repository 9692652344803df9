"""What can be assigned: the parts of a workflow's roles, the candidates for each, and one choice for all parts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..agents.errors import AssignmentError
from ..agents.graphs.nodes import BuiltBody, BuiltGraph, GraphWork, LoopWork, RoleWork
from ..agents.thinking import ThinkingProfile
from .assignment import BASE, Assignment, RoleAssignment

__all__ = ["Candidate", "Choices", "Part", "RoundClass", "Space", "role_rounds", "space_of"]

RoundClass = Literal["all", "first", "later"]
_SIGNS: dict[RoundClass, str] = {"all": "", "first": "[1]", "later": "[2+]"}


@dataclass(frozen=True, order=True, slots=True)
class Part:
    """A role in a class of rounds: what gets one variant. Written `critic`, `critic[1]`, `critic[2+]`.

    >>> [str(part) for part in (Part("critic"), Part("critic", "first"), Part("critic", "later"))]
    ['critic', 'critic[1]', 'critic[2+]']
    """

    role: str
    rounds: RoundClass = "all"

    def __str__(self) -> str:
        return self.role + _SIGNS[self.rounds]

    def covers(self, role: str, round_number: int) -> bool:
        """Whether an ask of a role in a round belongs to this part."""
        return self.role == role and self.rounds in ("all", "first" if round_number == 1 else "later")


@dataclass(frozen=True, order=True, slots=True)
class Candidate:
    """A variant that may play a part, and how many tokens it may think at most; None leaves that to the role.

    Written `solver`, or `solver@64`; `@0` is thinking off.

    >>> Candidate.read("solver@64")
    Candidate(variant='solver', thinking_tokens=64)
    """

    variant: str = BASE
    thinking_tokens: int | None = None

    def __str__(self) -> str:
        return self.variant if self.thinking_tokens is None else f"{self.variant}@{self.thinking_tokens}"

    @classmethod
    def read(cls, text: str) -> Candidate:
        """Read `variant` or `variant@tokens`; raises AssignmentError for anything else."""
        found = re.fullmatch(r"([^@\s]+)(?:@(\d+))?", text.strip())
        if found is None:
            raise AssignmentError(
                f"candidate {text!r} cannot be read", expected="a variant, or variant@tokens of thinking"
            )
        return cls(found[1], None if found[2] is None else int(found[2]))


Choices = Mapping[Part, Candidate]
"""One candidate for every part."""


@dataclass(frozen=True)
class Space:
    """Every part of a workflow with its candidates; `rounds` is how many rounds each role may have.

    Raises: AssignmentError when a part has no candidate, or one twice.
    """

    parts: tuple[Part, ...]
    candidates: Mapping[Part, tuple[Candidate, ...]]
    rounds: Mapping[str, int]

    def __post_init__(self) -> None:
        for part in self.parts:
            names = self.candidates.get(part, ())
            if not names or len(set(names)) != len(names):
                raise AssignmentError(
                    f"part {part} has the candidates {', '.join(map(str, names)) or 'none'}",
                    expected="one or more, each once",
                )

    @property
    def size(self) -> int:
        """How many assignments there are."""
        total = 1
        for part in self.parts:
            total *= len(self.candidates[part])
        return total

    def uniform(self, candidate: Candidate) -> dict[Part, Candidate]:
        """The choice that gives every part the same candidate."""
        return {part: candidate for part in self.parts}

    def everywhere(self) -> list[Candidate]:
        """The candidates that every part has, in order."""
        first, *others = (self.candidates[part] for part in self.parts)
        return [c for c in first if all(c in other for other in others)]

    def read(self, assignment: Assignment) -> dict[Part, Candidate]:
        """What an assignment chooses for each part.

        Raises: AssignmentError when it distinguishes rounds after the first, which parts do not.
        """
        return {part: self._read_part(assignment, part) for part in self.parts}

    def _read_part(self, assignment: Assignment, part: Part) -> Candidate:
        given = assignment.roles.get(part.role)
        if given is None:
            return Candidate(assignment.default)
        last = self.rounds.get(part.role, 1)
        numbers = {"all": range(1, last + 1), "first": range(1, 2), "later": range(2, last + 1)}[part.rounds]
        plain = _thinking_maximum(given.thinking)
        by_round = {n: _thinking_maximum(profile) for n, profile in given.thinking_rounds.items()}
        found = {Candidate(given.rounds.get(n, given.variant), by_round.get(n, plain)) for n in numbers}
        if len(found) > 1:
            raise AssignmentError(
                f"the assignment gives {part} different variants: {', '.join(sorted(map(str, found)))}",
                expected="one variant in the first round and one in all later ones",
                remedy="Split rounds, or give these rounds the same variant.",
            )
        return found.pop()

    def assignment(
        self,
        choices: Choices,
        reasons: Mapping[Part, str] | None = None,
        ask_s: Mapping[str, float] | None = None,
    ) -> Assignment:
        """The assignment that makes a choice, each role with the reasons of its parts and the seconds of an ask.

        Raises: AssignmentError when the choice lacks a part of the workflow.
        """
        missing = [str(part) for part in self.parts if part not in choices]
        if missing:
            raise AssignmentError(f"nothing is chosen for {', '.join(missing)}", expected="one candidate a part")
        roles: dict[str, Any] = {}
        for part in self.parts:
            chosen, role = choices[part], roles.setdefault(part.role, {"rounds": {}})
            reason = (reasons or {}).get(part, "")
            if part.rounds == "later":
                self._add_later_rounds(role, part, chosen)
                if reason:
                    role["reason"] = f"{role.get('reason', '')}; later rounds: {reason}".removeprefix("; ")
                continue
            role["variant"] = chosen.variant
            if chosen.thinking_tokens is not None:
                role["thinking"] = chosen.thinking_tokens
            if reason:
                role["reason"] = reason
        for name, seconds in (ask_s or {}).items():
            roles[name]["expected_s"] = round(seconds, 4)
        return Assignment(roles={name: RoleAssignment.model_validate(role) for name, role in roles.items()})

    def _add_later_rounds(self, role: dict[str, Any], part: Part, chosen: Candidate) -> None:
        numbers = range(2, self.rounds[part.role] + 1)
        if chosen.variant != role["variant"]:
            role["rounds"] = {n: chosen.variant for n in numbers}
        if chosen.thinking_tokens is not None and chosen.thinking_tokens != role.get("thinking"):
            role["thinking_rounds"] = {n: chosen.thinking_tokens for n in numbers}
        elif chosen.thinking_tokens is None and "thinking" in role:
            role["thinking_rounds"] = {1: role.pop("thinking")}


def space_of(graph: BuiltGraph, candidates: Sequence[Candidate], *, split_rounds: bool = True) -> Space:
    """All candidates for every part of a workflow; with `split_rounds` first and later rounds are parts apart."""
    rounds = role_rounds(graph)
    parts: list[Part] = []
    for role, count in rounds.items():
        parts += [Part(role, "first"), Part(role, "later")] if split_rounds and count > 1 else [Part(role)]
    return Space(tuple(parts), {part: tuple(candidates) for part in parts}, rounds)


def role_rounds(graph: BuiltGraph) -> dict[str, int]:
    """How many rounds each role may play: the limit of the loop right around it, 1 outside of loops."""
    rounds: dict[str, int] = {}
    for role, count in _walk(graph.body, 1):
        rounds[role] = max(count, rounds.get(role, 1))
    return rounds


def _walk(body: BuiltBody, count: int) -> Iterator[tuple[str, int]]:
    for node in body.nodes:
        match node.work:
            case RoleWork(role):
                yield role.name, count
            case LoopWork():
                yield from _walk(node.work.body, node.work.max_rounds)
            case GraphWork(graph):
                yield from _walk(graph.body, 1)


def _thinking_maximum(profile: ThinkingProfile | None) -> int | None:
    return None if profile is None else profile.max_tokens
