"""Rows with thinking are trained on as the tokens that an engine puts together and reads apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from metier.agents import Message, TrafficRow, TrainingError
from metier.agents.chat.chat_template import ChatTemplate, TemplateSettings
from metier.agents.messages import Ask
from metier.agents.thinking import THINKING_OFF, ThinkingProfile, ThinkingTags
from metier.runtime.engines.thinking_asks import ReplyReader
from metier.runtime.engines.vllm_calls import prompt_token_ids
from metier.runtime.plugin.thinking.end_tag import end_tag
from metier.specializers.training.batches import encode_rows
from tests.chat_templates import TEMPLATES, tokenizer_of

MESSAGES = (Message(role="user", content="Add 12 and 7."),)
TAGS = ThinkingTags()


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


def served_prompt(tokenizer: Any, thinking: ThinkingProfile | None) -> list[int]:
    """The prompt of an ask, as an engine makes it."""
    ask = Ask(run_id="r", step_path="s", role="solver", messages=MESSAGES, thinking=thinking)
    return prompt_token_ids(ChatTemplate(tokenizer), ask, context_tokens=512)


@pytest.mark.parametrize(
    ("thinking", "profile"), [(None, None), ("", THINKING_OFF), ("12+7=19", ThinkingProfile(max_tokens=40))]
)
def test_the_prompt_is_the_one_that_is_served(
    tokenizer: Any, thinking: str | None, profile: ThinkingProfile | None
) -> None:
    row = TrafficRow(role="solver", messages=MESSAGES, reply='{"value":19}', thinking=thinking)
    (encoded,) = encode_rows([row], tokenizer, max_row_tokens=200)
    assert list(encoded.tokens[: encoded.prompt_tokens]) == served_prompt(tokenizer, profile)


@pytest.mark.parametrize("thinking", ["12+7=19", "with a < in it", "ends in >"])
def test_what_is_learned_is_read_apart_again(tokenizer: Any, thinking: str) -> None:
    row = TrafficRow(role="solver", messages=MESSAGES, reply='{"value":19}', thinking=thinking)
    (encoded,) = encode_rows([row], tokenizer, max_row_tokens=200)
    learned = list(encoded.tokens[encoded.prompt_tokens :])
    assert learned[-1] == tokenizer.eos_token_id
    reader = ReplyReader(end_tag(tokenizer, TAGS.close), answer_limit=40)
    for token in learned[:-1]:
        reader.read(tokenizer.decode([token]), [token])
    assert (reader.thinking, reader.answer) == (thinking, '{"value":19}')
    assert reader.thinking_tokens == len(tokenizer.encode(thinking, add_special_tokens=False))


def test_without_thinking_only_the_answer_is_learned(tokenizer: Any) -> None:
    rows = [TrafficRow(role="solver", messages=MESSAGES, reply="19", thinking=thinking) for thinking in (None, "")]
    plain, off = encode_rows(rows, tokenizer, max_row_tokens=200)
    assert plain.tokens[plain.prompt_tokens :] == off.tokens[off.prompt_tokens :]
    assert plain.prompt_tokens < off.prompt_tokens


def test_a_template_that_opens_thinking_is_not_made_to_do_so_twice(tokenizer: Any) -> None:
    opening = copy.deepcopy(tokenizer)
    opening.chat_template += "{% if add_generation_prompt %}" + TAGS.open + "{% endif %}"
    rows = [TrafficRow(role="solver", messages=MESSAGES, reply="19", thinking=thinking) for thinking in ("", "hm")]
    assert [row.tokens for row in encode_rows(rows, opening, max_row_tokens=200)] == [
        row.tokens for row in encode_rows(rows, tokenizer, max_row_tokens=200)
    ]


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize(
    ("thinking", "profile"), [(None, None), ("", THINKING_OFF), ("12+7=19", ThinkingProfile(max_tokens=40))]
)
def test_every_familys_rows_have_the_prompt_that_is_served_and_its_end_of_turn(
    family: str, thinking: str | None, profile: ThinkingProfile | None
) -> None:
    tokenizer, messages = tokenizer_of(family), (Message(role="system", content="Be brief."), *MESSAGES)
    row = TrafficRow(role="solver", messages=messages, reply="19", thinking=thinking)
    (encoded,) = encode_rows([row], tokenizer, max_row_tokens=400)
    ask = Ask(run_id="r", step_path="s", role="solver", messages=messages, thinking=profile)
    template = ChatTemplate(tokenizer)
    assert list(encoded.tokens[: encoded.prompt_tokens]) == prompt_token_ids(template, ask, context_tokens=512)
    learned = list(encoded.tokens[encoded.prompt_tokens :])
    assert learned[-1] == template.end_of_turn
    close = template.thinking.tags.close
    # Without a profile a template that has opened thinking has it closed again, so that the answer is no thought.
    before = close if thinking is None and template.thinking.opens else (thinking + close if thinking else "")
    assert tokenizer.decode(learned[:-1]) == before + "19"


def test_arguments_of_the_template_are_those_that_are_served() -> None:
    tokenizer, settings = tokenizer_of("qwen3"), TemplateSettings(args={"enable_thinking": False})
    row = TrafficRow(role="solver", messages=MESSAGES, reply="19")
    (encoded,) = encode_rows([row], tokenizer, max_row_tokens=200, template=settings)
    assert tokenizer.decode(encoded.tokens).endswith("<think>\n\n</think>\n\n19<|im_end|>")


def test_a_row_that_the_template_cannot_write_is_refused_with_its_number() -> None:
    rows = [
        TrafficRow(role="solver", messages=messages, reply="19")
        for messages in (MESSAGES, (Message(role="assistant", content="Hello."), *MESSAGES))
    ]
    with pytest.raises(TrainingError, match="training row 2: .* no conversation that the assistant begins"):
        encode_rows(rows, tokenizer_of("gemma2"), max_row_tokens=200)
