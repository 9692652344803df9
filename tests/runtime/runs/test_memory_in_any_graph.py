"""Memory in graphs drawn at random: what is shown was over before, and does not depend on who is faster."""

from __future__ import annotations

import random
from itertools import count

import anyio
import pytest
from pydantic import BaseModel

from metier.agents import Ask, Role, ScriptedBackend, StepRef, TaskGraph
from metier.runtime import open_session

pytestmark = pytest.mark.anyio

GRAPHS = 12


class Tree(BaseModel):
    text: str = ""
    items: list[Tree] = []


speaker = Role("speaker", takes=Tree, gives=str, memory=True, memory_tokens=100_000)
TREE = Tree(items=[Tree(items=[Tree(), Tree(text="a")]), Tree(text="b", items=[Tree(text="c")])])


def draw(chance: random.Random, depth: int, numbers: count[int]) -> TaskGraph:
    """Steps of one role beside and behind each other, in loops, maps and sub-graphs."""
    graph = TaskGraph(f"g{next(numbers)}", takes=Tree, gives=str)

    def body(depth: int) -> None:
        before: list[StepRef] = []
        for _ in range(chance.randint(1, 3)):
            name, after = f"s{next(numbers)}", tuple(step for step in before if chance.random() < 0.5)
            kind = chance.choice(["step", "step", "loop", "map", "graph", "graphs"]) if depth else "step"
            items = graph.input.field("items")
            if kind == "loop":
                with graph.loop(name, max_rounds=chance.randint(1, 3), after=after) as loop:
                    body(depth - 1)
                before.append(loop)
            elif kind in ("map", "graphs"):
                work = speaker if kind == "map" else draw(chance, depth - 1, numbers)
                before.append(graph.map(work, over=items, name=name, after=after))
            else:
                work = speaker if kind == "step" else draw(chance, depth - 1, numbers)
                before.append(graph.step(work, name=name, after=after))

    body(depth)
    graph.returns(graph.step(speaker, name="last"))
    return graph


async def shown_in(graph: TaskGraph, order: int) -> dict[str, list[str]]:
    """Step → the steps whose turns it was shown, where steps that run together end in an order drawn at random."""
    chance, over = random.Random(order), set[str]()
    shown: dict[str, list[str]] = {}

    async def reply(ask: Ask) -> str:
        shown[ask.step_path] = [message.content for message in ask.messages if message.role == "assistant"]
        assert over.issuperset(shown[ask.step_path])
        for _ in range(chance.randint(0, 8)):
            await anyio.lowlevel.checkpoint()
        over.add(ask.step_path)
        return ask.step_path

    async with open_session(backend=ScriptedBackend(default=reply), store=":memory:") as session:
        await session.run(graph, TREE)
    return shown


async def test_what_is_shown_follows_from_the_graph() -> None:
    remembered = 0
    for seed in range(GRAPHS):
        graph = draw(random.Random(seed), 2, count())
        shown = await shown_in(graph, 1)
        assert shown == await shown_in(graph, 2)
        for path, turns in shown.items():
            assert path not in turns and len(set(turns)) == len(turns)
            assert all(set(shown[turn]) <= set(turns) for turn in turns), "who sees a turn sees what it had seen"
            remembered += len(turns)
    assert remembered > 100
