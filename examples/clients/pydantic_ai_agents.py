"""pydantic-ai agents that are roles of a metier server: nothing of metier is imported, only a base URL given.

    metier serve examples/solve_and_check.py --assignment examples/assignment.yaml --shelf examples/variants
    make clients && .venv-clients/bin/python examples/clients/pydantic_ai_agents.py http://127.0.0.1:8000/v1

The role has its instructions on the server, so the agents have none. Their output types say what the roles give; the
last one asks for the whole workflow by its name.
"""

from __future__ import annotations

import json
import os
import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Plan(BaseModel):
    expression: str


class Answer(BaseModel):
    steps: str
    value: int


def main(base_url: str, puzzle: str) -> None:
    """Plan and solve with two roles, then let the server run the whole workflow."""
    provider = OpenAIProvider(base_url=base_url, api_key=os.environ.get("METIER_API_KEY", "none"))

    def agent(model: str, kind: type[BaseModel]) -> Agent[None, BaseModel]:
        output = NativeOutput(kind, template=False)
        return Agent(OpenAIChatModel(model, provider=provider), output_type=output)

    plan = agent("planner", Plan).run_sync(puzzle)
    solved = agent("solver", Answer).run_sync(plan.output.model_dump_json())
    whole = agent("solve-and-check", Answer).run_sync(puzzle)
    usage = solved.usage() if callable(solved.usage) else solved.usage
    print(
        json.dumps(
            {
                "plan": plan.output.model_dump(),
                "answer": solved.output.model_dump(),
                "workflow": whole.output.model_dump(),
                "input_tokens": usage.input_tokens,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], "3 cows and 2 ducks. How many legs?")
