"""Bodies of requests as common clients send them, with where they come from.

Those of the OpenAI SDK, LangChain, pydantic-ai, LiteLLM and the Agents SDK were taken from the wire (the versions that
examples/clients/requirements.txt names, 2026-12); the others follow each client's own types and documentation.
Texts are shortened, fields are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["CHAT_BODIES", "RESPONSES_BODIES", "Sent"]


@dataclass(frozen=True)
class Sent:
    """One body, without its model; `refused` is the field that it is refused for and what the message has to say."""

    client: str
    body: dict[str, Any]
    refused: tuple[str, str] | None = None


HI: list[Any] = [{"role": "user", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "Weather of a city.", "parameters": CITY}
TOOL = {"type": "function", "function": WEATHER}
CLOSED = {**CITY, "additionalProperties": False}
STRICT = {"type": "function", "function": {**WEATHER, "parameters": CLOSED, "strict": True}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
PERSON = {
    "type": "object",
    "title": "P",
    "properties": {
        "name": {"title": "Name", "type": "string"},
        "age": {"anyOf": [{"type": "integer"}, {"type": "null"}], "title": "Age"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TYPED = {"type": "json_schema", "json_schema": {"schema": PERSON, "name": "P", "strict": True}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "auto"}}


def say(**fields: Any) -> dict[str, Any]:
    """A chat body with one message, or with those given."""
    return {"messages": HI, **fields}


CHAT_BODIES = [
    # OpenAI's SDK: types/chat/completion_create_params.py, and what chat.completions.parse makes of a type.
    Sent("openai: create", say(stream=False)),
    Sent("openai: every optional field null", say(
        audio=None, frequency_penalty=None, logit_bias=None, logprobs=None, max_completion_tokens=None, max_tokens=None,
        metadata=None, modalities=None, moderation=None, n=None, prediction=None, presence_penalty=None,
        prompt_cache_key=None, prompt_cache_retention=None, reasoning_effort=None, safety_identifier=None, seed=None,
        service_tier=None, stop=None, store=None, stream=None, stream_options=None, temperature=None, top_logprobs=None,
        top_p=None, verbosity=None,
    )),
    Sent("openai: parse", say(stream=False, response_format=TYPED)),
    Sent("openai: developer, content parts", {"messages": [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}], "name": "ann"},
    ]}),
    Sent("openai: sampling", say(
        temperature=0.7, top_p=0.9, n=2, seed=1, stop=["\n\n", "END"], presence_penalty=0.1, frequency_penalty=0.1,
        logit_bias={"1": -1}, logprobs=True, top_logprobs=2, max_completion_tokens=20,
    )),
    Sent("openai: a reasoning model", say(reasoning_effort="low", max_completion_tokens=50, verbosity="medium")),
    Sent("openai: nothing for answers", say(
        user="u1", safety_identifier="s", prompt_cache_key="k", prompt_cache_retention="24h", store=True,
        metadata={"a": "b"}, service_tier="auto", prediction={"type": "content", "content": "hi"}, modalities=["text"],
    )),
    Sent("openai: stream", say(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})),
    Sent("openai: the SDK's own message back", {"messages": [*HI, {
        "content": "there", "refusal": None, "role": "assistant", "annotations": [], "audio": None,
        "function_call": None, "tool_calls": None, "reasoning_content": "let me see",
    }, *HI]}),
    Sent("openai: parsed message back", {"messages": [*HI, {
        "content": '{"name":"Ann","age":3}', "refusal": None, "role": "assistant", "annotations": None, "audio": None,
        "function_call": None, "tool_calls": [], "parsed": {"name": "Ann", "age": 3},
    }, *HI]}),
    Sent("openai: tools", say(tools=[TOOL], tool_choice="auto", parallel_tool_calls=True)),
    Sent("openai: parsed calls and their results back", {"messages": [*HI, {
        "content": None, "refusal": None, "role": "assistant", "annotations": None, "audio": None,
        "function_call": None,
        "tool_calls": [{**CALL, "function": {**CALL["function"], "parsed_arguments": {"city": "Bern"}}}],
    }, {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]}], "tools": [TOOL]}),
    Sent("openai: one named tool", say(tools=[STRICT], tool_choice={"type": "function",
        "function": {"name": "weather"}})),
    Sent("openai: a refusal back", {"messages": [*HI, {"role": "assistant", "content": None, "refusal": "No."}, *HI]}),
    Sent("openai: a refusal as a part", {"messages": [*HI, {
        "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, *HI]}),
    Sent("openai: JSON mode", say(response_format={"type": "json_object"})),
    Sent("openai: text format", say(response_format={"type": "text"})),
    Sent("openai: an image", {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, PICTURE]}]},
         ("messages", "read text only")),
    Sent("openai: audio wanted", say(modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"}),
         ("modalities", "text only")),
    Sent("openai: web search", say(web_search_options={"search_context_size": "low"}), ("web_search_options", "tool")),
    Sent("openai: old functions", say(functions=[WEATHER], function_call="auto"), ("functions", "send `tools`")),
    Sent("openai: no functions", say(functions=[], function_call="none")),
    Sent("openai: custom tool", say(tools=[{"type": "custom", "custom": {"name": "sh"}}]), ("tools.0.type",
        "function")),
    Sent("openai: verbosity", say(verbosity="low"), ("verbosity", "say it in a message")),
    # langchain_openai.ChatOpenAI
    Sent("langchain: invoke", say(stream=False)),
    Sent("langchain: stream", say(stream=True)),
    Sent("langchain: stream with usage", say(stream=True, stream_options={"include_usage": True})),
    Sent("langchain: bind_tools", {"stream": False, "messages": [{"content": "s", "role": "system"}, *HI],
        "tools": [TOOL]}),
    Sent("langchain: bind_tools, any and strict", say(
        stream=False, parallel_tool_calls=False, tool_choice="required", tools=[STRICT])),
    Sent("langchain: results of tools", {"stream": False, "tools": [TOOL], "messages": [
        *HI, {"content": None, "role": "assistant", "tool_calls": [CALL]},
        {"content": "sunny", "role": "tool", "tool_call_id": "call_1"}]}),
    Sent("langchain: with_structured_output", say(stream=False, response_format=TYPED)),
    Sent("langchain: function_calling", say(
        stream=False, parallel_tool_calls=False, tool_choice={"type": "function", "function": {"name": "P"}},
        tools=[{"type": "function", "function": {"name": "P", "description": "", "parameters": PERSON}}])),
    Sent("langchain: json_mode", say(stream=False, response_format={"type": "json_object"})),
    Sent("langchain: every setting", say(
        stream=False, service_tier="auto", frequency_penalty=0.1, logprobs=True, max_completion_tokens=20, n=2,
        presence_penalty=0.1, reasoning_effort="low", seed=1, stop=["x"], temperature=0.5, top_logprobs=2, top_p=0.9)),
    # pydantic_ai.models.openai.OpenAIChatModel
    Sent("pydantic-ai: text", {"stream": False, "messages": [{"role": "system", "content": "brief"}, *HI]}),
    Sent("pydantic-ai: output_type", say(stream=False, tool_choice="required", tools=[STRICT, {
        "type": "function", "function": {"name": "final_result", "description": "The final response",
        "parameters": PERSON}}])),
    Sent("pydantic-ai: settings", say(
        stream=False, logit_bias={"1": 1}, logprobs=True, max_completion_tokens=9, reasoning_effort="low", seed=1,
        stop=["x"], temperature=0.0, user="u")),
    # litellm.completion(model="openai/…")
    Sent("litellm", say()),
    Sent("litellm: many settings", say(
        temperature=0, n=2, stop=["x"], max_tokens=9, response_format={"type": "json_object"}, seed=1, tools=[TOOL],
        tool_choice="auto", logprobs=True, top_logprobs=2, reasoning_effort="low", user="u")),
    Sent("litellm: its message back", {"messages": [*HI, {
        "content": "there", "role": "assistant", "tool_calls": None, "function_call": None,
        "provider_specific_fields": {"refusal": None}, "reasoning_content": "hm", "thinking_blocks": []}, *HI]}),
    # agents.OpenAIChatCompletionsModel
    Sent("agents sdk", {"messages": [{"content": "brief", "role": "system"}, *HI]}),
    Sent("agents sdk: tools and handoffs", say(tools=[STRICT, {"type": "function", "function": {
        "name": "transfer_to_b", "description": "Handoff to the B agent.", "strict": True,
        "parameters": {"additionalProperties": False, "type": "object", "properties": {}, "required": []}}}])),
    Sent("agents sdk: output_type", say(response_format={"type": "json_schema", "json_schema": {
        "name": "final_output", "strict": True, "schema": PERSON}})),
    # Vercel's AI SDK: packages/openai-compatible, doGenerate's args; undefined ones are left out of the JSON.
    Sent("vercel ai sdk: generateText", say(
        temperature=0, max_tokens=20, top_p=1, frequency_penalty=0, presence_penalty=0, stop=["x"], seed=0)),
    Sent("vercel ai sdk: streamText with tools", {"stream": True, "stream_options": {"include_usage": True},
         "tools": [TOOL], "tool_choice": "auto", "messages": [{"role": "system", "content": "s"}, *HI]}),
    Sent("vercel ai sdk: results, thoughts back", {"tools": [TOOL], "messages": [
        *HI, {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": '"sunny"'}]}),
    # Chat interfaces.
    Sent("librechat: defaults (its docs, API Default Parameters)", say(
        temperature=1, top_p=1, presence_penalty=0, frequency_penalty=0, user="LibreChat_User_ID", stream=True)),
    Sent("open webui: routers/openai.py", say(stream=True, user={"name": "Ann", "id": "1", "email": "",
        "role": "user"})),
    Sent("open webui: advanced params", say(
        stream=True, temperature=0.8, top_p=0.9, top_k=40, min_p=0.0, seed=42, stop=["x"], frequency_penalty=0.0,
        presence_penalty=0.0, repetition_penalty=1.1, logit_bias={}, reasoning_effort="medium", max_tokens=128)),
    Sent("lm studio: its example", say(temperature=0.7, max_tokens=-1, stream=False)),
    Sent("sillytavern: generic chat completion", say(
        temperature=1, max_tokens=300, stream=True, presence_penalty=0, frequency_penalty=0, top_p=1, top_k=0, min_p=0,
        repetition_penalty=1, seed=-1, stop=[], logit_bias={}, n=1)),
    # Editors and coding agents.
    Sent("cursor: custom base URL", {"temperature": 0, "stream": True, "stream_options": {"include_usage": True},
         "user": "google-oauth2|1", "metadata": {"cursorConversationId": "1"}, "tools": [TOOL], "tool_choice": "auto",
         "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text",
         "text": "hi"}]}]}),
    Sent("continue: core/llm/llms/OpenAI.ts", say(
        max_tokens=40, temperature=0.01, top_p=1, frequency_penalty=0, presence_penalty=0, stop=["<|im_end|>"],
        stream=True, stream_options={"include_usage": True}, prediction={"type": "content", "content": "x"})),
    Sent("cline: api/providers/openai.ts", {"temperature": 0, "stream": True, "stream_options": {"include_usage": True},
         "reasoning_effort": "medium", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [
             {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}]}),
    Sent("aider: through litellm, with cache marks", {"stream": True, "temperature": 0, "messages": [
        {"role": "system", "content": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]}, *HI,
        {"role": "assistant", "content": "Ok."}, *HI]}),
    # Frameworks.
    Sent("crewai: ReAct", say(stop=["\nObservation:"], temperature=0.7)),
    Sent("smolagents: OpenAIServerModel", {"stop": ["Observation:", "Calling tools:"], "tools": [TOOL],
         "tool_choice": "required", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}),
    Sent("autogen: names of speakers", {"stream": False, "messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": "hi", "name": "user"},
        {"role": "assistant", "content": "there", "name": "critic"}, {"role": "user", "content": "go on",
        "name": "user"}]}),
    Sent("instructor: Mode.TOOLS", say(tools=[STRICT], tool_choice={"type": "function",
        "function": {"name": "weather"}})),
    Sent("dspy: through litellm", say(temperature=0.0, max_tokens=40, n=1, logprobs=None)),
    Sent("llama-index: OpenAILike", say(stream=False, temperature=0.1, max_tokens=None, logprobs=None, top_logprobs=0)),
    Sent("lm-evaluation-harness: local-chat-completions", say(max_tokens=25, temperature=0, stop=["\n\n"], seed=1234)),
    Sent("inspect ai", say(max_tokens=20, seed=1, logprobs=True, top_logprobs=3, parallel_tool_calls=None)),
    # Servers whose clients are used with others.
    Sent("vllm's clients: extra sampling", say(
        top_k=-1, min_p=0.0, repetition_penalty=1.0, length_penalty=1.0, ignore_eos=False, min_tokens=0,
        skip_special_tokens=True, spaces_between_special_tokens=True, stop_token_ids=[], use_beam_search=False,
        include_stop_str_in_output=False, add_generation_prompt=True, chat_template_kwargs={"enable_thinking": False})),
    Sent("vllm's clients: guided_choice", say(guided_choice=["a", "b"]), ("guided_choice", "an enum")),
    Sent("openrouter's clients", say(
        reasoning={"effort": "high", "exclude": False}, include_reasoning=True, usage={"include": True}, transforms=[],
        provider={"order": ["x"], "allow_fallbacks": True}, models=["a", "b"], route="fallback")),
    Sent("llama.cpp's web interface", say(stream=True, cache_prompt=True, temperature=0.8, top_k=40, min_p=0.05)),
    Sent("together, fireworks: json_object with a schema", say(response_format={"type": "json_object",
        "schema": PERSON})),
    Sent("mistral's clients: prefix", {"messages": [*HI, {"role": "assistant", "content": "Well", "prefix": True}]},
         ("prefix", "not the rest")),
]  # fmt: skip
"""Of /v1/chat/completions."""

MESSAGE = {"role": "user", "content": "hi"}
ANSWER = {
    "id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "phase": None,
    "content": [{"type": "output_text", "text": "there", "annotations": [], "logprobs": []}],
}  # fmt: skip
THOUGHT = {
    "id": "rs_1", "type": "reasoning", "summary": [], "encrypted_content": None, "status": "completed",
    "content": [{"type": "reasoning_text", "text": "hm"}],
}  # fmt: skip
FORMAT = {"format": {"type": "json_schema", "strict": True, "name": "P", "schema": PERSON}}

FUNCTION = {"type": "function", **WEATHER}
CLOSED_FUNCTION = {"type": "function", **WEATHER, "parameters": CLOSED, "strict": True}
CALLED = {
    "id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Bern"}',
    "status": "completed",
}  # fmt: skip
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}

RESPONSES_BODIES = [
    Sent("openai: tools", {"input": "hi", "tools": [FUNCTION], "tool_choice": "auto", "parallel_tool_calls": True}),
    Sent("openai: no tools", {"input": "hi", "tools": [], "tool_choice": "none", "parallel_tool_calls": False}),
    Sent("openai: calls and results back", {"input": [MESSAGE, THOUGHT, CALLED, RESULT], "tools": [FUNCTION]}),
    Sent("langchain: bind_tools", {"stream": False, "input": [{**MESSAGE, "type": "message"}], "tools": [FUNCTION]}),
    Sent("pydantic-ai: output_type", {"stream": False, "input": [MESSAGE], "tool_choice": "required", "tools": [
        CLOSED_FUNCTION, {"name": "final_result", "parameters": PERSON, "type": "function", "strict": False,
                          "description": "The final response"}]}),
    Sent("agents sdk: tools", {"include": [], "input": [MESSAGE], "instructions": "brief", "tools": [CLOSED_FUNCTION]}),
    Sent("codex: a turn with results", {"instructions": "s", "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}, CALLED, RESULT],
        "tools": [{**FUNCTION, "strict": False}], "tool_choice": "auto", "parallel_tool_calls": False, "store": False,
        "stream": True, "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low", "summary": "auto"}}),
    Sent("openai: web search", {"input": "hi", "tools": [{"type": "web_search"}]}, ("tools.0.type", "function")),
    # OpenAI's SDK: types/responses/response_create_params.py
    Sent("openai: create", {"input": "hi"}),
    Sent("openai: every optional field null", {
        "input": "hi", "background": None, "context_management": None, "include": None, "instructions": None,
        "max_output_tokens": None, "max_tool_calls": None, "metadata": None, "moderation": None, "conversation": None,
        "parallel_tool_calls": None, "previous_response_id": None, "prompt": None, "prompt_cache_key": None,
        "prompt_cache_retention": None, "reasoning": None, "safety_identifier": None, "service_tier": None,
        "store": None, "stream": None, "stream_options": None, "temperature": None, "top_logprobs": None, "top_p": None,
        "truncation": None,
    }),
    Sent("openai: nothing for answers", {
        "input": "hi", "background": False, "include": [], "max_tool_calls": 3, "metadata": {"a": "b"},
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "safety_identifier": "s", "service_tier": "auto",
        "stream_options": {"include_obfuscation": False}, "truncation": "auto", "user": "u",
        "text": {"verbosity": "medium"},
    }),
    Sent("openai: sampling", {"input": "hi", "temperature": 0.7, "top_p": 0.9, "max_output_tokens": 20,
        "top_logprobs": 2,
         "include": ["message.output_text.logprobs"]}),
    Sent("openai: parse", {"input": "hi", "text": FORMAT}),
    Sent("openai: reasoning", {"input": "hi", "reasoning": {"effort": "medium", "summary": "auto"},
         "include": ["reasoning.encrypted_content"]}),
    Sent("openai: developer, its own output back", {"input": [
        {"role": "developer", "content": "Be brief."}, MESSAGE, THOUGHT, ANSWER, {**MESSAGE, "type": "message"}]}),
    Sent("openai: content parts", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}),
    Sent("openai: an image", {"input": [{"role": "user", "content": [
        {"type": "input_image", "image_url": "https://example.org/a.png", "detail": "auto"}]}]}, ("messages",
        "text only")),
    Sent("openai: in the background", {"input": "hi", "background": True}, ("background", "while its client waits")),
    Sent("openai: a stored prompt", {"input": "hi", "prompt": {"id": "p"}}, ("prompt", "send `instructions`")),
    Sent("openai: verbosity", {"input": "hi", "text": {"verbosity": "high"}}, ("verbosity", "say it in a message")),
    # langchain_openai.ChatOpenAI(use_responses_api=True)
    Sent("langchain: invoke", {"stream": False, "input": [{**MESSAGE, "type": "message"}]}),
    Sent("langchain: history", {"stream": False, "input": [
        {"content": "s", "role": "system", "type": "message"}, {**MESSAGE, "type": "message"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "there",
        "annotations": []}]},
        {"content": [{"type": "input_text", "text": "again"}], "role": "user", "type": "message"}]}),
    Sent("langchain: with_structured_output", {"stream": False, "input": [{**MESSAGE, "type": "message"}],
        "text": FORMAT}),
    Sent("langchain: reasoning", {"stream": False, "input": [{**MESSAGE, "type": "message"}],
         "reasoning": {"effort": "medium", "summary": "auto"}}),
    # pydantic_ai.models.openai.OpenAIResponsesModel
    Sent("pydantic-ai", {"stream": False, "input": [MESSAGE], "instructions": "brief"}),
    # agents.OpenAIResponsesModel, the Agents SDK's default
    Sent("agents sdk", {"include": [], "input": [{"content": "hi", "role": "user"}], "instructions": "brief",
        "tools": []}),
    Sent("agents sdk: output_type", {"include": [], "input": [{"content": "hi", "role": "user"}], "tools": [], "text": {
        "format": {"type": "json_schema", "name": "final_output", "schema": PERSON, "strict": True}}}),
    # litellm.responses
    Sent("litellm", {"input": "hi"}),
    # Vercel's AI SDK: packages/openai, responses; OpenAI's Codex: ResponsesApiRequest.
    Sent("vercel ai sdk", {"temperature": 0, "max_output_tokens": 20, "store": False, "user": "u", "include": [
        "reasoning.encrypted_content"], "input": [{"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}),
    Sent("codex", {"instructions": "s", "input": [{"type": "message", "role": "user", "content": [
        {"type": "input_text", "text": "hi"}]}], "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
        "reasoning": {"effort": "high", "summary": "auto"}, "store": False, "stream": True,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "1", "text": {"verbosity": "medium"}}),
]  # fmt: skip
"""Of /v1/responses."""
