"""A pydantic-ai agent with a tool and a type of its own, whose model is a variant of a metier server.

metier serve examples/solve_and_check.py
make clients && .venv-clients/bin/python examples/clients/pydantic_ai_tools.py http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import json
import os
import sys

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is the weather in Bern?"


class Report(BaseModel):
    sunny: bool


def weather(city: str) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


def main(base_url: str) -> None:
    """Text, a tool and a type, and the responses API, printed as JSON."""
    provider = OpenAIProvider(base_url=base_url, api_key=os.environ.get("METIER_API_KEY", "none"))
    model = OpenAIChatModel("base", provider=provider)
    text = Agent(model, instructions="Be brief.").run_sync(QUESTION)
    again = Agent(model).run_sync(QUESTION, message_history=text.all_messages())
    typed = Agent(model, output_type=Report, tools=[weather]).run_sync(QUESTION)
    response = Agent(OpenAIResponsesModel("base", provider=provider), instructions="Be brief.").run_sync(QUESTION)
    printed = {"chat": text.output, "again": again.output, "typed": typed.output.model_dump()}
    print(json.dumps(printed | {"response": response.output}))


if __name__ == "__main__":
    main(sys.argv[1])
