"""Errors on their way to a client: named, in OpenAI's shape, and never with a traceback."""

from __future__ import annotations

import json
import logging
import uuid
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse

from ...agents.errors import (
    AskRejectedError,
    ContextError,
    EngineDeadError,
    EngineError,
    MetierError,
    ResumeError,
    RunError,
    RunInterrupted,
    ServerError,
    StoreError,
    UnknownVariantError,
    first_error,
)

__all__ = ["RequestRefused", "error_body", "error_response", "refuse_validation", "shortened"]

log = logging.getLogger(__name__)

SHOWN_CHARACTERS = 100


class RequestRefused(ServerError):
    """A request that is not served: `status` is the HTTP status, `code` its name, `param` the field at fault."""

    def __init__(
        self,
        problem: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after_s: int | None = None,
        expected: str = "",
        remedy: str = "",
    ) -> None:
        super().__init__(problem, expected=expected, remedy=remedy)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


# The first that fits. What a model or a workflow did wrong is no 5xx: clients ask again on those by themselves.
_STATUS: tuple[tuple[type[MetierError], int, str], ...] = (
    (ContextError, 400, "context_length_exceeded"),
    (AskRejectedError, 400, "ask_rejected"),
    (UnknownVariantError, 404, "model_not_found"),
    (RunInterrupted, 422, "run_waits_for_person"),
    (RunError, 422, "run_failed"),
    (ResumeError, 409, "run_cannot_resume"),
    (StoreError, 503, "run_store"),
    (EngineDeadError, 503, "engine_restarting"),
    (EngineError, 500, "engine_error"),
    (MetierError, 400, "invalid_request"),
)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, OpenAI's `{"error": {...}}` and further headers for an error; an unexpected one is logged, not sent."""
    if isinstance(error, BaseExceptionGroup):
        error = first_error(error)
    headers: dict[str, str] = {}
    if isinstance(error, RequestRefused):
        status, code, param, message = error.status, error.code, error.param, str(error)
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
    elif isinstance(error, MetierError):
        status, code = next((s, c) for kind, s, c in _STATUS if isinstance(error, kind))
        param, message = None, f"{type(error).__name__}: {error}"
        if status == 503:
            headers["retry-after"] = "1"
    elif isinstance(error, TimeoutError):
        status, code, param, message = 504, "request_timeout", None, "the request took longer than request_timeout_s"
    else:
        mark = uuid.uuid4().hex[:8]
        log.error("unforeseen error %s", mark, exc_info=error)
        status, code, param = 500, "internal_error", None
        message = f"something went wrong inside the server; its log has it under {mark}"
    message = message.encode(errors="backslashreplace").decode()  # half of a surrogate pair cannot be sent
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers


def error_response(error: BaseException) -> JSONResponse:
    """The same as a whole response."""
    status, body, headers = error_body(error)
    return JSONResponse(body, status, headers)


def refuse_validation(error: RequestValidationError) -> RequestRefused:
    """What FastAPI found wrong in a request, in our words: the first field at fault, and what it should be."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    place, field = (where[0], ".".join(where[1:])) if where else ("body", "")
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "cannot be read")
        return RequestRefused(f"the body is no JSON: {reason}", code="invalid_json", expected="one JSON object")
    if not field and first["type"] == "model_attributes_type":
        return RequestRefused(
            "the body is no JSON object", code="invalid_json", expected="an object, as content-type application/json"
        )
    if first["type"] == "extra_forbidden":
        return RequestRefused(
            f"unknown field {field!r}",
            code="unknown_field",
            param=field,
            expected="the fields of /openapi.json",
            remedy="Leave it out: it would have no effect here.",
        )
    shown = shortened(first.get("input"))
    return RequestRefused(f"{field or place}={shown}: {first['msg']}", param=field or None)


def shortened(value: Any) -> str:
    """A value as JSON, for a message: its first characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
