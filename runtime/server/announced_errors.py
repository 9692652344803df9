"""The error replies that endpoints announce in the OpenAPI document."""

from __future__ import annotations

from typing import Any

__all__ = ["errors"]

_SHAPE = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}

_TEXT = {
    400: "Something in the request is wrong",
    401: "No API key, or a wrong one",
    403: "Another origin or host",
    404: "No such model, workflow or run",
    408: "The body did not arrive in time",
    409: "The run is not in a state for this",
    413: "The body is too large",
    422: "The workflow failed, or waits for a person",
    429: "The queue is full; see Retry-After",
    503: "The server is about to stop, or an engine starts again",
    504: "It took longer than request_timeout_s",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` for these statuses."""
    return {
        status: {"description": _TEXT[status], "content": {"application/json": {"schema": _SHAPE}}}
        for status in statuses
    }
