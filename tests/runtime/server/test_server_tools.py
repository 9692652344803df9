"""Tools that a client brings, as OpenAI's own client sees them: calls come back to it, results go to the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from metier.agents import Ask, ScriptedBackend, ToolCall, ToolCalls
from metier.runtime.settings.session import load_settings
from tests.agents.workflow import Answer
from tests.runtime.served import Served, server

LOOK: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks a word up.\n\nAnd more.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
HELLO: Any = [{"role": "user", "content": "What is a cow?"}]


def calls(*words: str) -> ToolCalls:
    return ToolCalls(tool_calls=tuple(ToolCall(name="look", arguments={"word": word}) for word in words))


def reply(ask: Ask) -> Any:
    """Calls twice, then answers in the shape that it is asked for."""
    if ask.answer_schema is None:
        return "plain text"
    if not ask.messages[-1].content.startswith("Results:"):
        return calls("cow", "bull")
    return Answer(value=2) if ask.role == "solver" else '"an \\"animal\\""'


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend(default=reply)


@pytest.fixture(scope="module")
def served(backend: ScriptedBackend) -> Iterator[Served]:
    with server(backend, settings=load_settings(overrides={"server.drain_s": 1.0, "server.tools": 3})) as running:
        yield running


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


@pytest.mark.parametrize(
    "model, asked, content", [("base", "What is a cow?", 'an "animal"'), ("solver", "2 + 2", '{"value":2}')]
)
def test_calls_are_returned_and_their_results_sent_back(
    client: openai.OpenAI, backend: ScriptedBackend, model: str, asked: str, content: str
) -> None:
    messages: list[Any] = [{"role": "user", "content": asked}]
    first = client.chat.completions.create(model=model, messages=messages, tools=[LOOK, NOW])
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    made: Any = choice.message.tool_calls
    assert [c.function.name for c in made] == ["look", "look"]
    assert [json.loads(c.function.arguments) for c in made] == [{"word": "cow"}, {"word": "bull"}]
    told = "\n".join(message.content for message in backend.asks[-1].messages)
    assert "- look(word: string): Looks a word up.\n- now()\n" in told and "And more" not in told
    messages += [choice.message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": c.id, "content": c.function.arguments} for c in reversed(made)]
    second = client.chat.completions.create(model=model, messages=messages, tools=[LOOK, NOW])
    assert second.choices[0].message.content == content and second.choices[0].finish_reason == "stop"
    ask = backend.asks[-1]
    assert ask.messages[-2].content == calls("cow", "bull").model_dump_json(), "as the model wrote them"
    assert ask.messages[-1].content == 'Results:\n1. look: {"word": "cow"}\n2. look: {"word": "bull"}'


def test_streams_bring_calls_in_one_piece_and_never_their_json(client: openai.OpenAI) -> None:
    pieces = list(client.chat.completions.create(model="base", messages=HELLO, tools=[LOOK], stream=True))
    deltas = [piece.choices[0].delta for piece in pieces if piece.choices]
    assert "".join(delta.content or "" for delta in deltas) == ""
    (found,) = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert [(c.index, c.function and c.function.name) for c in found] == [(0, "look"), (1, "look")]
    assert pieces[-1].choices[0].finish_reason == "tool_calls"


FLAT: Any = [{"type": "function", **LOOK["function"]}, {"type": "function", "name": "now"}]


@pytest.mark.parametrize(
    "model, asked, content", [("base", "What is a cow?", 'an "animal"'), ("solver", "2 + 2", '{"value":2}')]
)
def test_responses_return_calls_as_items_and_take_their_results(
    client: openai.OpenAI, backend: ScriptedBackend, model: str, asked: str, content: str
) -> None:
    first = client.responses.create(model=model, input=asked, tools=FLAT)
    made: Any = first.output
    assert [(c.type, c.name, json.loads(c.arguments)) for c in made] == [
        ("function_call", "look", {"word": "cow"}),
        ("function_call", "look", {"word": "bull"}),
    ]
    assert first.status == "completed" and first.output_text == "" and first.tool_choice == "auto"
    results = [{"type": "function_call_output", "call_id": c.call_id, "output": c.arguments} for c in reversed(made)]
    again: Any = [{"role": "user", "content": asked}, *(c.model_dump() for c in made), *results]
    second = client.responses.create(model=model, input=again, tools=FLAT)
    assert second.output_text == content
    by_responses = backend.asks[-1]
    messages: list[Any] = [
        {"role": "user", "content": asked},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in made
            ],
        },
        *({"role": "tool", "tool_call_id": r["call_id"], "content": r["output"]} for r in results),
    ]
    client.chat.completions.create(model=model, messages=messages, tools=[LOOK, NOW])
    by_chat = backend.asks[-1]
    assert by_responses.messages == by_chat.messages and by_responses.answer_schema == by_chat.answer_schema


def test_streams_of_responses_bring_each_call_whole(client: openai.OpenAI) -> None:
    with client.responses.stream(model="base", input="What is a cow?", tools=FLAT, tool_choice="required") as stream:
        events = list(stream)
        final: Any = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert not [event for event in events if "output_text" in event.type]
    done: Any = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [json.loads(event.arguments)["word"] for event in done] == ["cow", "bull"]
    assert [(item.type, item.call_id != item.id) for item in final.output] == [("function_call", True)] * 2
    assert final.tool_choice == "required" and [tool.name for tool in final.tools] == ["look", "now"]


def test_responses_choose_a_tool_as_chats_do(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    client.responses.create(
        model="base", input="hi", tools=FLAT, tool_choice={"type": "function", "name": "now"}, parallel_tool_calls=False
    )
    by_responses = backend.asks[-1].answer_schema
    named: Any = {"type": "function", "function": {"name": "now"}}
    client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "hi"}],
        tools=[LOOK, NOW],
        tool_choice=named,
        parallel_tool_calls=False,
    )
    assert by_responses == backend.asks[-1].answer_schema
    output = {"type": "function_call_output", "call_id": "c9", "output": "x"}
    with pytest.raises(openai.BadRequestError, match="results of the calls c9"):
        client.responses.create(model="base", input=[output], tools=FLAT)  # type: ignore[list-item]
    with pytest.raises(openai.BadRequestError, match="tools.0.type"):
        client.responses.create(model="base", input="hi", tools=[{"type": "web_search"}])


def test_a_client_chooses_whether_and_what_is_called(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    def schema(**choice: Any) -> dict[str, Any] | None:
        client.chat.completions.create(model="base", messages=HELLO, tools=[LOOK, NOW], **choice)
        return backend.asks[-1].answer_schema

    def names(schema: dict[str, Any] | None) -> list[str]:
        assert schema is not None
        calling = schema if "properties" in schema else schema["anyOf"][0]
        return [each["properties"]["name"]["const"] for each in calling["properties"]["tool_calls"]["items"]["anyOf"]]

    assert schema(tool_choice="none") is None
    free, forced = schema(tool_choice="auto"), schema(tool_choice="required")
    assert names(free) == names(forced) == ["look", "now"]
    assert free is not None and "anyOf" in free and forced is not None and "anyOf" not in forced
    named: Any = {"type": "function", "function": {"name": "now"}}
    only = schema(tool_choice=named, parallel_tool_calls=False)
    assert names(only) == ["now"] and only is not None and only["properties"]["tool_calls"]["maxItems"] == 1


def called(arguments: str) -> dict[str, Any]:
    """A message that a client sends back, with one call."""
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"tools": [LOOK, LOOK]}, "two tools named 'look'"),
        ({"tools": [NOW, LOOK, {**NOW, "function": {"name": "a"}}, {**NOW, "function": {"name": "b"}}]}, "4 tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tool name 'a b' cannot be written"),
        ({"tools": [{**NOW, "function": {"name": "a", "parameters": {"type": "array"}}}]}, "are no object"),
        ({"tool_choice": "required"}, "tool_choice 'required' without tools"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice names 'x'"),
        ({"messages": [*HELLO, {"role": "tool", "tool_call_id": "c1", "content": "x"}]}, "results of the calls c1"),
        ({"messages": [*HELLO, called("{}")]}, "results of the calls"),
        ({"messages": [*HELLO, {"role": "assistant"}]}, "a message of 'assistant' without content"),
        ({"messages": [*HELLO, called("{")]}, "the arguments of call 'c1' are no JSON"),
        ({"messages": [*HELLO, called("3")]}, "the arguments of call 'c1' are 3"),
        ({"model": "chain", "tools": [NOW]}, "tools for workflow 'chain'"),
    ],
)
def test_what_cannot_be_called_is_refused(client: openai.OpenAI, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"model": "base", "messages": HELLO, **fields})
    assert said in str(error.value)


@pytest.mark.parametrize("properties", [3, {"a": {"anyOf": 3}}, {"a": {"properties": []}}])
def test_what_is_no_schema_is_refused(client: openai.OpenAI, properties: Any) -> None:
    odd: Any = {"type": "function", "function": {"name": "odd", "parameters": {"properties": properties}}}
    with pytest.raises(openai.BadRequestError, match="the arguments of tool 'odd' have no JSON schema"):
        client.chat.completions.create(model="base", messages=HELLO, tools=[odd])


@pytest.mark.parametrize("parameters", [{"properties": {"a": 3}, "required": "a"}, {"properties": {"a": {"enum": 3}}}])
def test_odd_schemas_do_not_break_the_prompt(client: openai.OpenAI, parameters: dict[str, Any]) -> None:
    odd: Any = {"type": "function", "function": {"name": "odd", "parameters": parameters}}
    assert client.chat.completions.create(model="base", messages=HELLO, tools=[odd]).choices


def test_what_no_grammar_holds_is_left_out(client: openai.OpenAI, backend: ScriptedBackend) -> None:
    words = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    many: Any = {"type": "function", "function": {"name": "many", "parameters": {"properties": {"words": words}}}}
    client.chat.completions.create(model="base", messages=HELLO, tools=[many])
    assert '"words"' in json.dumps(backend.asks[-1].answer_schema)
    assert "uniqueItems" not in json.dumps(backend.asks[-1].answer_schema)
