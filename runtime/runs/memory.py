"""Memory: the turns of a run that a role is shown of itself, in the rounds of loops and at its other steps."""

from __future__ import annotations

from collections import defaultdict

from ...agents.errors import GraphError
from ...agents.graphs.nodes import BuiltBody, BuiltGraph
from ...agents.graphs.step_paths import StepPath
from ...agents.roles import Role
from ...agents.turns import Turn, kept_turns

__all__ = ["RunMemory", "check_memory"]


class RunMemory:
    """What the roles with memory asked and replied in one run.

    A step is shown the turns of its role that are over for certain when it begins: those of earlier rounds of every
    loop around it, and of steps that it waits for, also inside other loops and sub-graphs. So what is shown follows
    from the workflow and not from who was faster. Items of a fan-out do not see each other; in a later round each sees
    what was said at its own place.
    """

    def __init__(self, graph: BuiltGraph) -> None:
        self._body = graph.body
        self._turns: dict[tuple[str, str], dict[StepPath, Turn]] = defaultdict(dict)

    def keep(self, role: Role, path: StepPath, turn: Turn) -> None:
        """Remember the turn of a step that is done."""
        self._turns[role.name, _items(path)[-1]][path] = turn

    def earlier(self, role: Role, path: StepPath) -> tuple[Turn, ...]:
        """The turns that a step is shown, the oldest first; of those that are too long together the newest."""
        turns = {
            place: turn
            for items in _items(path)
            for other, turn in self._turns.get((role.name, items), {}).items()
            if (place := self._place_before(path, other)) is not None
        }
        return kept_turns((turns[place] for place in sorted(turns)), role.memory_tokens)

    def _place_before(self, path: StepPath, other: StepPath) -> tuple[tuple[int, int], ...] | None:
        """Where another step stands in the order of the run; None unless it is over for certain before this one."""
        body: BuiltBody | None = self._body
        over = False
        place: list[tuple[int, int]] = []
        for depth, step in enumerate(other.steps):
            assert body is not None
            place.append((body.places[step.name], step.round or 0))
            if not over:
                if depth >= len(path.steps):
                    return None
                mine = path.steps[depth]
                earlier_round = step.name == mine.name and (step.round or 0) < (mine.round or 0)
                over = earlier_round or step.name in body.over[mine.name]
                if not over and step != mine:
                    return None
            body = body[step.name].inner
        return tuple(place) if over else None


def _items(path: StepPath) -> list[str]:
    """The items of fan-outs that a step is in, outermost first, without rounds: `["", "team#2", "team#2/member#0"]`."""
    found, names = [""], []
    for step in path.steps:
        names.append(str(step._replace(round=None)))
        if step.item is not None:
            found.append("/".join(names))
    return found


def check_memory(graph: BuiltGraph, context_tokens: int) -> None:
    """Raise GraphError when a role's memory and its answer do not fit into the context together."""
    for role in graph.roles().values():
        answer = role.max_tokens + (0 if role.thinking is None else role.thinking.max_tokens)
        if role.memory and role.memory_tokens + answer >= context_tokens:
            raise GraphError(
                f"role {role.name!r} remembers up to memory_tokens={role.memory_tokens} and writes up to {answer} "
                f"tokens, and the engine's context has {context_tokens}",
                expected="room for both and the prompt",
                remedy="Lower memory_tokens, or raise engine.max_model_tokens if the model has the context for it.",
            )
