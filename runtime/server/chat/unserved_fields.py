"""Fields that common clients send and that have no effect here: those that may be there, and those that may not.

docs/client-fields.md is written from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping

from .client_body import Unserved

__all__ = ["CALL", "CHAT", "MESSAGE", "PART", "RESPONSES", "TEXT_OPTIONS"]

_TEXT_ONLY = "the models served here read and write text only"
_NOBODY_JUDGES = "nothing here moderates"
_CACHED = Unserved("prefixes are cached anyway")

_EVERYWHERE: Mapping[str, Unserved] = {
    "user": Unserved("answers do not depend on who asks"),
    "safety_identifier": Unserved("answers do not depend on who asks"),
    "service_tier": Unserved("there is one tier; `priority` says who goes first"),
    "prompt_cache_key": _CACHED,
    "prompt_cache_retention": _CACHED,
    "prompt_cache_options": _CACHED,
    "moderation": Unserved(_NOBODY_JUDGES, ()),
}

CHAT: Mapping[str, Unserved] = {
    **_EVERYWHERE,
    "metadata": Unserved("it is for who keeps completions, and none are kept"),
    "store": Unserved("it is for who keeps completions, and none are kept"),
    "prediction": Unserved("it makes answers faster, not other ones"),
    "modalities": Unserved(_TEXT_ONLY, (["text"],)),
    "audio": Unserved(_TEXT_ONLY, ()),
    "web_search_options": Unserved("nothing is searched for; bring a tool that does", ()),
    "verbosity": Unserved("no model here was trained to be told; say it in a message", ("medium",)),
    "functions": Unserved("it is the old form of tools; send `tools`", ([],)),
    "function_call": Unserved("it is the old form of tool_choice; send `tool_choice`", ("none", "auto")),
    # Of vLLM's, llama.cpp's and OpenRouter's clients.
    "cache_prompt": _CACHED,
    "provider": Unserved("there is one provider"),
    "models": Unserved("the one named by `model` answers"),
    "route": Unserved("the one named by `model` answers"),
    "usage": Unserved("usage comes with every reply"),
    "transforms": Unserved("messages are asked with as they are", ([],)),
    "plugins": Unserved("there are none", ([],)),
    "include_reasoning": Unserved("thinking comes with the answer; `thinking: off` has none", (True,)),
    "separate_reasoning": Unserved("thinking comes apart from the answer", (True,)),
    "best_of": Unserved("answers are not ranked; `n` gives several", (1,)),
    "use_beam_search": Unserved("beams are not searched", (False,)),
    "length_penalty": Unserved("beams are not searched", (1, 1.0)),
    "min_tokens": Unserved("answers end where the model ends them", (0,)),
    "ignore_eos": Unserved("answers end where the model ends them", (False,)),
    "include_stop_str_in_output": Unserved("answers end before what stops them", (False,)),
    "stop_token_ids": Unserved("answers end at text; send `stop`", ([],)),
    "bad_words": Unserved("words are not kept out; send `logit_bias`", ([],)),
    "skip_special_tokens": Unserved("special tokens are no part of answers", (True,)),
    "spaces_between_special_tokens": Unserved("special tokens are no part of answers", (True, False)),
    "add_generation_prompt": Unserved("the reply is a message of the assistant's own", (True,)),
    "continue_final_message": Unserved("the reply is a message of the assistant's own", (False,)),
    "echo": Unserved("the reply is a message of the assistant's own", (False,)),
    "add_special_tokens": Unserved("the chat template says which there are", (False,)),
    "return_token_ids": Unserved("tokens are told as text", (False,)),
    "return_tokens_as_token_ids": Unserved("tokens are told as text", (False,)),
    "guided_json": Unserved("send `response_format` with json_schema", ()),
    "guided_choice": Unserved("send `response_format` with json_schema and an enum", ()),
    "guided_regex": Unserved("send `response_format` with json_schema and a pattern", ()),
    "guided_grammar": Unserved("send `response_format` with json_schema", ()),
    "structured_outputs": Unserved("send `response_format` with json_schema", ({},)),
    # Values that stand for a field left out.
    "seed": Unserved("any seed", (-1,)),
    "top_k": Unserved("all tokens", (-1,)),
    "max_tokens": Unserved("no limit of the client's", (-1, 0)),
    "max_completion_tokens": Unserved("no limit of the client's", (-1, 0)),
    "stop": Unserved("nothing stops", ("", [])),
    "logit_bias": Unserved("no bias", ({},)),
    "tools": Unserved("there are none", ([],)),
    "chat_template_kwargs": Unserved("nothing is told to the template", ({},)),
}
"""Of a chat completion."""

_THOUGHT = Unserved("earlier thoughts are not asked with")
_MARKS = Unserved("marks of other services")

MESSAGE: Mapping[str, Unserved] = {
    "name": Unserved("templates of models have no names"),
    "annotations": Unserved("links beside an earlier answer, not its text"),
    "reasoning_content": _THOUGHT,
    "reasoning": _THOUGHT,
    "reasoning_details": _THOUGHT,
    "thinking_blocks": _THOUGHT,
    "parsed": Unserved("the content again, as an object"),
    "id": _MARKS,
    "index": _MARKS,
    "cache_control": _MARKS,
    "provider_specific_fields": _MARKS,
    "audio": Unserved(_TEXT_ONLY, ()),
    "images": Unserved(_TEXT_ONLY, ([],)),
    "function_call": Unserved("it is the old form of calls; send `tool_calls`", ()),
    "prefix": Unserved("the reply is a message of its own, not the rest of this one", (False,)),
    "tool_calls": Unserved("there are none", ([],)),
}
"""Of a message."""

PART: Mapping[str, Unserved] = {
    "annotations": Unserved("links beside an earlier answer, not its text"),
    "logprobs": Unserved("of an earlier answer"),
    "cache_control": _MARKS,
    "prompt_cache_breakpoint": _MARKS,
}
"""Of a piece of a message's content."""

CALL: Mapping[str, Unserved] = {
    "index": _MARKS,
    "extra_content": _MARKS,
    "provider_specific_fields": _MARKS,
    "cache_control": _MARKS,
    "parsed_arguments": Unserved("the arguments again, as an object"),
}
"""Of a tool, a call, or its function."""

RESPONSES: Mapping[str, Unserved] = {
    **_EVERYWHERE,
    "stream_options": Unserved("it says how texts are padded on their way"),
    "background": Unserved("a response is answered while its client waits", (False,)),
    "background_options": Unserved("a response is answered while its client waits"),
    "context_management": Unserved("what was said is neither shortened nor summed up", ([],)),
    "max_tool_calls": Unserved("it bounds tools of the service's own, and there are none"),
    "prompt": Unserved("no prompts are kept; send `instructions`", ()),
    "truncation": Unserved("what is too long is refused with the number of tokens", ("disabled", "auto")),
    "access_programs": _MARKS,
    "image": Unserved(_TEXT_ONLY),
    "tools": Unserved("there are none", ([],)),
    "max_output_tokens": Unserved("no limit of the client's", (-1, 0)),
}
"""Of a response."""

TEXT_OPTIONS: Mapping[str, Unserved] = {"verbosity": CHAT["verbosity"]}
"""Of a response's `text`."""
