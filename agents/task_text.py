"""The text of a run's task: what T-REX's intuition is computed from, by one rule in training and in serving."""

from __future__ import annotations

import json

from pydantic import BaseModel

__all__ = ["TASK_TEXT_RULE", "task_text", "task_text_of_json"]

TASK_TEXT_RULE = "task-input/1"
"""Name of the rule below. An adapter stores the rule it was trained with; another rule gets another name."""


def task_text(value: BaseModel) -> str:
    """A run's typed input as text: the one field of a model that has a single text field, else its compact JSON."""
    return task_text_of_json(value.model_dump_json())


def task_text_of_json(text: str) -> str:
    """The same for an input that is kept as JSON, as the run store keeps it."""
    data = json.loads(text)
    if isinstance(data, dict) and len(data) == 1:
        (only,) = data.values()
        if isinstance(only, str):
            return only
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))
