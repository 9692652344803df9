"""LangChain's ChatOpenAI against a metier server: invoke, stream, tools, types, and the responses API.

metier serve examples/solve_and_check.py
make clients && .venv-clients/bin/python examples/clients/langchain_chat.py http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import json
import os
import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Report(BaseModel):
    """A report of the weather."""

    sunny: bool


@tool
def weather(city: str) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


def main(base_url: str) -> None:
    """One of each, printed as JSON."""
    options = {"model": "base", "base_url": base_url, "api_key": os.environ.get("METIER_API_KEY", "none")}
    model = ChatOpenAI(temperature=0, **options)
    messages = [SystemMessage("Be brief."), HumanMessage("What is the weather in Bern?")]
    whole = model.invoke(messages)
    streamed = "".join(str(piece.content) for piece in model.stream(messages))
    with_tools = model.bind_tools([weather])
    calling = with_tools.invoke(messages)
    results = [weather.invoke(call) for call in calling.tool_calls]
    answered = with_tools.invoke([*messages, calling, *results])
    typed = [model.with_structured_output(Report, method=how) for how in ("json_schema", "function_calling")]
    print(
        json.dumps(
            {
                "chat": whole.content,
                "stream": streamed,
                "tools": answered.content,
                "typed": typed[0].invoke(messages).model_dump(),
                "by_call": typed[1].invoke(messages).model_dump(),
                "response": ChatOpenAI(use_responses_api=True, **options).invoke([*messages, whole, messages[-1]]).text,
                "tokens": whole.usage_metadata["total_tokens"],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
