"""OpenAI's own SDK against a metier server: chats, streams, types, tools and responses, as in its quick start.

metier serve examples/solve_and_check.py
make clients && .venv-clients/bin/python examples/clients/openai_sdk.py http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel

MODEL = "base"
QUESTION = "What is the weather in Bern?"
HELLO: Any = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": QUESTION}]


class Weather(BaseModel):
    city: str


class Report(BaseModel):
    sunny: bool


def main(base_url: str) -> None:
    """One of each, printed as JSON."""
    client = OpenAI(base_url=base_url, api_key=os.environ.get("METIER_API_KEY", "none"))
    chat = client.chat.completions
    whole = chat.create(model=MODEL, messages=HELLO)
    pieces = chat.create(model=MODEL, messages=HELLO, stream=True)
    typed = chat.parse(model=MODEL, messages=HELLO, response_format=Report)
    said = client.responses.create(model=MODEL, instructions="Be brief.", input=QUESTION)
    with client.responses.stream(model=MODEL, input=QUESTION) as events:
        streamed = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    parsed = client.responses.parse(model=MODEL, input=QUESTION, text_format=Report)
    print(
        json.dumps(
            {
                "chat": whole.choices[0].message.content,
                "stream": "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices),
                "typed": typed.choices[0].message.parsed.model_dump(),
                "tools": with_tools(client),
                "response": said.output_text,
                "response_tools": response_with_tools(client),
                "response_stream": streamed,
                "response_typed": parsed.output_parsed.model_dump(),
            }
        )
    )


def with_tools(client: OpenAI) -> str:
    """Make the calls that the model wants, and send their results with its own message before them."""
    messages = list(HELLO)
    tools = [pydantic_function_tool(Weather)]
    reply = client.chat.completions.parse(model=MODEL, messages=messages, tools=tools).choices[0].message
    messages.append(reply)
    for call in reply.tool_calls or ():
        result = f"sunny in {call.function.parsed_arguments.city}"
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return client.chat.completions.create(model=MODEL, messages=messages, tools=tools).choices[0].message.content or ""


def response_with_tools(client: OpenAI) -> str:
    """The same by responses: their items are sent back as they came."""
    parameters = Weather.model_json_schema()
    tools: Any = [{"type": "function", "name": "weather", "parameters": parameters}]
    items: Any = [{"role": "user", "content": QUESTION}]
    reply = client.responses.create(model=MODEL, input=items, tools=tools)
    items += reply.output
    for item in reply.output:
        if item.type == "function_call":
            result = f"sunny in {json.loads(item.arguments)['city']}"
            items.append({"type": "function_call_output", "call_id": item.call_id, "output": result})
    return client.responses.create(model=MODEL, input=items, tools=tools).output_text


if __name__ == "__main__":
    main(sys.argv[1])
