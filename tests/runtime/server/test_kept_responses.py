"""Responses that are kept: gone on from, fetched, deleted, bounded, and apart for each key, also after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from metier.agents import Ask, Role, ScriptedBackend, TaskGraph, Turn
from metier.agents.errors import ContextError
from metier.runtime import RunStore, load_settings
from metier.runtime.server.served_models import ServedWorkflow
from metier.runtime.store.kept_responses import DAY_S, KeptResponse, KeptResponses
from metier.runtime.store.recovery import recover_store
from tests.agents.workflow import Answer, Plan
from tests.runtime.served import WORKFLOWS, Served, server


class Question(BaseModel):
    text: str
    earlier: list[Turn] = []


helpdesk = TaskGraph("helpdesk", takes=Question, gives=str)
helpdesk.step(Role("helper", takes=Question, gives=str))
SERVED = [*WORKFLOWS, ServedWorkflow(helpdesk.build())]


def backend() -> ScriptedBackend:
    """Says how many messages it was shown, and has a context of 40 of them."""

    def reply(ask: Ask) -> str:
        if len(ask.messages) >= 40:
            raise ContextError(f"the prompt has {len(ask.messages)} tokens", expected="fewer than 40")
        return f"{len(ask.messages)} messages"

    return ScriptedBackend(
        {"planner": lambda ask: Plan(expression="2 + 2"), "solver": lambda ask: Answer(value=4)}, default=reply
    )


@pytest.fixture(scope="module")
def asked() -> ScriptedBackend:
    return backend()


@pytest.fixture(scope="module")
def served(asked: ScriptedBackend) -> Iterator[Served]:
    with server(asked, workflows=SERVED) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai_client(served)


def openai_client(served: Served, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


def said(backend: ScriptedBackend) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in backend.asks[-1].messages]


def test_a_response_goes_on_from_another(client: openai.OpenAI, asked: ScriptedBackend) -> None:
    first = client.responses.create(model="base", input="Hello.", instructions="Be brief.", store=True)
    second = client.responses.create(model="base", input="And now?", previous_response_id=first.id)
    assert first.store and second.previous_response_id == first.id
    # As OpenAI has it: instructions are of one response.
    assert said(asked) == [("user", "Hello."), ("assistant", "2 messages"), ("user", "And now?")]
    client.responses.create(model="base", input="Other", previous_response_id=first.id, instructions="In verse.")
    assert said(asked) == [("system", "In verse."), *said_of("Hello.", "2 messages"), ("user", "Other")]
    third = client.responses.create(model="base", input="Bye.", previous_response_id=second.id)
    assert third.output_text == "5 messages"


def said_of(*texts: str) -> list[tuple[str, str]]:
    return [("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]


def test_a_stream_is_kept_and_may_go_on_from_one(client: openai.OpenAI) -> None:
    first = client.responses.create(model="base", input="Hello.")
    with client.responses.stream(model="base", input="More.", previous_response_id=first.id) as stream:
        final = list(stream)[-1]
    assert final.type == "response.completed" and final.response.store
    assert client.responses.retrieve(final.response.id).output_text == "3 messages"
    again = client.responses.create(model="base", input="x", previous_response_id=final.response.id)
    assert again.output_text == "5 messages"


def test_one_is_fetched_and_deleted_and_those_behind_it_stay(client: openai.OpenAI) -> None:
    first = client.responses.create(model="base", input="Hello.", metadata={"a": "b"})
    second = client.responses.create(model="base", input="More.", previous_response_id=first.id)
    fetched = client.responses.retrieve(first.id)
    assert fetched.model_dump() == first.model_dump() and fetched.metadata == {"a": "b"}
    client.responses.delete(first.id)
    for gone in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError) as error:
            gone(first.id)
        assert error.value.code == "response_not_found" and first.id in error.value.message
    with pytest.raises(openai.NotFoundError) as error:
        client.responses.create(model="base", input="x", previous_response_id=first.id)
    assert error.value.code == "previous_response_not_found" and error.value.param == "previous_response_id"
    assert client.responses.create(model="base", input="x", previous_response_id=second.id).output_text == "5 messages"


def test_its_input_is_listed_with_what_was_said_before(client: openai.OpenAI) -> None:
    first = client.responses.create(model="base", input="Hello.")
    call: Any = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
    result: Any = {"type": "function_call_output", "call_id": "c1", "output": "rain"}
    second = client.responses.create(model="base", input=[call, result], previous_response_id=first.id)
    items = list(client.responses.input_items.list(second.id, order="asc", limit=1))  # in four pages
    shown = [item.model_dump() for item in items]
    assert [(item["type"], item.get("role")) for item in shown] == [
        ("message", "user"),
        ("message", "assistant"),
        ("function_call", None),
        ("function_call_output", None),
    ]
    assert [shown[0]["content"][0]["text"], shown[1]["content"][0]["text"]] == ["Hello.", "1 messages"]
    assert shown[2]["arguments"] == "{}" and shown[3]["output"] == "rain" and len({item.id for item in items}) == 4
    newest = client.responses.input_items.list(second.id, limit=2)
    assert [item.id for item in newest.data] == [items[3].id, items[2].id] and newest.has_more
    for id, after in (("resp_none", None), (second.id, "msg_none")):
        with pytest.raises(openai.NotFoundError):
            client.responses.input_items.list(id, **({} if after is None else {"after": after}))
    with pytest.raises(openai.BadRequestError):
        client.responses.input_items.list(second.id, limit=1000)


def test_what_is_not_to_be_kept_is_not(client: openai.OpenAI) -> None:
    response = client.responses.create(model="base", input="Hello.", store=False)
    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_roles_and_workflows_go_on_too(client: openai.OpenAI, asked: ScriptedBackend, served: Served) -> None:
    first = client.responses.create(model="solver", input='{"expression": "2 + 2"}')
    client.responses.create(model="solver", input="and 1", previous_response_id=first.id)
    roles = [role for role, _ in said(asked)]
    assert roles == ["system", "user", "assistant", "user"] and said(asked)[-1] == ("user", "and 1")

    one = client.responses.create(model="helpdesk", input="What?")
    two = client.responses.create(model="helpdesk", input="Why?", previous_response_id=one.id)
    assert [one.output_text, two.output_text] == ["2 messages", "4 messages"]
    assert said(asked)[1:3] == said_of("What?", "2 messages")
    run = served.store.run(two.model_dump()["metier"]["run_id"])
    assert Question.model_validate_json(run.input).earlier == [Turn(asked="What?", replied="2 messages")]

    alone = client.responses.create(model="chain", input="2 cows")
    with pytest.raises(openai.BadRequestError, match=r"a field of type list\[Turn\]"):
        client.responses.create(model="chain", input="3 cows", previous_response_id=alone.id)


def test_a_workflow_takes_earlier_turns_as_chat_messages(client: openai.OpenAI, asked: ScriptedBackend) -> None:
    messages: Any = [{"role": role, "content": text} for role, text in said_of("What?", "That.", "Why?")]
    chat = client.chat.completions.create(model="helpdesk", messages=messages)
    assert chat.choices[0].message.content == "4 messages" and said(asked)[1:3] == said_of("What?", "That.")
    with pytest.raises(openai.BadRequestError, match="in turns"):
        client.chat.completions.create(model="helpdesk", messages=messages[:2])


def test_a_conversation_beyond_the_context_is_a_400_that_says_so(client: openai.OpenAI) -> None:
    last = client.responses.create(model="base", input="Hello.")
    with pytest.raises(openai.BadRequestError) as error:
        for _ in range(40):
            last = client.responses.create(model="base", input="More.", previous_response_id=last.id)
    assert error.value.code == "context_length_exceeded" and "fewer than 40" in error.value.message
    assert client.responses.retrieve(last.id).output_text == "39 messages"


def test_one_longer_than_a_request_may_be_is_refused() -> None:
    settings = load_settings(overrides={"server.request_kib": 1, "server.drain_s": 1.0})
    with server(backend(), settings=settings) as running:
        last = openai_client(running).responses.create(model="base", input="a" * 600)
        with pytest.raises(openai.APIStatusError) as error:
            openai_client(running).responses.create(model="base", input="b" * 600, previous_response_id=last.id)
    assert error.value.status_code == 413 and "at most request_kib=1" in error.value.message


def test_they_survive_a_restart_and_each_key_has_its_own(tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    with server(backend(), store=store, key="key-of-one") as running:
        first = openai_client(running, "key-of-one").responses.create(model="base", input="Hello.")
    with server(backend(), store=store, key="key-of-two") as running:
        with pytest.raises(openai.NotFoundError):
            openai_client(running, "key-of-two").responses.retrieve(first.id)
        with pytest.raises(openai.NotFoundError):
            openai_client(running, "key-of-two").responses.create(
                model="base", input="x", previous_response_id=first.id
            )
        with pytest.raises(openai.NotFoundError):
            openai_client(running, "key-of-two").responses.delete(first.id)
        assert httpx.get(f"{running.url}/v1/responses/{first.id}").status_code == 401
    with server(backend(), store=store, key="key-of-one") as running:
        again = openai_client(running, "key-of-one").responses
        assert again.create(model="base", input="x", previous_response_id=first.id).output_text == "3 messages"
    assert b"key-of-one" not in store.read_bytes()


def test_none_are_kept_where_the_setting_says_so() -> None:
    settings = load_settings(overrides={"server.responses_kept": 0, "server.drain_s": 1.0})
    with server(backend(), settings=settings) as running:
        response = openai_client(running).responses.create(model="base", input="Hello.", store=True)
        assert response.store is False
        assert httpx.get(f"{running.url}/v1/responses/{response.id}").status_code == 404


def test_the_oldest_are_deleted_where_they_are_too_many_or_too_old(tmp_path: Path) -> None:
    with RunStore(tmp_path / "runs.db") as store:
        kept = KeptResponses(store, most=3, days=2)
        for number, day in enumerate((0, 0, 0, 0, 1, 2.5)):
            kept.add(KeptResponse(f"r{number}", "", day * DAY_S, "[]", "{}"))
        there = [number for number in range(6) if kept.get(f"r{number}", "") is not None]
        assert there == [4, 5]
    recover_store(tmp_path / "runs.db", tmp_path / "saved.db")
    with RunStore(tmp_path / "saved.db") as store:
        assert KeptResponses(store, most=3, days=2).get("r5", "") == KeptResponse("r5", "", 2.5 * DAY_S, "[]", "{}")


def test_what_tools_give_goes_on_from_the_response_that_called_them() -> None:
    tool: Any = {
        "type": "function",
        "name": "look",
        "parameters": {"type": "object", "properties": {}},
        "strict": False,
    }
    call = {"tool_calls": [{"name": "look", "arguments": {}}]}
    replies = iter([call, "It rains."])
    backend = ScriptedBackend(default=lambda ask: next(replies))
    with server(backend) as running:
        responses = openai_client(running).responses
        first = responses.create(model="base", input="Weather?", tools=[tool])
        (made,) = first.output
        assert made.type == "function_call"
        given: Any = [{"type": "function_call_output", "call_id": made.call_id, "output": "rain"}]
        second = responses.create(model="base", input=given, previous_response_id=first.id)
    assert second.output_text == "It rains."
    assert [message.role for message in backend.asks[-1].messages] == ["user", "assistant", "user"]
    assert "rain" in backend.asks[-1].messages[-1].content
