"""Rows with thinking are trained on as the tokens that an engine puts together and reads apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from metier.agents import Message, TrafficRow
from metier.agents.messages import Ask
from metier.agents.thinking import THINKING_OFF, ThinkingProfile, ThinkingTags
from metier.runtime.engines.thinking_asks import ReplyReader, ThinkingAsks
from metier.runtime.plugin.thinking.end_tag import end_tag
from metier.specializers.training.batches import encode_rows

MESSAGES = (Message(role="user", content="Add 12 and 7."),)
TAGS = ThinkingTags()


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


def served_prompt(tokenizer: Any, thinking: ThinkingProfile | None) -> list[int]:
    """The prompt of an ask, as an engine makes it."""
    ask = Ask(run_id="r", step_path="s", role="solver", messages=MESSAGES, thinking=thinking)
    ids = tokenizer.apply_chat_template(
        [m.model_dump() for m in MESSAGES], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ThinkingAsks(tokenizer, TAGS, context_tokens=512).add_block(ask, ids)


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
