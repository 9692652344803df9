"""Responses over HTTP, whole and as streams: chat completions in the newer form of OpenAI's clients."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal

import anyio
from fastapi import FastAPI, Query
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from ...settings.server import ServerSettings
from ..admission import Admission
from ..announced_errors import errors
from ..error_replies import RequestRefused
from ..watched_response import EventStream, JsonWork, Write, sse
from .chat import Answer, Chat
from .chat_protocol import Completed
from .gathered_answer import gather
from .input_items import page_of
from .responses_protocol import ResponsesRequest, message_item, output_items, response_object, text_part
from .responses_tools import call_items
from .sampling_requests import token_blocks
from .stored_responses import StoredResponses

__all__ = ["add_responses_endpoint"]


def add_responses_endpoint(
    api: FastAPI, chat: Chat, stored: StoredResponses, admission: Admission, settings: ServerSettings
) -> None:
    """Add /v1/responses, and what is done with one that is kept: fetch it or its input, delete it."""

    @api.post(
        "/v1/responses",
        responses=errors(400, 401, 403, 404, 408, 413, 422, 429, 503, 504),
        response_class=JSONResponse,
    )
    async def responses(request: ResponsesRequest) -> Response:
        """One response of a workflow, a role or a variant; with `stream`, as server-sent events."""
        earlier = stored.before(request)
        try:
            answer = chat.plan(request.as_chat(earlier))
        except ValidationError as error:
            raise RequestRefused(f"input: {error.errors()[0]['msg']}", param="input") from error
        admission.check()
        id, created = uuid.uuid4().hex, int(time.time())

        def whole(done: Completed | None) -> dict[str, Any]:
            response = response_object(id, created, request, done, stored.keeps(request))
            if done is not None:
                stored.keep(request, earlier, done, response)
            return response

        if request.stream:
            return EventStream(_Stream(id, whole, answer, admission, settings), settings)

        async def work() -> tuple[int, Any]:
            with anyio.fail_after(settings.request_timeout_s):
                async with admission.enter():
                    done = await answer(None)
            return 200, whole(done)

        return JsonWork(work)

    @api.get("/v1/responses/{id}", responses=errors(401, 403, 404))
    async def get_response(id: str) -> dict[str, Any]:
        """A response that is kept."""
        return stored.get(id)

    @api.get("/v1/responses/{id}/input_items", responses=errors(400, 401, 403, 404, 422))
    async def get_input_items(
        id: str,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        """What was said before the answer of a kept response, that of earlier responses too; the last item first."""
        return page_of(stored.input_items(id), after=after, limit=limit, order=order)

    @api.delete("/v1/responses/{id}", responses=errors(401, 403, 404))
    async def delete_response(id: str) -> dict[str, Any]:
        """Keep a response no longer. Those that went on from it stay as they are."""
        stored.delete(id)
        return {"id": id, "object": "response", "deleted": True}


class _Stream:
    """Writes one response as OpenAI's events while it is generated."""

    def __init__(
        self,
        id: str,
        whole: Callable[[Completed | None], dict[str, Any]],
        answer: Answer,
        admission: Admission,
        settings: ServerSettings,
    ) -> None:
        self._id = id
        self._whole = whole
        self._answer = answer
        self._admission = admission
        self._settings = settings
        self._number = 0

    async def __call__(self, write: Write) -> None:
        """Write all of it; nothing before there is some text, so that what goes wrong until then has a status."""
        where = {"item_id": f"msg_{self._id}", "output_index": 0, "content_index": 0}

        async def on_piece(text: str) -> None:
            begin = self._begin(where) if not self._number else b""
            await write(begin + self._event("output_text.delta", **where, delta=text, logprobs=[]))

        done = await gather(self._answer, self._admission, self._settings, on_piece)
        if done.calls:
            last = self._started() + self._calls(done)
        else:
            last = (self._begin(where) if not self._number else b"") + self._message(where, done)
        outputs = output_items(self._id, done)
        for index, item in enumerate(outputs):
            if item["type"] == "reasoning":
                last += self._event("output_item.added", output_index=index, item=item)
                last += self._event("output_item.done", output_index=index, item=item)
        whole = self._whole(done)
        await write(last + self._event(whole["status"], response=whole))

    def _message(self, where: dict[str, Any], done: Completed) -> bytes:
        """The end of an answer's text."""
        last = self._event("output_text.done", **where, text=done.text, logprobs=token_blocks(done.logprobs or ()))
        last += self._event("content_part.done", **where, part=text_part(done.text, done.logprobs))
        return last + self._event("output_item.done", output_index=0, item=output_items(self._id, done)[0])

    def _calls(self, done: Completed) -> bytes:
        """Calls, each whole as soon as it is announced."""
        written = b""
        pairs = zip(call_items(done.calls, begun=True), call_items(done.calls), strict=True)
        for index, (begun, item) in enumerate(pairs):
            where = {"item_id": item["id"], "output_index": index}
            arguments = item["arguments"]
            written += (
                self._event("output_item.added", output_index=index, item=begun)
                + self._event("function_call_arguments.delta", **where, delta=arguments)
                + self._event("function_call_arguments.done", **where, name=item["name"], arguments=arguments)
                + self._event("output_item.done", output_index=index, item=item)
            )
        return written

    def _started(self) -> bytes:
        started = self._whole(None)
        return self._event("created", response=started) + self._event("in_progress", response=started)

    def _begin(self, where: dict[str, Any]) -> bytes:
        return (
            self._started()
            + self._event("output_item.added", output_index=0, item=message_item(where["item_id"], None))
            + self._event("content_part.added", **where, part=text_part(""))
        )

    def _event(self, name: str, /, **data: Any) -> bytes:
        kind, number = f"response.{name}", self._number
        self._number += 1
        return sse({"type": kind, "sequence_number": number, **data}, event=kind)
