"""The prompt layout is fixed, and replies become typed answers or errors that quote them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from metier.agents import PROMPT_LAYOUT, AnswerError, GraphError, Message, Role, parse_answer, render_prompt
from metier.agents.answers.answers import correction_messages, split_thinking
from metier.agents.prompts import prompt_layout
from tests.agents.workflow import Answer, Plan, Puzzle, Verdict, critic, planner


def test_layout_one_is_fixed() -> None:
    """Adapters are trained on this text: a change needs a new PROMPT_LAYOUT."""
    assert PROMPT_LAYOUT == 2 and prompt_layout(Plan) == 1
    inputs = {"puzzle": Puzzle(text="3 cows"), "verdict": Verdict(correct=False, why="too many")}
    system, user = render_prompt(planner, inputs)
    assert system.content == "You are one specialist in a team. Do only your own step."
    assert user.content == (
        "# puzzle\n3 cows\n\n# verdict\ncorrect: false\nwhy: too many\n\n"
        '# Your step: planner\nPlan 3 cows.\nReply as JSON: {"expression": string}'
    )


def test_missing_optional_inputs_are_left_out() -> None:
    assert "verdict" not in render_prompt(planner, {"puzzle": Puzzle(text="x"), "verdict": None})[1].content


def test_shared_context_comes_first() -> None:
    """Two roles on the same puzzle share a prefix up to what differs."""
    first = render_prompt(planner, {"puzzle": Puzzle(text="3 cows")})[1].content
    second = render_prompt(critic, {"puzzle": Puzzle(text="3 cows"), "answer": Answer(value=1)})[1].content
    assert first.startswith("# puzzle\n3 cows\n\n# ") and second.startswith("# puzzle\n3 cows\n\n# ")


def test_examples_are_turns_before_the_ask() -> None:
    inputs = {"puzzle": Puzzle(text="3 cows"), "verdict": None}
    shown = (Message(role="user", content="2 cows"), Message(role="assistant", content='{"expression":"2*4"}'))
    system, *examples, ask = render_prompt(replace(planner, examples=shown), inputs)
    assert (system, ask) == render_prompt(planner, inputs)
    assert tuple(examples) == shown


def test_examples_that_do_not_take_turns_are_refused() -> None:
    with pytest.raises(GraphError, match="examples of user"):
        replace(planner, examples=(Message(role="user", content="2 cows"),))


def test_a_template_that_reads_a_missing_field_names_it() -> None:
    role = Role("planner", takes=Puzzle, gives=Plan, instructions="{{ puzzle.txt }}")
    with pytest.raises(GraphError, match="no attribute 'txt'"):
        render_prompt(role, {"puzzle": Puzzle(text="x")})


@given(st.text(alphabet=st.characters(exclude_characters="{}", exclude_categories=["Cs"])), st.integers(), st.text())
def test_json_is_found_inside_other_text(before: str, value: int, after: str) -> None:
    text = f'{before}{{"value": {value}}}{after}'
    assert parse_answer(text, Answer) == Answer(value=value)


@pytest.mark.parametrize("text", ["", "no json", '{"value": "many"}', '{"valu": 3}', '{"value": 3'])
def test_misfits_quote_the_reply(text: str) -> None:
    with pytest.raises(AnswerError) as caught:
        parse_answer(text, Answer)
    assert repr(text) in str(caught.value)
    assert "JSON with the fields value" in str(caught.value)


class Tree(BaseModel):
    label: str
    children: list[Tree] = []
    note: Any = None


@pytest.mark.parametrize(
    "text",
    [
        '{"label":"root","children":[{"label":"leaf","children":[]},{"la',  # cut off
        'Here: {"label":"root","children":[{"label":"leaf"}',
        '{"label":"root", oops {"label":"leaf"}}',  # malformed around a whole one
        '{"label": "root", "note": "\\ud800"}',  # half of a surrogate pair, as JSON and as text
        '{"label": "\ud800"}',
        '{"label": "root", "note": ' + "9" * 4301 + "}",
        '{"label": "root", "note": ' + '{"a":' * 1000 + "1" + "}" * 1001,
        "{" * 200_000,
        '{"' * 200_000,
        '{"a":' * 200_000,
        '{"a"}' * 200_000,
        '"' + '\\"' * 200_000 + "\\",
    ],
    ids=range(12),
)
def test_what_is_no_whole_answer_is_never_taken_for_one(text: str) -> None:
    with pytest.raises(AnswerError, match="reply"):
        parse_answer(text, Tree)


def test_a_string_may_hold_braces_and_quotes() -> None:
    text = 'So: {"label": "a } in \\" { a string", "children": []} and that is all'
    assert parse_answer(text, Tree).label == 'a } in " { a string'


def test_free_text_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(AnswerError, match="surrogate pair at character 4"):
        parse_answer("a b \ud83d", str)


def test_correction_says_what_was_wrong() -> None:
    messages = render_prompt(planner, {"puzzle": Puzzle(text="x")})
    corrected = correction_messages(messages, "junk", AnswerError("x", expected="JSON with the fields expression"))
    assert corrected[:2] == messages
    assert [m.role for m in corrected[2:]] == ["assistant", "user"]
    assert "JSON with the fields expression" in corrected[3].content


def test_thinking_is_split_from_the_answer() -> None:
    assert split_thinking("<think>\n2+2\n</think>\n4") == ("2+2", "4")
    assert split_thinking("4") == ("", "4")
    assert split_thinking("<think>still") == ("still", "")
