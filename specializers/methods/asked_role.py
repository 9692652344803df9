"""The role that a method asks: which one, how its answers are scored, and what serves the variant it is asked of."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from ...agents.backend import Backend
from ...agents.errors import RecipeError
from ...agents.frozen_model import FrozenModel
from ...agents.roles import Role
from ...agents.traffic import TrafficRow
from ...agents.user_code import load_named
from .method import Job
from .role_quality import Score, same_answer

__all__ = ["NAMED", "AskedRole", "RoleSettings", "asked_role"]

NAMED = r"^[^:]+\.py:[A-Za-z_]\w*$"
"""How recipes name what is in a user's own Python file: `file.py:name`."""


class RoleSettings(FrozenModel):
    """The role that a method asks, and how its answers are scored."""

    role: str = Field(pattern=NAMED)
    """`file.py:name` of the Role whose asks `data` holds, relative to the recipe's folder."""

    score: str | None = Field(default=None, pattern=NAMED)
    """`file.py:function`, called with the row and the typed answer, 0 to 1. Without it an answer that equals the row's
    own scores 1."""

    def load(self, folder: Path, rows: Iterable[TrafficRow], where: str) -> tuple[Role, Score]:
        """The role and its score, for rows of that role; `folder` is the recipe's, `where` begins every error.

        Raises: RecipeError when a name leads nowhere, or a row is of another role.
        """
        named = f"{where}role {self.role!r}"
        role = load_named(folder, self.role, named, "role", lambda value: isinstance(value, Role))
        assert isinstance(role, Role)
        others = {row.role for row in rows} - {role.name}
        if others:
            raise RecipeError(
                f"{where}data has rows of {', '.join(sorted(others))}",
                expected=f"rows of the role {role.name!r} only",
                remedy="Name the role's own rows (`role:` chooses them from a traffic file).",
            )
        if self.score is None:
            return role, same_answer
        score: Score = load_named(folder, self.score, f"{where}score {self.score!r}", "function", callable)
        return role, score


@dataclass(frozen=True)
class AskedRole:
    """A role, how its answers are scored, the served variant to start from, and how to open the backend."""

    role: Role
    score: Score
    parent: str
    backend: AbstractAsyncContextManager[Backend]


def asked_role(
    method: str, settings: RoleSettings, job: Job, *, backend: AbstractAsyncContextManager[Backend] | None = None
) -> AskedRole:
    """Load the role, and find the backend, unless one is given that serves what the method needs.

    Raises: RecipeError when a name, the rows or the place in the recipe do not fit, or nothing is served.
    """
    if job.parent is None and backend is None:
        raise RecipeError(
            f"method {method!r} asks a variant on the shelf, and this recipe has none to start from",
            expected="parent: a variant that was made before, and this method first",
            remedy="Make that variant by a recipe of its own, and name it as `parent`.",
        )
    serves = job.serve() if backend is None and job.serve is not None else backend
    if serves is None:
        raise RecipeError(
            f"method {method!r} asks a variant, and there is no backend that serves it",
            expected="open_backend=…",
            remedy="Make it with `metier make RECIPE.yaml`, or pass a backend.",
        )
    role, score = settings.load(job.folder, job.rows, f"method {method!r}: ")
    return AskedRole(role, score, job.parent or "base", serves)
