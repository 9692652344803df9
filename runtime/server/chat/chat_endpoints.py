"""Chat completions and models over HTTP, whole and as streams."""

from __future__ import annotations

import json
import time
import uuid
from functools import partial
from typing import Any

import anyio
from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from ...settings.server import ServerSettings
from ..admission import Admission
from ..announced_errors import errors
from ..served_models import ServedModels
from ..watched_response import EventStream, JsonWork, Write, sse
from .chat import Answer, Chat
from .chat_protocol import ChatRequest, Completed, chunk, completion, usage_block
from .gathered_answer import all_of, gather

__all__ = ["add_chat_endpoints"]

OWNER = "metier"
"""`owned_by` of our models, by which a `RemoteBackend` knows that it talks to one of us."""

MARK = "text"


def add_chat_endpoints(
    api: FastAPI, chat: Chat, models: ServedModels, admission: Admission, settings: ServerSettings, base: str = ""
) -> None:
    """Add /v1/chat/completions and /v1/models; `base` is the fingerprint of the base model, where it is known."""
    common = {"object": "model", "created": int(time.time()), "owned_by": OWNER, "root": base}

    @api.post(
        "/v1/chat/completions",
        responses=errors(400, 401, 403, 404, 408, 413, 422, 429, 503, 504),
        response_class=JSONResponse,
    )
    async def chat_completions(request: ChatRequest) -> Response:
        """One completion of a workflow, a role or a variant; with `stream`, as server-sent events."""
        answers = chat.plan_choices(request)
        admission.check()
        id = f"chatcmpl-{uuid.uuid4().hex}"
        if request.stream:
            return EventStream(_Stream(request, id, answers, admission, settings), settings)

        async def answered(answer: Answer) -> Completed:
            async with admission.enter():
                return await answer(None)

        async def work() -> tuple[int, Any]:
            with anyio.fail_after(settings.request_timeout_s):
                done = await all_of([partial(answered, answer) for answer in answers])
            return 200, completion(id, request.model, done)

        return JsonWork(work)

    @api.get("/v1/models", responses=errors(401, 403))
    async def list_models() -> dict[str, Any]:
        """Everything that `model` may name."""
        data = [{"id": name, **common} for name in models.names()]
        return {"object": "list", "data": data}

    @api.get("/v1/models/{model:path}", responses=errors(401, 403, 404))
    async def get_model(model: str) -> dict[str, Any]:
        """One of them; 404 when it is not served."""
        models.find(model)
        return {"id": model, **common}


class _Stream:
    """Writes one completion as OpenAI's chunks while it is generated."""

    def __init__(
        self, request: ChatRequest, id: str, answers: list[Answer], admission: Admission, settings: ServerSettings
    ) -> None:
        self._request = request
        self._id = id
        self._answers = answers
        self._admission = admission
        self._settings = settings
        self._created = int(time.time())

    async def __call__(self, write: Write) -> None:
        """Write all of it, several choices as they come. What has gathered while the client was slow goes out in one
        piece.

        Nothing is written before there is some text: what goes wrong until then has a status of its own.
        """
        done = await all_of([partial(self._choice, index, answer, write) for index, answer in enumerate(self._answers)])
        options, last = self._request.stream_options, b""
        if options is not None and options.include_usage:
            last = self._chunk(None, usage=usage_block(done))
        await write(last + sse("[DONE]"))

    async def _choice(self, index: int, answer: Answer, write: Write) -> Completed:
        first = True
        # A piece of text is the most frequent thing we write: all of it but the text is written once.
        before, after = self._chunk({"content": MARK}, index=index).split(json.dumps(MARK).encode())

        async def on_piece(text: str) -> None:
            nonlocal first
            if first:
                first = False
                await write(self._chunk({"role": "assistant", "content": text}, index=index))
            else:
                await write(before + json.dumps(text, ensure_ascii=False).encode() + after)

        done = await gather(answer, self._admission, self._settings, on_piece)
        last = self._chunk({"role": "assistant", "content": ""}, index=index) if first else b""
        if done.thinking:
            last += self._chunk({"reasoning_content": done.thinking}, index=index)
        if done.calls:
            calls = [{"index": at, **call} for at, call in enumerate(done.calls)]
            last += self._chunk({"tool_calls": calls}, index=index)
        last += self._chunk({}, done.finish_reason, index=index, logprobs=done.logprobs, metier=done.origin)
        await write(last)
        return done

    def _chunk(self, delta: dict[str, Any] | None, finish_reason: str | None = None, **more: Any) -> bytes:
        return sse(chunk(self._id, self._request.model, self._created, delta, finish_reason, **more))
