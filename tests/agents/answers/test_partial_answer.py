"""Answers that grow: at every cut of the text, what there is belongs to the role's type, and takes nothing back."""

from __future__ import annotations

from datetime import date
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, RootModel

from metier.agents.answers.partial_answer import NOTHING_YET, GrowingAnswer


class Colour(Enum):
    RED = "red"
    REDDISH = "reddish"


class Step(BaseModel):
    what: str
    days: int = Field(ge=1)
    colour: Colour | None = None


class Plan(BaseModel):
    title: str = Field(alias="theTitle")
    steps: list[Step]
    when: date
    kind: Literal["long", "short"] = "short"
    extra: dict[str, int] = {}


class Names(RootModel[list[str]]):
    pass


TEXT = (
    '{"theTitle": "Off to 12", "steps": [{"what": "pack \\"all\\"", "days": 12, "colour": "reddish"}, '
    '{"what": "go", "days": 3}], "when": "2026-12-01", "kind": "long", "extra": {"a": 10}}'
)


def grown(gives: Any, text: str, size: int = 1) -> list[Any]:
    growing = GrowingAnswer(gives)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    return [value for piece in pieces if (value := growing.add(piece)) is not NOTHING_YET]


def test_an_object_grows_to_the_whole_answer() -> None:
    seen = grown(Plan, TEXT)
    assert all(isinstance(one, Plan) and all(isinstance(step, Step) for step in one.steps or []) for one in seen)
    assert seen[-1] == Plan.model_validate_json(TEXT)
    assert seen[0].title == "" and seen[0].steps is None and seen[0].kind == "short"
    assert seen[0].model_fields_set == {"title"}
    titles = [one.title for one in seen]
    assert all(later.startswith(earlier) for earlier, later in zip(titles, titles[1:], strict=False))


def test_what_cannot_grow_comes_whole_or_not_at_all() -> None:
    seen = [step for one in grown(Plan, TEXT) for step in one.steps or []]
    assert {step.days for step in seen} == {None, 12, 3}
    assert {one.when for one in grown(Plan, TEXT)} == {None, date(2026, 12, 1)}
    assert {one.kind for one in grown(Plan, TEXT)} == {"short", "long"}
    assert [one.extra for one in grown(Plan, TEXT)][-1] == {"a": 10}


@pytest.mark.parametrize(
    ("gives", "text", "last"),
    [
        (str, "  some words", "some words"),
        (list[int], "[1, 23, 4]", [1, 23, 4]),
        (Names, '["Ann", "Bo"]', Names(["Ann", "Bo"])),
        (Step | Names, '["Ann"]', Names(["Ann"])),
        (Annotated[Step, "noted"], 'Here: ```json\n{"what": "go", "days": 1}', Step(what="go", days=1)),
    ],
)
def test_other_types_grow_too(gives: Any, text: str, last: Any) -> None:
    assert grown(gives, text)[-1] == last
    assert grown(gives, text, 5)[-1] == last


@pytest.mark.parametrize("text", ["", "12", "no JSON", '{"tool": "add", "arguments": {"a": 1}}', "]}", '{"what" 1}'])
def test_what_is_no_answer_of_the_type_gives_nothing(text: str) -> None:
    assert grown(Step, text) == []


def test_a_long_text_is_not_read_at_every_piece() -> None:
    reads = 0

    class Counting(GrowingAnswer):
        def _read(self) -> Any:
            nonlocal reads
            reads += 1
            return super()._read()

    growing = Counting(Step)
    growing.add('{"what": "')
    for _ in range(20_000):
        growing.add("a")
    assert reads < 500
