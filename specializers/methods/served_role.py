"""What a method needs to ask a role's rows of variants that are served: the role, its score, and a backend."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from pydantic import Field

from ...agents.backend import Backend
from ...agents.errors import RecipeError
from ...agents.frozen_model import FrozenModel
from ...agents.roles import Role
from ...agents.user_code import load_named
from .method import Job
from .role_quality import Score, same_answer

__all__ = ["NAMED", "RoleSettings", "ServedRole", "served_role"]

NAMED = r"^[^:]+\.py:[A-Za-z_]\w*$"


class RoleSettings(FrozenModel):
    """The role that a method asks, and how its answers are scored."""

    role: str = Field(pattern=NAMED)
    """`file.py:name` of the Role whose asks the recipe's `data` holds, relative to the recipe's folder."""

    score: str | None = Field(default=None, pattern=NAMED)
    """`file.py:function`, called with the row and the typed answer, 0 to 1. Without it an answer that equals the row's
    own scores 1."""


@dataclass(frozen=True)
class ServedRole:
    """A role, how its answers are scored, the served variant to start from, and how to open the backend."""

    role: Role
    score: Score
    parent: str
    backend: AbstractAsyncContextManager[Backend]


def served_role(
    method: str, role: str, score: str | None, job: Job, *, backend: AbstractAsyncContextManager[Backend] | None = None
) -> ServedRole:
    """Load what `RoleSettings` name, and find the backend, unless one is given that serves what the method needs.

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
            remedy="Make it with `metier make`, or pass a backend.",
        )
    found = load_named(job.folder, role, f"{method}.role {role!r}", "role", lambda value: isinstance(value, Role))
    assert isinstance(found, Role)
    others = {row.role for row in job.rows} - {found.name}
    if others:
        raise RecipeError(
            f"method {method!r}: data has rows of {', '.join(sorted(others))}",
            expected=f"rows of the role {found.name!r} only",
            remedy="Name the role's own rows (`role:` chooses them from a traffic file).",
        )
    scores: Score = same_answer
    if score is not None:
        scores = load_named(job.folder, score, f"{method}.score {score!r}", "function", callable)
    return ServedRole(found, scores, job.parent or "base", serves)
