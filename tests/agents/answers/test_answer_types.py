"""A graph's build says which types a model can be asked for; prompts say what the grammar demands of them."""

from __future__ import annotations

import json
from typing import Annotated, Any, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, RootModel, TypeAdapter, create_model

from metier.agents import AnswerError, GraphError, Message, Role, TaskGraph, TrafficRow, parse_answer, render_prompt
from metier.agents.answers.answer_schema import answer_schema, described_schema
from metier.agents.answers.answer_shape import MAX_SHAPE_CHARACTERS, answer_shape
from metier.agents.answers.sample_answer import sample_answer
from metier.agents.prompts import layout_of, prompt_layout
from metier.agents.recorded_values import dump, load
from metier.agents.roles import type_name
from tests.agents import answer_zoo as zoo
from tests.agents.answer_zoo import NO, YES
from tests.agents.workflow import Answer, Puzzle


def one_role(gives: Any) -> TaskGraph:
    graph = TaskGraph("g", takes=Puzzle, gives=gives)
    graph.step(Role("solver", takes=Puzzle, gives=gives))
    return graph


def test_the_zoo_has_sixty_types() -> None:
    assert len(YES) >= 60


@pytest.mark.parametrize("name", YES)
def test_what_the_build_accepts_can_be_asked_parsed_and_recorded(name: str) -> None:
    gives = YES[name]
    one_role(gives).build()
    schema = described_schema(gives)
    sample = json.dumps(sample_answer(schema))
    if name in zoo.WEAK or name == "pattern":  # of which the sample knows nothing
        try:
            value = parse_answer(sample, gives)
        except AnswerError:
            return
    else:
        value = parse_answer(f"Here it is:\n{sample}" if sample[0] in "{[" else sample, gives)
    same, text = dump(value, gives)
    back = load(text, gives)
    assert back == same or repr(back) == repr(same)
    json.dumps(answer_schema(gives))


@pytest.mark.parametrize("name", NO)
def test_what_no_model_can_be_asked_for_is_said_when_the_graph_is_built(name: str) -> None:
    gives, why = NO[name]
    with pytest.raises(GraphError, match=why) as refused:
        one_role(gives).build()
    assert "what step 'solver' gives" in str(refused.value) and len(str(refused.value)) < 1000


@pytest.mark.parametrize("gives", [None, {"a": int}, (int, str), zoo.Unknown])
def test_what_is_no_type_is_refused_by_the_role(gives: Any) -> None:
    with pytest.raises(GraphError, match="role 'solver' gives"):
        Role("solver", takes=Puzzle, gives=gives)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (
            "person",
            '{"firstName": string (given name only), "colour": "red" or "green", '
            '"address": {"street": string (without the number), "number": integer from 1 to 99}}',
        ),
        ("optionals", '{"name": string, "nick": string or null, "age": integer or null, "tags": [string, …]}'),
        ("tree", 'Tree, where Tree is {"label": string, "children": [Tree, …]}'),
        ("mutual", 'Even, where Even is {"left": Odd or null}, where Odd is {"right": Even or null}'),
        ("union", '{"kind": "cat", "name": string} or {"kind": "dog", "good": true or false}'),
        ("root-list", "[string, …]"),
        ("generic-nested", '{"content": [{"street": string (without the number), "number": integer from 1 to 99}, …]}'),
        ("choices", '{"No": integer, "Both": string}'),
        ("camel", '{"GivenName": string, "HomeTown": string}'),
        ("namedtuple", "[integer, number]"),
        ("typeddict", '{"title": string, "year": integer}'),
        (
            "odds",
            '{"fives": integer a multiple of 5, "word": string matching ^[a-z]+$ (at most 4 characters), '
            r'"ends": string matching ^a\b, "some": [integer, …] (each once)}',
        ),
        ("between", "integer at least -5, below 100"),
        ("literal", '"yes" or "no" or 3 or null or true'),
        ("date", 'date like "2026-01-31"'),
        ("uuid4", "UUID"),
        ("some", "[integer, …] (1 to 3 items)"),
        ("many", "[number, …]"),
        ("by-enum", '{"red" or "green": integer, …}'),
        ("by-number", "{name matching ^-?(0|[1-9][0-9]{0,17})$: string, …}"),
        ("either", "integer or string or null"),
        ("anything", "any JSON"),
    ],
)
def test_the_prompt_shows_the_answers_real_shape(name: str, shape: str) -> None:
    role = Role("r", takes=Puzzle, gives=YES[name])
    last = render_prompt(role, {"puzzle": Puzzle(text="x")})[-1].content.splitlines()[-1]
    assert last == f"Reply as JSON of this shape: {shape}"


class Huge(BaseModel):
    many: dict[str, Annotated[int, Field(description="long " * 500)]]


def test_shapes_are_bounded() -> None:
    inner: Any = int
    for level in range(6):
        inner = create_model(f"Level{level}", **{f"field_{level}_{n}": (inner, ...) for n in range(6)})  # type: ignore[call-overload]
    assert len(answer_shape(inner).text) <= MAX_SHAPE_CHARACTERS and "{…}" in answer_shape(inner).text
    wide = create_model("Wide", **{f"a_field_with_a_long_name_{n}": (int, ...) for n in range(400)})  # type: ignore[call-overload]
    assert len(answer_shape(wide).text) == MAX_SHAPE_CHARACTERS
    assert len(answer_shape(Huge).text) < 300


