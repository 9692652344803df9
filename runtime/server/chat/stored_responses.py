"""Responses kept in the run store: what a later one goes on from, and what is fetched or deleted by its id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from ...settings.server import ServerSettings
from ...store.kept_responses import KeptResponse, KeptResponses
from ...store.store import RunStore
from ..error_replies import RequestRefused
from .chat_protocol import ChatMessage, Completed
from .input_items import input_items
from .responses_protocol import ResponsesRequest

__all__ = ["StoredResponses"]

_MESSAGES = TypeAdapter(list[ChatMessage])
SHOWN_CHARACTERS = 100


OWNER_ROUNDS = 200_000
"""Rounds of the hash that stands for a key, so that a store does not help to guess it."""


class StoredResponses:
    """The responses that clients with this server's key may go on from; with another key there are others."""

    def __init__(self, store: RunStore, settings: ServerSettings, key: str | None) -> None:
        self._kept = KeptResponses(store, settings.responses_kept, settings.responses_kept_days)
        self._settings = settings
        self._owner = "" if key is None else _owner(key)

    def keeps(self, request: ResponsesRequest) -> bool:
        """Whether the response to a request is kept."""
        return request.store is not False and self._settings.responses_kept > 0

    def before(self, request: ResponsesRequest) -> list[ChatMessage]:
        """What was said before a request.

        Raises: RequestRefused (404) when the response that it goes on from is not there, (413) when all of it together
        is longer than a request may be.
        """
        id = request.previous_response_id
        if id is None:
            return []
        kept = self._find(id, "previous_response_not_found", "previous_response_id")
        size = len(kept.messages.encode()) + sum(len(message.model_dump_json()) for message in request.said())
        if size > self._settings.request_kib << 10:
            raise RequestRefused(
                f"a conversation of {size} bytes",
                status=413,
                code="request_too_large",
                param="previous_response_id",
                expected=f"at most request_kib={self._settings.request_kib}",
                remedy="Begin a new one with what matters of it, or raise server.request_kib.",
            )
        return _MESSAGES.validate_json(kept.messages)

    def keep(
        self, request: ResponsesRequest, earlier: Sequence[ChatMessage], done: Completed, response: dict[str, Any]
    ) -> None:
        """Keep a response, unless the request or the settings say no."""
        if not self.keeps(request):
            return
        reply: dict[str, Any] = {"role": "assistant", "content": None if done.calls else done.text}
        if done.calls:
            reply["tool_calls"] = list(done.calls)
        messages = [*earlier, *request.said(), ChatMessage.model_validate(reply)]
        said = _MESSAGES.dump_json(messages, exclude_none=True).decode()
        body = json.dumps(response, ensure_ascii=False)
        self._kept.add(KeptResponse(response["id"], self._owner, response["created_at"], said, body))

    def get(self, id: str) -> dict[str, Any]:
        """A response as it was sent; raises RequestRefused (404) when there is none of that id."""
        found: dict[str, Any] = json.loads(self._find(id, "response_not_found", "response_id").body)
        return found

    def input_items(self, id: str) -> list[dict[str, Any]]:
        """What was said before the answer of a response; raises RequestRefused (404) when there is none of that id."""
        kept = self._find(id, "response_not_found", "response_id")
        return input_items(kept.id.removeprefix("resp_"), _MESSAGES.validate_json(kept.messages)[:-1])

    def delete(self, id: str) -> None:
        """Keep a response no longer; raises RequestRefused (404) when there is none of that id."""
        if not self._kept.delete(id, self._owner):
            raise self._unknown(id, "response_not_found", "response_id")

    def _find(self, id: str, code: str, param: str) -> KeptResponse:
        kept = self._kept.get(id, self._owner)
        if kept is None:
            raise self._unknown(id, code, param)
        return kept

    def _unknown(self, id: str, code: str, param: str) -> RequestRefused:
        return RequestRefused(
            f"no response {id[:SHOWN_CHARACTERS]!r}",
            status=404,
            code=code,
            param=param,
            expected=f"one that is kept: of the newest {self._settings.responses_kept}, and not older than "
            f"{self._settings.responses_kept_days:g} days",
            remedy="Send what was said before in the input.",
        )


def _owner(key: str) -> str:
    """16 hex digits that stand for a key in the store."""
    return hashlib.pbkdf2_hmac("sha256", key.encode(), b"metier responses", OWNER_ROUNDS, 8).hex()
