"""Runs a workflow under one choice after another, each task once per choice, and counts the runs and asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..assignment import Assignment
from ..space import Candidate, Choices, Space
from .journal import Journal, record_key
from .outcomes import Outcome

__all__ = ["Counts", "Evaluator", "OnOutcome", "RunTasks"]

OnOutcome = Callable[[Outcome], None]


class RunTasks(Protocol):
    """Runs a workflow; what a session on real engines does for a probe, or a table of recorded scores."""

    async def __call__(self, assignment: Assignment, tasks: Sequence[str], on_outcome: OnOutcome) -> None:
        """Run the tasks of these ids under an assignment; pass on each outcome as soon as it is known, in any order."""
        ...


@dataclass
class Counts:
    """Counts: runs made, runs found in the journal, asks made, and asks reused within the runs made."""

    runs: int = 0
    recalled: int = 0
    asks: int = 0
    asks_reused: int = 0
    cpu_s: float = 0.0


class Evaluator:
    """Scores choices on tasks. Outcomes in the journal, also of an earlier process, are not run again.

    `tasks` maps the id of each task to a name of its content, and `variants` each variant to its content id (those
    not named keep their name); with `identity` (workflow, seed, engine settings) they make the key of a run.
    """

    def __init__(
        self,
        space: Space,
        tasks: Mapping[str, str],
        run: RunTasks,
        journal: Journal[Outcome],
        *,
        identity: str = "",
        variants: Mapping[str, str] | None = None,
        on_outcome: OnOutcome | None = None,
    ) -> None:
        self.space = space
        self.tasks = tasks
        self.counts = Counts()
        self._run = run
        self._journal = journal
        self._identity = identity
        self._variants = variants or {}
        self._on_outcome = on_outcome or (lambda outcome: None)
        self._counted: set[str] = set()

    async def outcomes(self, choices: Choices, tasks: Sequence[str]) -> list[Outcome]:
        """How each task ends under a choice, in the order of `tasks`.

        Raises: ProfileError for a score that is not from 0 to 1, and what running the workflow raises.
        """
        keys = self.keys(choices, tasks)
        missing = []
        for task, key in keys.items():
            if self._journal.get(key) is None:
                missing.append(task)
            elif key not in self._counted:
                self._counted.add(key)
                self.counts.recalled += 1

        def keep(outcome: Outcome) -> None:
            kept = outcome.model_copy(update={"key": keys[outcome.task]})
            self._journal.add(kept)
            self._counted.add(kept.key)
            self.counts.runs += 1
            self.counts.asks += sum(not ask.reused for ask in kept.asks)
            self.counts.asks_reused += sum(ask.reused for ask in kept.asks)
            self.counts.cpu_s += sum(ask.cpu_s for ask in kept.asks if not ask.reused)
            self._on_outcome(kept)

        if missing:
            await self._run(self.space.assignment(choices), missing, keep)
        found = [self._journal.get(key) for key in keys.values()]
        assert all(outcome is not None for outcome in found), "a run ended without an outcome"
        return [outcome for outcome in found if outcome is not None]

    async def scores(self, choices: Choices, tasks: Sequence[str]) -> list[float]:
        """The scores alone."""
        return [outcome.score for outcome in await self.outcomes(choices, tasks)]

    def keys(self, choices: Choices, tasks: Sequence[str]) -> dict[str, str]:
        """Task → the key of its run under a choice, in the journal."""
        return {task: self._key(choices, task) for task in tasks}

    def _key(self, choices: Choices, task: str) -> str:
        """Key of a run: the candidate of each role in its first and in later rounds, however parts are split."""
        assigned: dict[str, list[str]] = {}
        for part, chosen in choices.items():
            name = self._name(chosen)
            names = assigned.setdefault(part.role, ["", ""])
            if part.rounds != "later":
                names[0] = name
            if part.rounds != "first":
                names[1] = name
        return record_key(run=self._identity, task=self.tasks[task], cast=assigned)  # "cast": as journals have it

    def _name(self, chosen: Candidate) -> str:
        return str(Candidate(self._variants.get(chosen.variant, chosen.variant), chosen.thinking_tokens))
