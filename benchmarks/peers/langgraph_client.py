"""The workflow in LangGraph: `langgraph_client.py BASE_URL`, orders on stdin."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from workflow import ROUNDS, SYSTEM, TOKENS_PER_ASK, Batch, model_of, obey, prompt


class State(TypedDict, total=False):
    brief: str
    batch: Batch
    plan: str
    draft: str
    critique: str
    rounds: int


def build(base_url: str) -> Any:
    """Plan once, then solve and criticise in rounds."""
    models = {
        role: ChatOpenAI(
            model=model_of(role),
            base_url=base_url,
            api_key="none",
            temperature=0,
            max_completion_tokens=TOKENS_PER_ASK,
            timeout=600,
        )
        for role in ("planner", "solver", "critic")
    }

    async def ask(role: str, batch: Batch, **inputs: str | None) -> str:
        reply = await models[role].ainvoke([("system", SYSTEM), ("user", prompt(role, inputs))])
        usage = reply.usage_metadata
        batch.count(usage["input_tokens"], usage["output_tokens"])
        return str(reply.content)

    async def plan(state: State) -> State:
        return {"plan": await ask("planner", state["batch"], brief=state["brief"])}

    async def solve(state: State) -> State:
        inputs = {"brief": state["brief"], "plan": state["plan"], "critique": state.get("critique")}
        return {"draft": await ask("solver", state["batch"], **inputs)}

    async def criticise(state: State) -> State:
        inputs = {name: state[name] for name in ("brief", "plan", "draft")}
        return {"critique": await ask("critic", state["batch"], **inputs), "rounds": state.get("rounds", 0) + 1}

    graph = StateGraph(State)
    # A node may not have the name of a field.
    graph.add_node("planner", plan)
    graph.add_node("solver", solve)
    graph.add_node("critic", criticise)
    graph.add_edge(START, "planner")
    graph.add_edge("planner", "solver")
    graph.add_edge("solver", "critic")
    graph.add_conditional_edges("critic", lambda state: END if state["rounds"] == ROUNDS else "solver")
    return graph.compile()


async def main(base_url: str) -> None:
    """Run batches until stdin ends."""
    graph = build(base_url)

    async def program(brief: str, batch: Batch) -> None:
        await graph.ainvoke({"brief": brief, "batch": batch})

    await obey(program)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
