"""An existing function, and an existing LangChain runnable, as steps of a metier workflow.

    make clients && .venv-clients/bin/python examples/clients/runnable_step.py

A function is a step as it is: its annotations say what it takes and gives. A runnable needs one line around it, since
it has no annotations of its own.
"""

from __future__ import annotations

import anyio
from langchain_core.runnables import RunnableLambda
from pydantic import BaseModel

from metier.agents import Role, ScriptedBackend, TaskGraph
from metier.runtime import open_session


class Puzzle(BaseModel):
    text: str


class Clean(BaseModel):
    text: str


class Answer(BaseModel):
    value: int


class Shown(BaseModel):
    text: str


existing = RunnableLambda(lambda text: text.strip().lower()) | RunnableLambda(lambda text: text.replace("?", ""))


async def clean(puzzle: Puzzle) -> Clean:
    """The runnable, with types."""
    return Clean(text=await existing.ainvoke(puzzle.text))


def show(answer: Answer) -> Shown:
    """A function of the user's own, unchanged."""
    return Shown(text=f"{answer.value} legs")


solver = Role("solver", takes=Clean, gives=Answer, instructions="Count the legs.")

graph = TaskGraph("with-steps-of-others", takes=Puzzle, gives=Shown)
cleaned = graph.step(clean)
solved = graph.step(solver, after=cleaned)
graph.step(show, after=solved)


async def main() -> None:
    """Run it on a backend that needs no model."""
    backend = ScriptedBackend({"solver": lambda ask: Answer(value=16)})
    async with open_session(backend=backend, store=":memory:") as session:
        print((await session.run(graph, Puzzle(text="  3 Cows and 2 Ducks?  "))).text)
        assert "3 cows and 2 ducks" in backend.asks[0].messages[-1].content


if __name__ == "__main__":
    anyio.run(main)