# --- layouts ----------------------------------------------------------------------------------------------------------


def hint_of_layout_one(gives: type[BaseModel]) -> str:
    """What the first layout wrote of an answer: only its fields' own names, and names of Python's classes."""

    def word(annotation: Any) -> str:
        words = {str: "string", int: "integer", float: "number", bool: "true or false"}
        if get_origin(annotation) is list:
            return f"[{word(get_args(annotation)[0])}, …]"
        return words.get(annotation) or type_name(annotation)

    fields = ", ".join(f'"{n}": {word(f.annotation)}' for n, f in gives.model_fields.items())
    return f"Reply as JSON: {{{fields}}}"


SCALARS = st.sampled_from([str, int, float, bool])
PLAIN_FIELDS = st.recursive(SCALARS, lambda inner: inner.map(lambda kind: list[kind]), max_leaves=3)
NAMES = st.from_regex(r"\A[a-z]{1,6}\Z")


@settings(deadline=None)
@given(st.dictionaries(NAMES, PLAIN_FIELDS, max_size=4))
def test_plain_answers_are_asked_for_as_in_layout_one(fields: dict[str, Any]) -> None:
    """Adapters trained on it go on being asked what they know."""
    gives = create_model("Gives", **{name: (kind, ...) for name, kind in fields.items()})  # type: ignore[call-overload]
    role = Role("r", takes=Puzzle, gives=gives)
    messages = render_prompt(role, {"puzzle": Puzzle(text="x")})
    assert messages[-1].content.endswith("\n" + hint_of_layout_one(gives))
    assert prompt_layout(gives) == layout_of(messages) == 1
    assert answer_schema(gives) == gives.model_json_schema()


@pytest.mark.parametrize("name", YES)
def test_a_layout_is_the_first_one_with_the_text(name: str) -> None:
    gives = YES[name]
    messages = render_prompt(Role("r", takes=Puzzle, gives=gives), {"puzzle": Puzzle(text="x")})
    is_model = isinstance(gives, type) and issubclass(gives, BaseModel)
    as_before = is_model and messages[-1].content.endswith("\n" + hint_of_layout_one(gives))
    assert prompt_layout(gives) == layout_of(messages) == (1 if as_before else 2)
    assert TrafficRow(role="r", messages=messages, reply="{}").prompt_layout == prompt_layout(gives)


def test_text_and_foreign_messages_have_the_first_layout() -> None:
    assert prompt_layout(str) == layout_of([Message(role="user", content="hello")]) == 1
    said = Message(role="user", content="Reply as JSON of this shape: no\nsaid somebody")
    assert layout_of([said]) == 1


# --- replies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gives", "value"),
    [
        ("42", int, 42),
        ("```json\n42\n```", int, 42),
        ("red", zoo.Colour, zoo.Colour.RED),
        ('"red"', zoo.Colour, zoo.Colour.RED),
        ("hello you", int | str, "hello you"),
        ("12", int | str, 12),
        ("Sure: [1, 2] is it", list[int], [1, 2]),
        ('```\n[{"label": "a"}]\n```', list[zoo.Tree], [zoo.Tree(label="a")]),
        ('{"red": 1}', dict[zoo.Colour, int], {zoo.Colour.RED: 1}),
        ("null", int | None, None),
        ('{"label": "two\nlines", "children": [\n]}', zoo.Tree, zoo.Tree(label="two\nlines")),
        ('[{"value": 3}]', Answer, Answer(value=3)),
    ],
)
def test_any_type_is_read_from_a_reply(text: str, gives: Any, value: Any) -> None:
    assert parse_answer(text, gives) == value


@pytest.mark.parametrize(
    ("text", "gives", "cut_off"),
    [
        ("4", int, True),
        ("hello yo", int | str, True),
        ('{"label": "a', zoo.Tree | str, False),
        ("[1, 2", list[int], False),
        ("[[1], [2", list[list[int]], False),
        ("[1, 2, oops]", list[int], False),
        ("blue", zoo.Colour, False),
        ("9" * 5000, int, False),
        ("[" * 100_000, list[Any], False),
        ("[" * 5_000 + "]" * 5_000, Any, False),
        ('"\\ud800"', int | str, False),
        ("", int, False),
        ("NaN of your business", float, False),
    ],
    ids=range(13),
)
def test_what_is_no_whole_value_is_an_answer_error(text: str, gives: Any, cut_off: bool) -> None:
    with pytest.raises(AnswerError):
        parse_answer(text, gives, cut_off=cut_off)


def test_a_correction_shows_the_shape() -> None:
    with pytest.raises(AnswerError) as refused:
        parse_answer("junk", zoo.Person)
    assert refused.value.expected.startswith('JSON of this shape: {"firstName": string (given name only), "colour"')


class Rooted(RootModel[dict[str, list[int]]]):
    pass


def test_schemas_that_are_held_already_are_left_alone() -> None:
    for gives in (Answer, zoo.Tree, zoo.Person, Rooted):
        assert answer_schema(gives) == TypeAdapter(gives).json_schema()
