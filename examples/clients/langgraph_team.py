"""A LangGraph program whose nodes are roles of a metier server: nothing of metier is imported, only a base URL given.

    metier serve examples/solve_and_check.py --assignment examples/assignment.yaml --shelf examples/variants
    make clients && .venv-clients/bin/python examples/clients/langgraph_team.py http://127.0.0.1:8000/v1

Each node names a role as its model and sends the role's inputs as JSON; prompt, variant and answer type are the
server's business.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

MAX_ROUNDS = 3


class State(TypedDict, total=False):
    puzzle: str
    verdict: dict[str, Any]
    plan: dict[str, Any]
    answer: dict[str, Any]
    rounds: int


def build(base_url: str) -> Any:
    """Plan, solve, check, and again with the critic's reason."""

    def role(name: str) -> Any:
        model = ChatOpenAI(model=name, base_url=base_url, api_key=os.environ.get("METIER_API_KEY", "none"))
        return lambda **inputs: json.loads(model.invoke(json.dumps(inputs)).content)

    planner, solver, critic = role("planner"), role("solver"), role("critic")

    def plan(state: State) -> State:
        verdict = state.get("verdict")
        inputs = {"puzzle": state["puzzle"]} | ({"verdict": verdict} if verdict else {})
        return {"plan": planner(**inputs), "rounds": state.get("rounds", 0) + 1}

    def solve(state: State) -> State:
        return {"answer": solver(plan=state["plan"])}

    def check(state: State) -> State:
        return {"verdict": critic(puzzle=state["puzzle"], answer=state["answer"])}

    def again(state: State) -> str:
        return END if state["verdict"]["correct"] or state["rounds"] == MAX_ROUNDS else "plan"

    graph = StateGraph(State)
    for node in (plan, solve, check):
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "plan")
    graph.add_edge("plan", "solve")
    graph.add_edge("solve", "check")
    graph.add_conditional_edges("check", again)
    return graph.compile()


if __name__ == "__main__":
    final = build(sys.argv[1]).invoke({"puzzle": "3 cows and 2 ducks. How many legs?"})
    print(json.dumps({"answer": final["answer"], "rounds": final["rounds"]}))
