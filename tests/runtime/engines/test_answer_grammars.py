"""What a graph's build accepts is served by vLLM's grammar, and what the grammar lets a model write is an answer."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, create_model

from metier.agents import AnswerError, GraphError, parse_answer
from metier.agents.answers.answer_schema import answer_schema, check_answer_type
from metier.agents.answers.answer_shape import answer_shape
from metier.agents.answers.held_schema import grammar_of, served_schema
from metier.agents.recorded_values import dump, load
from metier.agents.tools.calls import turn_schema
from metier.agents.tools.tool import tool
from tests.agents.answer_zoo import WEAK, YES, Colour, Tree
from tests.runtime.engines.grammar_walk import GrammarWalk

DRAWS = 12
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape of half a surrogate pair: grammars allow it alone, which is no text; such a reply is refused."""


@pytest.fixture(scope="module")
def walk() -> GrammarWalk:
    return GrammarWalk()


def vllm_accepts(schema: dict[str, Any]) -> None:
    """vLLM's own check of a request, for the grammar that serves the schema; raises what it raises."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.structured_output.backend_guidance import validate_guidance_grammar
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    params = SamplingParams(structured_outputs=StructuredOutputsParams(json=schema))
    (validate_xgrammar_grammar if grammar_of(schema) == "xgrammar" else validate_guidance_grammar)(params)


def drawn(walk: GrammarWalk, gives: Any, seed: int) -> Iterator[str]:
    schema = answer_schema(gives)
    assert schema is not None
    for number in range(DRAWS):
        text = walk.draw(schema, random.Random(100 * seed + number))
        if text is not None and not HALF_PAIR.search(text):
            yield text


def check_recorded(value: Any, gives: Any) -> None:
    same, text = dump(value, gives)
    back = load(text, gives)
    assert back == same or repr(back) == repr(same)


@pytest.mark.parametrize("name", YES)
def test_every_type_of_the_zoo_is_served_and_read(walk: GrammarWalk, name: str) -> None:
    gives = YES[name]
    schema = answer_schema(gives)
    assert schema is not None
    vllm_accepts(schema)
    texts = list(drawn(walk, gives, seed=len(name)))
    assert texts
    for text in texts:
        try:
            value = parse_answer(text, gives)
        except AnswerError:
            assert name in WEAK, text
        else:
            check_recorded(value, gives)


LEAVES = st.sampled_from(
    [
        str, int, float, bool, type(None), Colour, Tree, Literal["a", 2], Annotated[int, Field(ge=-3, le=12)],
        Annotated[float, Field(gt=0, lt=1)], Annotated[str, Field(max_length=5)],
        Annotated[str, Field(pattern="^[a-z]{2}$")], Any,
    ]
)  # fmt: skip
NAMES = st.sampled_from(["a", "b", "long_name", "Title", "with_2"])


def models(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    field = st.tuples(inner, st.sampled_from(["", "alias", "described"]))

    def make(fields: dict[str, Any]) -> Any:
        made: dict[str, Any] = {}
        for name, (kind, extra) in fields.items():
            more = {"alias": {"alias": f"{name}-as"}, "described": {"description": "it is"}}
            made[name] = (kind, Field(**more.get(extra, {})))
        return create_model("Made", **made)

    return st.dictionaries(NAMES, field, max_size=4).map(make)


KINDS = st.recursive(
    LEAVES,
    lambda inner: (
        models(inner)
        | inner.map(lambda kind: list[kind])  # type: ignore[valid-type]
        | inner.map(lambda kind: dict[str, kind])  # type: ignore[valid-type]
        | inner.map(lambda kind: set[Colour] | kind)
        | st.tuples(inner, inner).map(lambda pair: tuple[pair[0], pair[1]])  # type: ignore[misc]
        | st.tuples(inner, inner).map(lambda pair: pair[0] | None if pair[0] is not type(None) else pair[1])
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(kind=KINDS, seed=st.integers(0, 999))
def test_what_the_build_accepts_is_served_and_read(walk: GrammarWalk, kind: Any, seed: int) -> None:
    try:
        check_answer_type(kind, "the answer")
    except GraphError:
        return
    if kind is str:
        return
    schema = answer_schema(kind)
    assert schema is not None
    vllm_accepts(schema)
    assert answer_shape(kind).text
    text = walk.draw(schema, random.Random(seed))
    if text is not None and not HALF_PAIR.search(text):
        check_recorded(parse_answer(text, kind), kind)


def choose(ids: set[int], place: Path, tree: Tree, of: Annotated[int, Field(multiple_of=5)]) -> str:
    """Choose."""
    return "chosen"


def test_arguments_of_tools_are_served_like_answers() -> None:
    vllm_accepts(served_schema(turn_schema([tool(choose)], answer_schema(YES["odds"]), 4)))


class Fives(BaseModel):
    """Rules that guidance holds and xgrammar does not."""

    fives: Annotated[int, Field(multiple_of=5, ge=0)]
    code: Annotated[str, Field(pattern="^[a-z]+$", min_length=2, max_length=4)]


def test_what_xgrammar_cannot_hold_is_held_by_guidance(walk: GrammarWalk) -> None:
    schema = answer_schema(Fives) or {}
    assert grammar_of(schema) == "guidance" and schema["properties"]["fives"]["multipleOf"] == 5
    vllm_accepts(schema)
    texts = list(drawn(walk, Fives, seed=5))
    assert texts and all(isinstance(parse_answer(text, Fives), Fives) for text in texts)


class Both(BaseModel):
    """Rules that xgrammar refuses, and those that guidance refuses, in one type."""

    fives: Annotated[int, Field(multiple_of=5)]
    named: dict[Colour, int]


def test_rules_that_no_grammar_holds_are_left_to_the_type(walk: GrammarWalk) -> None:
    vllm_accepts(answer_schema(Both) or {})
    seen = {isinstance(outcome(text), Both) for text in drawn(walk, Both, seed=3)}
    assert seen == {True, False}


def outcome(text: str) -> Any:
    try:
        return parse_answer(text, Both)
    except AnswerError as error:
        assert "multiple of 5" in error.expected
        return error
