"""Prompts of a role with memory share their tokens in every family's chat template: what the prefix cache can have."""

from __future__ import annotations

import pytest

from metier.agents import Role, Turn
from metier.agents.chat.chat_template import ChatTemplate
from metier.agents.prompts import render_prompt
from tests.agents.workflow import Answer, Puzzle
from tests.chat_templates import TEMPLATES, tokenizer_of

OPENED = {"qwen3.5": 6, "qwq": 2, "deepseek_r1": 7, "deepseek_v3.1": 1, "gemma4": 10}
"""Templates that begin the reply with a mark of thinking, which earlier replies do not have: tokens of that mark."""


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_prompt_begins_with_the_last_one(family: str) -> None:
    template = ChatTemplate(tokenizer_of(family))
    role = Role("solver", takes=Puzzle, gives=Answer, instructions="Solve it.", memory=True)
    turns: list[Turn] = []
    last: list[int] = []
    for number in range(4):
        messages = render_prompt(role, {"puzzle": Puzzle(text=f"{number} + 2")}, (), turns)
        prompt = template.prompt([{"role": m.role, "content": m.content} for m in messages])
        same = len(last) - OPENED.get(family, 0)
        assert number == 0 or prompt[:same] == last[:same]
        turns.append(Turn(asked=messages[-1].content, replied=f'{{"value":{number + 2}}}'))
        last = prompt
