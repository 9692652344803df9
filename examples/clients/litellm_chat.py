"""LiteLLM against a metier server: completion, stream, tools, types, and the responses API.

metier serve examples/solve_and_check.py
make clients && .venv-clients/bin/python examples/clients/litellm_chat.py http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it fetches a list of prices first

import litellm
from pydantic import BaseModel

HELLO = [{"role": "user", "content": "What is the weather in Bern?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather of a city.", "parameters": CITY}}]


class Report(BaseModel):
    sunny: bool


def main(base_url: str) -> None:
    """One of each, printed as JSON."""
    where = {"model": "openai/base", "api_base": base_url, "api_key": os.environ.get("METIER_API_KEY", "none")}

    def ask(messages: list[Any], **options: Any) -> Any:
        return litellm.completion(messages=messages, **where, **options)

    calling = ask(HELLO, tools=TOOLS, tool_choice="auto").choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"sunny in {json.loads(call.function.arguments)['city']}"}
        for call in calling.tool_calls
    ]
    pieces = ask(HELLO, stream=True)
    print(
        json.dumps(
            {
                "chat": ask(HELLO, temperature=0, max_tokens=50).choices[0].message.content,
                "stream": "".join(piece.choices[0].delta.content or "" for piece in pieces),
                "tools": ask([*HELLO, calling, *results], tools=TOOLS).choices[0].message.content,
                "typed": json.loads(ask(HELLO, response_format=Report).choices[0].message.content),
                "response": litellm.responses(input=HELLO[0]["content"], **where).output_text,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
