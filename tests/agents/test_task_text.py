"""The text T-REX's intuition is computed from: the same in training, in a run, and out of the store."""

from pydantic import BaseModel

from metier.agents import task_text
from metier.agents.prompts import task_text_of_json


class Puzzle(BaseModel):
    text: str


class Numbers(BaseModel):
    kind: str
    values: list[int]


def test_a_single_text_field_is_the_text_itself() -> None:
    assert task_text(Puzzle(text="Sort: é, a")) == "Sort: é, a"


def test_anything_else_is_compact_json() -> None:
    assert task_text(Numbers(kind="sort", values=[2, 1])) == '{"kind":"sort","values":[2,1]}'


def test_what_the_store_keeps_gives_the_same_text() -> None:
    for value in (Puzzle(text='a "quoted" line\n'), Numbers(kind="é", values=[])):
        assert task_text_of_json(value.model_dump_json()) == task_text(value)
