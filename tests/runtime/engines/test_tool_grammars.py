"""Whatever the grammar of a role with tools lets a model write is calls that fit, or the role's answer."""

from __future__ import annotations

import random
from collections import Counter
from typing import Literal

import pytest
from pydantic import BaseModel

from metier.agents import parse_answer, tool
from metier.agents.answers.answer_schema import answer_schema
from metier.agents.answers.held_schema import served_schema
from metier.agents.tools.calls import read_calls, read_text_answer, turn_schema
from tests.runtime.engines.grammar_walk import GrammarWalk
from tests.runtime.engines.test_answer_grammars import HALF_PAIR, vllm_accepts

WALKS = 200


class Answer(BaseModel):
    value: int
    sure: bool


class Place(BaseModel):
    city: str
    country: Literal["Norway", "Ghana", "Peru"]
    parts: list[Place] = []


def calculator(expression: str) -> str:
    """Works out a sum."""
    return expression


def weather(place: Place, days: int = 1) -> str:
    """Tells the weather at a place."""
    return place.city * days


def sort(numbers: list[int], order: Literal["up", "down"]) -> str:
    """Sorts numbers."""
    return str(sorted(numbers, reverse=order == "down"))


def now() -> str:
    """Tells the time."""
    return "noon"


TOOLS = {each.name: each for each in map(tool, (calculator, weather, sort, now))}


@pytest.fixture(scope="module")
def walk() -> GrammarWalk:
    return GrammarWalk()


@pytest.mark.parametrize("gives", [Answer, str, int, list[Place]])
def test_random_walks_end_in_calls_that_fit_or_in_the_answer(walk: GrammarWalk, gives: type) -> None:
    schema = served_schema(turn_schema(TOOLS.values(), answer_schema(gives), 3))
    vllm_accepts(schema)
    seen: Counter[str] = Counter()
    for number in range(WALKS):
        text = walk.draw(schema, random.Random(number))
        if text is None or HALF_PAIR.search(text):
            continue
        calls = read_calls(text)
        if calls is None:
            answer = parse_answer(text, gives)
            seen["text" if gives is str and read_text_answer(answer) != answer else "answer"] += 1
            continue
        assert 1 <= len(calls.tool_calls) <= 3
        for call in calls.tool_calls:
            TOOLS[call.name].read(call.arguments)
            seen[call.name] += 1
    assert seen.keys() >= {*TOOLS, "text" if gives is str else "answer"}


def test_where_a_call_must_come_nothing_else_does(walk: GrammarWalk) -> None:
    schema = served_schema(turn_schema(TOOLS.values(), None, 1, must_call=True))
    vllm_accepts(schema)
    texts = [walk.draw(schema, random.Random(number)) for number in range(20)]
    for text in texts:
        calls = None if text is None or HALF_PAIR.search(text) else read_calls(text)
        assert text is None or HALF_PAIR.search(text) or (calls is not None and len(calls.tool_calls) == 1)
    assert any(text is not None for text in texts)
