"""What a step was given is known again by its key, also in stores of earlier versions."""

from __future__ import annotations

import datetime
import enum
import os
import subprocess
import sys

import pytest
from pydantic import BaseModel

from metier.agents import Message
from metier.agents.prompts import render_value
from metier.runtime.runs.step_values import content_key


class Puzzle(BaseModel):
    text: str
    number: int = 2


def test_steps_keep_their_keys() -> None:
    inputs = {"puzzle": Puzzle(text="ä"), "at": datetime.date(2026, 1, 2), "k": [1, 2.5, None]}
    assert content_key(None, inputs) == "66b831baf54a6110"
    messages = (Message(role="user", content="hé"), Message(role="assistant", content="b"))
    assert content_key(messages, {}) == "05dfeda191db125c"


class Side(enum.Enum):
    LEFT = "left"
    RIGHT = "right"


@pytest.mark.parametrize(
    "value", [b"\xff\x00", [b"\xff"], {Side.LEFT: 1, Side.RIGHT: [b"\xfe"]}, {1: "a", None: "b"}, frozenset({b"\xff"})]
)
def test_any_input_has_a_content_key(value: object) -> None:
    assert content_key(None, {"value": value}) == content_key(None, {"value": value})
    assert content_key(None, {"value": value}) != content_key(None, {"value": "other"})
    assert render_value(value)


class Tagged(BaseModel):
    tags: set[str]
    seen: list[frozenset[str]] = []
    parts: set[Part] = set()


class Part(BaseModel, frozen=True):
    name: str


IN_ANY_PROCESS = """
from metier.agents.prompts import render_value
from metier.runtime.runs.step_values import content_key
from tests.runtime.runs.test_step_values import Part, Tagged
words = {"one", "two", "three", "four"}
tagged = Tagged(tags=words, seen=[frozenset(words)], parts={Part(name=word) for word in words})
values = [tagged, [words], {"deep": (tagged, words)}]
print([content_key(None, {"value": value}) for value in values], [render_value(value) for value in values])
"""


def test_sets_have_one_key_and_one_text_in_every_process() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-c", IN_ANY_PROCESS],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1 and "two" in said.pop()
