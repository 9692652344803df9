"""Bodies of common clients: each is served, or refused for a reason that is told; none for a null or a no-op."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from metier.agents import Ask, ScriptedBackend
from metier.agents.answers.sample_answer import sample_answer
from tests.runtime.served import Served, server
from tests.runtime.server.client_bodies import CHAT_BODIES, RESPONSES_BODIES, Sent

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


def fitting(ask: Ask) -> Any:
    """Some words, or what the asked schema allows."""
    return "one two three" if ask.answer_schema is None else json.dumps(sample_answer(ask.answer_schema))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with server(ScriptedBackend(default=fitting)) as running:
        yield running


@pytest.mark.parametrize("sent", CHAT_BODIES, ids=lambda sent: sent.client)
def test_chat_bodies_are_served_or_refused_for_a_stated_reason(served: Served, sent: Sent) -> None:
    answer = httpx.post(f"{served.url}{CHAT}", json={"model": "base", **sent.body})
    if sent.refused is not None:
        refused(answer, *sent.refused)
        return
    assert answer.status_code == 200, answer.text
    if sent.body.get("stream"):
        assert answer.text.rstrip().endswith("data: [DONE]") and '"error"' not in answer.text
        return
    choices = answer.json()["choices"]
    assert len(choices) == (sent.body.get("n") or 1)
    for choice in choices:
        message = choice["message"]
        assert message["content"] or message["tool_calls"]
        assert bool(choice["logprobs"]) == bool(sent.body.get("logprobs") and not message.get("tool_calls"))
        assert not any(stop in (message["content"] or "") for stop in sent.body.get("stop") or ())


@pytest.mark.parametrize("sent", RESPONSES_BODIES, ids=lambda sent: sent.client)
def test_responses_bodies_are_served_or_refused_for_a_stated_reason(served: Served, sent: Sent) -> None:
    answer = httpx.post(f"{served.url}{RESPONSES}", json={"model": "base", **sent.body})
    if sent.refused is not None:
        refused(answer, *sent.refused)
    elif sent.body.get("stream"):
        assert answer.status_code == 200 and "event: response.completed" in answer.text, answer.text
    else:
        assert answer.status_code == 200 and answer.json()["status"] == "completed", answer.text


def refused(answer: httpx.Response, field: str, reason: str) -> None:
    """The answer is a 400 that names the field, the reason, and what to do instead."""
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == field, answer.text
    assert reason in error["message"]


def test_there_are_as_many_as_were_tried_before() -> None:
    for bodies, most in ((CHAT_BODIES, 59), (RESPONSES_BODIES, 18)):
        assert len(bodies) >= most and len({sent.client for sent in bodies}) == len(bodies)
