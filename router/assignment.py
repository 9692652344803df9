"""The assignment: which variant plays which role, round by round, as a file people can read and edit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from ..agents.errors import AssignmentError, SettingsError, did_you_mean
from ..agents.frozen_model import FrozenModel
from ..agents.text_files import read_yaml_mapping
from ..agents.thinking import ThinkingProfile
from .escalation import ClimbCause, EscalationLevel

__all__ = ["Assignment", "RoleAssignment", "load_assignment"]

BASE = "base"
"""Name of the base model itself, used in place of a variant's."""


class RoleAssignment(FrozenModel):
    """The variant of one role, and how that changes by round or after failures.

    >>> from metier.router import EscalationLevel
    >>> plain = RoleAssignment(variant="solver-lora", rounds={2: "base"}, reason="second tries are short")
    >>> levels = (EscalationLevel(thinking=64), EscalationLevel(thinking=256))
    >>> climbs = RoleAssignment(ladder=levels, climb_on=("rejected",))
    >>> climbs.level(1)[1].max_tokens
    256
    """

    variant: str = BASE
    """Name of the variant that plays the role."""

    rounds: dict[int, str] = {}
    """Other variants for particular rounds of a loop, counted from 1."""

    thinking: ThinkingProfile | None = None
    """How long the role thinks, whatever the role says itself."""

    thinking_rounds: dict[int, ThinkingProfile] = {}
    """Other lengths of thinking for particular rounds."""

    ladder: tuple[EscalationLevel, ...] = ()
    """Levels of escalation. The role begins on the first and goes up one for each failure named in `climb_on`."""

    climb_on: tuple[ClimbCause, ...] = ()
    """Kinds of failure that climb: `rejected`, `unparsed`, `unsure`."""

    max_climbs: int | None = Field(default=None, ge=1)
    """How many levels up at most. None is to the last level."""

    min_logprob: float | None = Field(default=None, le=0, allow_inf_nan=False)
    """Mean log-probability (nats a token, at most 0) below which an answer is unsure."""

    expected_s: float | None = Field(default=None, gt=0)
    """Seconds that one of the role's asks takes, where that is known. Runs are ordered by it."""

    reason: str = ""
    """Why this variant was chosen; for people."""

    @field_validator("rounds", "thinking_rounds")
    @classmethod
    def _rounds_count_from_one(cls, rounds: dict[int, Any]) -> dict[int, Any]:
        if any(number < 1 for number in rounds):
            raise ValueError(f"rounds count from 1, got {min(rounds)}")
        return rounds

    @field_validator("ladder", mode="before")
    @classmethod
    def _accept_variants_as_levels(cls, ladder: Any) -> Any:
        if not isinstance(ladder, list | tuple):
            return ladder
        return [{"variant": level} if isinstance(level, str) else level for level in ladder]

    @model_validator(mode="after")
    def _check_ladder(self) -> Self:
        if not self.ladder:
            for name in ("climb_on", "max_climbs", "min_logprob"):
                if getattr(self, name) not in ((), None):
                    raise ValueError(f"{name} without a ladder climbs nowhere; give the role `ladder: [...]`")
            return self
        if len(self.ladder) < 2:
            raise ValueError("a ladder of one level has nothing to climb to; write two or more, the first one included")
        if not self.climb_on or len(set(self.climb_on)) < len(self.climb_on):
            raise ValueError("a ladder needs climb_on, each of rejected, unparsed, unsure at most once")
        if self.rounds or self.thinking_rounds:
            raise ValueError("ladder and rounds (or thinking_rounds) both say what later rounds get; leave one out")
        if ("unsure" in self.climb_on) != (self.min_logprob is not None):
            raise ValueError("climb_on: [unsure] and min_logprob need each other")
        if self.max_climbs is not None and self.max_climbs >= len(self.ladder):
            raise ValueError(
                f"max_climbs={self.max_climbs} with {len(self.ladder)} levels; at most one less than levels"
            )
        full = [self.level(climbs) for climbs in range(len(self.ladder))]
        if any(lower == upper for lower, upper in zip(full, full[1:], strict=False)):
            raise ValueError("two levels that follow each other are the same")
        return self

    def level(self, climbs: int) -> tuple[str, ThinkingProfile | None]:
        """Variant and thinking of the level that is `climbs` above the first."""
        level = self.ladder[climbs]
        return level.variant or self.variant, self.thinking if level.thinking is None else level.thinking

    @property
    def climb_limit(self) -> int:
        """How many levels above the first an ask may be."""
        return len(self.ladder) - 1 if self.max_climbs is None else self.max_climbs


