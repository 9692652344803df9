"""What a kept response was asked with, as a list of items in the words of /v1/responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ..error_replies import RequestRefused
from .chat_protocol import ChatMessage, text_of
from .responses_protocol import message_item

__all__ = ["input_items", "page_of"]

SHOWN_CHARACTERS = 100


def input_items(id: str, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as items, the first one first; the id of each says its place within the response."""
    items = [item for message in messages for item in _items(message)]
    prefixes = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}
    return [item | {"id": f"{prefixes[item['type']]}_{id}_{number}"} for number, item in enumerate(items)]


def page_of(
    items: Sequence[dict[str, Any]], *, after: str | None, limit: int, order: Literal["asc", "desc"]
) -> dict[str, Any]:
    """A page of at most `limit` items: those behind the item `after`, the last one first unless `order` is `asc`.

    Raises: RequestRefused (404) when there is no item of that id.
    """
    ordered = list(items if order == "asc" else reversed(items))
    if after is not None:
        place = next((number for number, item in enumerate(ordered) if item["id"] == after), None)
        if place is None:
            raise RequestRefused(
                f"no item {after[:SHOWN_CHARACTERS]!r}",
                status=404,
                code="item_not_found",
                param="after",
                expected="the id of an item of this response's input",
            )
        ordered = ordered[place + 1 :]
    page = ordered[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(ordered) > limit,
    }


def _items(message: ChatMessage) -> Iterator[dict[str, Any]]:
    text = message.refusal if message.content is None else text_of(message.content)
    if message.role == "tool":
        yield {
            "type": "function_call_output", "call_id": message.tool_call_id, "output": text or "",
            "status": "completed",
        }  # fmt: skip
    elif message.role == "assistant":
        if text is not None:
            yield message_item("", text)
        for call in message.tool_calls or ():
            function = {"name": call.function.name, "arguments": call.function.arguments}
            yield {"type": "function_call", "call_id": call.id, **function, "status": "completed"}
    else:
        content = [{"type": "input_text", "text": text or ""}]
        yield {"type": "message", "role": message.role, "content": content, "status": "completed"}
