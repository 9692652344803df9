"""Endpoints of OpenAI's and Anthropic's that clients try and that are not served, each with the reason."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.responses import Response

from .error_replies import RequestRefused

__all__ = ["UNSERVED_ENDPOINTS", "add_unserved_endpoints"]

_TEXT_ONLY = "the models served here read and write text only"
_CHAT = "Send it to /v1/chat/completions."

UNSERVED_ENDPOINTS: dict[str, tuple[str, str]] = {
    "/v1/completions": (
        "every prompt is asked in the model's chat template, so text cannot be continued as it stands",
        "Send the prompt as a user message to /v1/chat/completions.",
    ),
    "/v1/embeddings": (
        "the engines write text, and give no vectors of it",
        "Use a server of embedding models beside this one.",
    ),
    "/v1/messages": ("Anthropic's protocol is not spoken", _CHAT),
    "/v1/moderations": ("nothing here moderates", "Ask a role that does, by /v1/chat/completions."),
    "/v1/rerank": ("there is no model that ranks", "Ask a role that does, by /v1/chat/completions."),
    "/v1/assistants": ("there are no assistants; a workflow or a role is a model", _CHAT),
    "/v1/threads": ("messages are sent along with each request", _CHAT),
    "/v1/files": ("no files are kept", "Send their text in a message."),
    "/v1/vector_stores": ("no files are kept", "Give a role a tool that searches."),
    "/v1/batches": ("no files are kept", "Send the requests one by one: the server puts them in order."),
    "/v1/fine_tuning/jobs": ("variants are not made by the server", "Make them with `metier make RECIPE.yaml`."),
    "/v1/images/generations": (_TEXT_ONLY, ""),
    "/v1/images/edits": (_TEXT_ONLY, ""),
    "/v1/audio/speech": (_TEXT_ONLY, ""),
    "/v1/audio/transcriptions": (_TEXT_ONLY, ""),
    "/v1/audio/translations": (_TEXT_ONLY, ""),
}
"""Path → why it is not served, and what to do instead."""


def add_unserved_endpoints(api: FastAPI) -> None:
    """Answer them with 404 and the reason."""
    for path in UNSERVED_ENDPOINTS:
        api.add_route(path, _refuse, methods=["POST"], include_in_schema=False)


async def _refuse(request: Request) -> Response:
    path = request.url.path
    why, remedy = UNSERVED_ENDPOINTS[path]
    raise RequestRefused(f"{path} is not served: {why}", status=404, code="unsupported_endpoint", remedy=remedy)