class Assignment(FrozenModel):
    """(role, round) to variant; roles that are not named get `default`.

    In YAML a role is either the name of a variant, or a mapping with `variant`, `rounds`, `thinking`,
    `thinking_rounds`, a ladder and `reason`; a number of thinking is its maximum in tokens:

        roles:
          planner: planner-lora
          solver: {variant: solver-lora, rounds: {2: base}, reason: second tries are short}
          writer: {ladder: [{thinking: 64}, {thinking: 256}], climb_on: [rejected]}
          critic: {thinking: off, thinking_rounds: {2: 64, 3: {max_tokens: 128, min_tokens: 32, waits: 1}}}

    >>> Assignment(roles={"solver": "solver-lora"}).roles["solver"].variant
    'solver-lora'
    """

    roles: dict[str, RoleAssignment] = {}
    """What each role gets, by the role's name."""

    default: str = BASE
    """Variant of the roles that are not named."""

    @field_validator("roles", mode="before")
    @classmethod
    def _accept_plain_names(cls, roles: Any) -> Any:
        if not isinstance(roles, dict):
            return roles
        return {role: {"variant": v} if isinstance(v, str) else v for role, v in roles.items()}

    def names(self) -> list[str | None]:
        """All variants that may be asked for, in a stable order: names, None for the base."""
        return _in_order({self.default, *self._named()})

    def expected_names(self) -> list[str | None]:
        """As `names`, without the default where it was not set: a file that names every role does not need it."""
        named = self._named()
        return _in_order({self.default, *named} if "default" in self.model_fields_set or not named else named)

    def _named(self) -> set[str]:
        named = set()
        for role in self.roles.values():
            levels = (
                {role.level(climbs)[0] for climbs in range(role.climb_limit + 1)} if role.ladder else {role.variant}
            )
            named |= {*levels, *role.rounds.values()}
        return named

    def variants(self) -> set[str]:
        """Every variant that may be asked for; the base is not one."""
        return {name for name in self.names() if name is not None}

    def check_roles(self, roles: Iterable[str]) -> None:
        """Raise AssignmentError when a role is assigned that the workflow does not have."""
        known = sorted(roles)
        for role in self.roles:
            if role not in known:
                raise AssignmentError(
                    f"the assignment names the unknown role {role!r}",
                    expected=f"one of {', '.join(known) or 'none: the workflow has no roles'}",
                    remedy=did_you_mean(role, known, "Remove it from the assignment."),
                )

    def to_yaml(self) -> str:
        """The assignment as the text of its file."""
        roles = {name: role.model_dump(exclude_defaults=True) for name, role in self.roles.items()}
        default = {"default": self.default} if "default" in self.model_fields_set else {}
        return yaml.safe_dump({**default, "roles": roles}, sort_keys=False)


def _in_order(names: set[str]) -> list[str | None]:
    return [None if name == BASE else name for name in sorted(names)]


def load_assignment(path: Path | str) -> Assignment:
    """Read an assignment file; raises AssignmentError that names the field which is wrong."""
    data = read_yaml_mapping(Path(path), AssignmentError, "the assignment", "`roles:` in a YAML file")
    try:
        return Assignment.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise AssignmentError(
            f"{path}: {where}: {first['msg']}",
            expected="`roles:` with role: variant, or role: {variant, rounds, thinking, thinking_rounds, ladder, …}",
        ) from error
    except SettingsError as error:
        raise AssignmentError(f"{path}: {error.problem}", expected=error.expected, remedy=error.remedy) from error
