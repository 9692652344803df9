"""What the `model` of a request may name: a workflow, a role of one, or a variant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...agents.errors import did_you_mean
from ...agents.graphs.nodes import BuiltGraph
from ...agents.roles import Role
from ...router.assignment import BASE
from .error_replies import RequestRefused

__all__ = ["ServedModels", "ServedRole", "ServedVariant", "ServedWorkflow"]


@dataclass(frozen=True)
class ServedWorkflow:
    """A whole workflow: one message in, its output back. `reference` is where it was read from (`file.py:name`)."""

    graph: BuiltGraph
    reference: str = ""


@dataclass(frozen=True)
class ServedRole:
    """One role, asked in its own prompt and served by the variant it is assigned to."""

    role: Role
    workflow: str


@dataclass(frozen=True)
class ServedVariant:
    """A variant, or the base (None), given the messages as they are."""

    variant: str | None


Served = ServedWorkflow | ServedRole | ServedVariant


class ServedModels:
    """Names and what they stand for.

    A plain name is a workflow, else a role, else a variant. `workflow:`, `role:` and `variant:` before it say which,
    and `WORKFLOW/ROLE` is a role of one workflow where two have one of that name which differ.
    """

    def __init__(self, workflows: Sequence[ServedWorkflow], variants: Iterable[str | None]) -> None:
        self.workflows = {served.graph.name: served for served in workflows}
        self._names: dict[str, Served] = {}
        self._explicit: dict[str, Served] = {}
        roles: dict[str, list[ServedRole]] = {}
        for served in workflows:
            self._add("workflow", served.graph.name, served)
            for role in served.graph.roles().values():
                roles.setdefault(role.name, []).append(ServedRole(role, served.graph.name))
        for name, same in roles.items():
            if all(other.role == same[0].role for other in same):
                self._add("role", name, same[0])
            for one in same:
                self._explicit[f"{one.workflow}/{name}"] = one
        for variant in sorted({name or BASE for name in variants} | {BASE}):
            self._add("variant", variant, ServedVariant(None if variant == BASE else variant))
        self.roles = frozenset(roles)

    def _add(self, kind: str, name: str, served: Served) -> None:
        self._names.setdefault(name, served)
        self._explicit[f"{kind}:{name}"] = served

    def find(self, name: str) -> Served:
        """What a name stands for; raises RequestRefused (404) that names what there is."""
        found = self._names.get(name) or self._explicit.get(name)
        if found is None:
            raise RequestRefused(
                f"model {name[:100]!r} is not served",
                status=404,
                code="model_not_found",
                param="model",
                expected=f"one of {', '.join(self.names())}",
                remedy=did_you_mean(name, [*self._names, *self._explicit], ""),
            )
        return found

    def names(self) -> list[str]:
        """The shortest name of everything that is served."""
        named = {id(served) for served in self._names.values()}
        hidden = [
            name
            for name, served in self._explicit.items()
            if id(served) not in named and (isinstance(served, ServedRole) or not name.startswith("role:"))
        ]
        return [*self._names, *hidden]

    def workflow(self, name: str) -> ServedWorkflow:
        """A workflow by its plain name; raises RequestRefused (404) that names those there are."""
        if name not in self.workflows:
            raise RequestRefused(
                f"workflow {name[:100]!r} is not served",
                status=404,
                code="workflow_not_found",
                param="workflow",
                expected=f"one of {', '.join(self.workflows) or 'none'}",
            )
        return self.workflows[name]
