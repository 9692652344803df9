"""OpenAI's Agents SDK against a metier server: an agent, a tool, a handoff, a type, in both of its protocols.

metier serve examples/solve_and_check.py
make clients && .venv-clients/bin/python examples/clients/agents_sdk.py http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from openai import AsyncOpenAI
from pydantic import BaseModel

from agents import (  # noqa: TID251 - this is that SDK
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)

QUESTION = "What is the weather in Bern?"


class Report(BaseModel):
    sunny: bool


@function_tool
def weather(city: str) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


async def main(base_url: str) -> None:
    """One of each, printed as JSON."""
    set_tracing_disabled(True)  # traces would go to OpenAI
    client = AsyncOpenAI(base_url=base_url, api_key=os.environ.get("METIER_API_KEY", "none"))
    chats = OpenAIChatCompletionsModel(model="base", openai_client=client)
    responses = OpenAIResponsesModel(model="base", openai_client=client)
    streamed = Runner.run_streamed(Agent(name="a", instructions="Be brief.", model=responses), QUESTION)
    pieces = [
        event.data.delta
        async for event in streamed.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    answers = {
        "chat": await Runner.run(Agent(name="a", instructions="Be brief.", model=chats), QUESTION),
        "tools": await Runner.run(Agent(name="a", model=chats, tools=[weather]), QUESTION),
        "typed": await Runner.run(Agent(name="a", model=chats, output_type=Report), QUESTION),
        "response": await Runner.run(Agent(name="a", instructions="Be brief.", model=responses), QUESTION),
        "response_tools": await Runner.run(Agent(name="a", model=responses, tools=[weather]), QUESTION),
        "response_typed": await Runner.run(Agent(name="a", model=responses, output_type=Report), QUESTION),
    }
    printed = {name: answer.final_output for name, answer in answers.items()} | {"response_stream": "".join(pieces)}
    print(json.dumps(printed, default=lambda report: report.model_dump()))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
