"""A workflow that is a table: known scores and costs for every assignment, for tests of search, probe and assign."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from metier.router import Assignment
from metier.router.probing.evaluator import OnOutcome
from metier.router.probing.outcomes import AskCost, Outcome
from metier.router.probing.profile import Footprint, Profile, TokenCost
from metier.router.space import Candidate, Part, Space

Works = Callable[[str, Mapping[str, str]], bool]


def chance(*words: object) -> float:
    """A number from 0 to 1 that is always the same for the same words."""
    digest = hashlib.sha256("|".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class TableRun:
    """Runs three roles one after the other: a task is solved when each role's variant can do its share of it."""

    def __init__(self, skill: Mapping[tuple[str, str], float], cpu_s: Mapping[str, float] | None = None) -> None:
        self.skill = skill
        self.cpu_s = cpu_s or {}
        self.calls: list[tuple[str, str]] = []

    async def __call__(self, assignment: Assignment, tasks: Sequence[str], on_outcome: OnOutcome) -> None:
        for task in tasks:
            cast = {role: given.variant for role, given in assignment.roles.items()}
            self.calls.append((task, str(sorted(cast.items()))))
            solved = all(chance(task, role) < self.skill[role, name] for role, name in cast.items())
            asks = tuple(
                AskCost(
                    role=role,
                    variant=name,
                    prompt_tokens=100,
                    answer_tokens=10,
                    cpu_s=self.cpu_s.get(name, 0.1),
                    seconds=0.2,
                    shared_tokens={f"{earlier}[1]": 60 for earlier in list(cast)[:number]},
                )
                for number, (role, name) in enumerate(cast.items())
            )
            on_outcome(Outcome(key="", task=task, score=float(solved), asks=asks))


def space(roles: Sequence[str] = ("planner", "solver", "critic"), variants: Sequence[str] = ("a", "b", "c")) -> Space:
    """Roles without rounds, with the same candidates each."""
    parts = tuple(Part(role) for role in roles)
    return Space(parts, {part: tuple(map(Candidate, variants)) for part in parts}, dict.fromkeys(roles, 1))


def task_ids(count: int) -> dict[str, str]:
    """Ids of tasks, each its own content."""
    return {f"t{number}": f"content {number}" for number in range(count)}


def profile(part: Part, variant: str, incumbent: str, **fields: object) -> Profile:
    """A profile with round numbers where a test does not care."""
    values: dict[str, object] = {
        "key": f"{part}/{variant}",
        "workflow": "w",
        "tasks": "t",
        "incumbent": incumbent,
        "role": part.role,
        "rounds": part.rounds,
        "variant": variant,
        "variant_id": variant,
        "n": 50,
        "quality": 0.8,
        "quality_interval": (0.7, 0.9),
        "asks": 1.0,
        "prompt_tokens": 100.0,
        "cpu_s": 0.1,
        "seconds": 0.2,
        "token_cost": TokenCost(prefill_cpu_s=1e-4, prefill_s=2e-4),
        "footprint": Footprint(checkpoint_mib=100),
    }
    return Profile.model_validate({**values, **fields})
