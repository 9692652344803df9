"""Write docs/client-fields.md from the request models of the server: python scripts/write_client_fields_page.py.

What is done, dropped and refused is read from the code, so the page cannot differ from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from metier.agents.frozen_model import explanations
from metier.runtime.server.chat.chat_protocol import ChatMessage, ChatRequest, TextPart
from metier.runtime.server.chat.client_body import ClientBody, Unserved
from metier.runtime.server.chat.responses_protocol import ResponsesRequest, TextOptions
from metier.runtime.server.chat.thinking_requests import Reasoning
from metier.runtime.server.chat.tool_requests import MessageCall
from metier.runtime.server.unserved_endpoints import UNSERVED_ENDPOINTS

PAGE = Path(__file__).parents[1] / "docs" / "client-fields.md"
OBJECTS: tuple[tuple[str, type[ClientBody]], ...] = (
    ("Chat completions", ChatRequest),
    ("Responses", ResponsesRequest),
    ("`text` of a response", TextOptions),
    ("`reasoning`", Reasoning),
    ("Messages", ChatMessage),
    ("Pieces of content", TextPart),
    ("Tools and calls", MessageCall),
)

INTRODUCTION = """\
# What clients may send

Written by `scripts/write_client_fields_page.py` from the code; [serving.md](serving.md) says what the fields do.

- **Null** is the same as a field left out, everywhere.
- **Dropped** fields and values change no answer, so they may be there.
- **Refused** is what would change the answer and is not done here: a 400 that names the field and the reason.
- A field that is in no table is refused too, with `unknown_field`: it may be misspelt.
"""


def client_fields_page() -> str:
    """The whole page."""
    sections = [INTRODUCTION, *(_section(title, model) for title, model in OBJECTS), _endpoints()]
    return "\n".join(sections)


def _section(title: str, model: type[ClientBody]) -> str:
    said = explanations(model)
    done = [f"`{_wire(model, name)}`" for name in model.model_fields]
    told = [f"- `{_wire(model, name)}`: {said[name]}" for name in model.model_fields if name in said]
    lines = [f"## {title}", f"Done: {', '.join(done)}.", *told, ""]
    rows = list(_rows(model, model.unserved))
    if rows:
        lines += ["| field | dropped | why |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _rows(model: type[ClientBody], unserved: Mapping[str, Unserved]) -> Iterator[str]:
    for name, rule in unserved.items():
        if rule.harmless is None:
            dropped = "any value"
        else:
            values = " or ".join(f"`{json.dumps(one)}`" for one in rule.harmless) or "only null"
            dropped = values if name in model.model_fields else f"{values}; others are refused"
        yield f"| `{name}` | {dropped} | {rule.why} |"


def _wire(model: type[ClientBody], name: str) -> str:
    return model.model_fields[name].alias or name


def _endpoints() -> str:
    rows = [f"| `{path}` | {why} | {remedy} |" for path, (why, remedy) in UNSERVED_ENDPOINTS.items()]
    head = ["## Endpoints that are refused", "404 with `unsupported_endpoint`.", ""]
    return "\n".join([*head, "| path | why | instead |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    PAGE.write_text(client_fields_page(), encoding="utf-8")
