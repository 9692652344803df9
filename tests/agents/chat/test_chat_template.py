"""What is read from a chat template, one kind after another, and the prompts that are made with it."""

from __future__ import annotations

from typing import Any

import pytest

from metier.agents.chat.chat_template import ChatTemplate, TemplateSettings
from metier.agents.errors import ChatTemplateError, SettingsError
from metier.agents.thinking import ThinkingTags
from tests.chat_templates import TEMPLATES, tokenizer_of

TOKENIZERS = {family: tokenizer_of(family) for family in TEMPLATES}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]


def template_of(family: str, args: dict[str, Any] | None = None, tags: ThinkingTags | None = None) -> ChatTemplate:
    return ChatTemplate(TOKENIZERS[family], TemplateSettings(args=args or {}, tags=tags))


def text(template: ChatTemplate, thinks: bool | None = None, messages: list[dict[str, str]] = CHAT) -> str:
    written: str = template.tokenizer.decode(template.prompt(messages, thinks))
    return written


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


# -- turns ---------------------------------------------------------------------------------------------------


def test_a_system_text_goes_into_the_first_user_turn_where_there_is_no_such_role() -> None:
    assert text(template_of("gemma2")) == (
        "<bos><start_of_turn>user\nBe brief.\n\n2 + 2?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert text(template_of("mistral")) == "<s>[INST] Be brief.\n\n2 + 2? [/INST]"


def test_also_where_a_template_leaves_it_out_without_a_word() -> None:
    assert text(template_of("phi3_first")) == "<|user|>\nBe brief.\n\n2 + 2?<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("family", ["chatml", "llama3", "phi3", "qwen3", "gemma3", "deepseek_r1", "smollm3"])
def test_a_template_that_takes_the_system_role_gets_it(family: str) -> None:
    template = template_of(family)
    assert template.fit(CHAT) == CHAT
    plain = template.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert template.prompt(CHAT) == plain


def test_turns_of_one_role_become_one_where_roles_alternate() -> None:
    chat = turns(
        ("system", "Be brief."),
        ("user", "a"),
        ("user", "b"),
        ("assistant", "c"),
        ("assistant", "d"),
        ("user", "e"),
        ("system", "f"),
    )
    fitted = turns(("user", "Be brief.\n\na\n\nb"), ("assistant", "c\n\nd"), ("user", "e\n\nf"))
    assert template_of("gemma2").fit(chat) == template_of("mistral").fit(chat) == fitted
    assert template_of("chatml").fit(chat) == chat
    # A later system's turn replaces the first one there.
    r1 = template_of("deepseek_r1").fit(chat)
    assert r1 == [*chat[:5], *turns(("user", "e\n\nf"))]


@pytest.mark.parametrize("family", TEMPLATES)
def test_no_text_is_lost_or_out_of_place(family: str) -> None:
    chat = turns(("system", "aa1"), ("user", "bb2"), ("assistant", "cc3"), ("user", "dd4"), ("user", "ee5"))
    written = text(template_of(family), messages=chat)
    places = [written.index(turn["content"]) for turn in chat]
    assert places == sorted(places)


def test_a_chat_that_cannot_be_written_is_refused_by_name() -> None:
    with pytest.raises(ChatTemplateError, match="no conversation that the assistant begins"):
        template_of("mistral").prompt(turns(("assistant", "Hello."), ("user", "2 + 2?")))
    assert text(template_of("chatml"), messages=turns(("assistant", "Hello."), ("user", "2 + 2?")))
    bare = tokenizer_of("chatml")
    bare.chat_template = None
    with pytest.raises(ChatTemplateError, match="has no chat template.*Use its instruct version"):
        ChatTemplate(bare).prompt(CHAT)
    bare.chat_template = "{{ raise_exception('Never.') }}"
    with pytest.raises(ChatTemplateError, match="refuses messages of the roles system, user: Never."):
        ChatTemplate(bare).prompt(CHAT)


# -- ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("chatml_base", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma2", "<end_of_turn>"),
        ("gemma3", "<end_of_turn>"),
        ("mistral", "</s>"),
        ("phi3", "<|end|>"),
        ("phi3_first", "<|end|>"),
        ("qwen3", "<|im_end|>"),
        ("deepseek_r1", "<｜end▁of▁sentence｜>"),
        ("magistral", "</s>"),
        ("gpt_oss", "<|return|>"),
        ("gemma4", "<turn|>"),
        ("granite3.2", "<|end_of_text|>"),
    ],
)
def test_a_turn_ends_as_the_template_ends_it(family: str, end: str) -> None:
    template = template_of(family)
    assert template.tokenizer.convert_ids_to_tokens(template.end_of_turn) == end
    assert template.reply_tokens("4", None) == [*template.tokenizer("4").input_ids, template.end_of_turn]


def test_a_template_without_a_mark_ends_as_the_tokenizer_does() -> None:
    tokenizer = tokenizer_of("chatml_base")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert ChatTemplate(tokenizer).end_of_turn == tokenizer.eos_token_id


# -- thinking ------------------------------------------------------------------------------------------------

_FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
# Family → its open tag and its closed block, and whether it opens thinking when nothing is said about it.
THINKING = {
    "qwen3": ("<think>\n", "<think>\n\n</think>\n\n", False),
    "qwen3.5": ("<think>\n", "<think>\n\n</think>\n\n", False),
    "qwq": ("<think>\n", "<think>\n\n</think>\n\n", True),
    "deepseek_r1": ("<think>", "<think></think>", True),
    "deepseek_v3.1": ("<think>", "</think>", False),
    "smollm3": ("<think>\n", "<think>\n\n</think>\n", False),
    "magistral": ("[THINK]\n", "[THINK]\n[/THINK]", False),
    "gpt_oss": ("<|channel|>analysis<|message|>", f"<|channel|>analysis<|message|>{_FINAL}", False),
    "gemma4": ("<|channel>thought\n", "<|channel>thought\n<channel|>", False),
    "granite3.2": (
        "Here is my thought process:\n",
        "Here is my thought process:\nHere is my response:",
        False,
    ),
}
CLOSE = {
    "magistral": "[/THINK]",
    "gpt_oss": _FINAL,
    "gemma4": "<channel|>",
    "granite3.2": "Here is my response:",
}


@pytest.mark.parametrize("family", THINKING)
def test_tags_and_the_closed_block_are_read_from_the_template(family: str) -> None:
    opened, empty, opens = THINKING[family]
    thinking = template_of(family).thinking
    assert (thinking.tags.open, thinking.tags.empty) == (opened, empty)
    assert thinking.tags.close == CLOSE.get(family, "</think>")
    assert thinking.known and thinking.opens == opens


# What the system's turn says about thinking, where it does.
SAID = {
    "gemma4": "<|think|>\n",
    "granite3.2": " Write your thoughts after 'Here is my thought process:' and write your response after "
    "'Here is my response:' for each user query.",
}


@pytest.mark.parametrize("family", THINKING)
def test_a_block_is_opened_once_and_closed_once(family: str) -> None:
    template, (opened, empty, opens) = template_of(family), THINKING[family]
    on, off, unsaid = (text(template, thinks).replace(SAID.get(family, "\0"), "") for thinks in (True, False, None))
    assert on.endswith(opened) and on.count(opened.strip()) == 1
    assert off.endswith(empty) and off.count(template.thinking.tags.close) == 1
    assert on.removesuffix(opened).replace("/think", "") == off.removesuffix(empty).replace("/no_think", "")
    assert unsaid.endswith(opened) == opens


@pytest.mark.parametrize("family", sorted(set(TEMPLATES) - set(THINKING)))
def test_a_template_that_does_not_know_thinking_gets_the_usual_tags(family: str) -> None:
    template, usual = template_of(family), ThinkingTags()
    assert template.thinking.tags == usual and not template.thinking.known and not template.thinking.opens
    assert text(template, True) == text(template) + usual.open
    assert text(template, False) == text(template) + usual.empty


@pytest.mark.parametrize("end", ["<think>", "<think>\n", "<think>\n\n"])
def test_whatever_white_space_a_template_opens_with(end: str) -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template += "{% if add_generation_prompt %}" + end.replace("\n", "{{ '\\n' }}") + "{% endif %}"
    template = ChatTemplate(tokenizer)
    plain = text(template_of("chatml"))
    assert text(template) == text(template, True) == plain + end
    assert text(template, False) == plain + end + "</think>"


def test_a_users_text_is_never_taken_for_the_templates_own_block() -> None:
    tokenizer = tokenizer_of("mistral")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{# <think> #}"
    template = ChatTemplate(tokenizer)
    chat = turns(("user", "What does <think>\n"))
    assert text(template, True, chat) == "What does <think>\n<think>\n"
    assert text(template, False, chat) == "What does <think>\n<think>\n</think>"


def test_tags_of_the_settings_go_before_those_of_the_template() -> None:
    tags = ThinkingTags(open="<think>", close="</think>", empty="<think> </think>")
    template = template_of("qwen3", tags=tags)
    assert template.thinking.tags == tags
    assert text(template, False).endswith("assistant\n<think> </think>")
    assert text(template, True).endswith("assistant\n<think>")


def test_tags_that_are_special_tokens_are_known() -> None:
    assert all(template_of(family).tags_are_special for family in ("magistral", "gpt_oss", "gemma4"))
    assert not template_of("granite3.2").tags_are_special
    assert not template_of("qwen3").tags_are_special and not template_of("chatml").tags_are_special


# -- arguments -----------------------------------------------------------------------------------------------


def test_arguments_of_the_settings_reach_the_template_and_a_profile_goes_before_them() -> None:
    off = template_of("qwen3", {"enable_thinking": False})
    assert text(off).endswith("assistant\n<think>\n\n</think>\n\n")
    assert text(off, True) == text(template_of("qwen3"), True)
    assert "/no_think" in text(template_of("smollm3", {"enable_thinking": False}))
    assert "/no_think" in text(template_of("smollm3"), False) and "Mode: /think" in text(template_of("smollm3"), True)
    assert text(template_of("deepseek_v3.1", {"thinking": True})).endswith("<think>")
    assert template_of("deepseek_v3.1", {"thinking": True}).thinking.opens


def test_an_argument_that_the_messages_give_is_refused() -> None:
    with pytest.raises(SettingsError, match="chat template argument 'messages'"):
        TemplateSettings(args={"messages": []})
