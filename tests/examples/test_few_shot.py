"""The few-shot workflows are the trained ones with examples before each ask, and nothing else changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.agents.graphs.workflow_file import load_workflow

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["solve_and_check", "ledger", "gift_card"])
def test_only_examples_are_added(name: str) -> None:
    trained = load_workflow(str(EXAMPLES / f"{name}.py"))
    shown = load_workflow(str(EXAMPLES / f"{name}_few_shot.py"))
    assert [path for path, _ in trained.graph.walk()] == [path for path, _ in shown.graph.walk()]
    for role, zero_shot in trained.graph.roles().items():
        few_shot = shown.graph.roles()[role]
        assert few_shot.instructions == zero_shot.instructions and few_shot.gives.__name__ == zero_shot.gives.__name__
        assert not zero_shot.examples and len(few_shot.examples) == 8
    assert [t.id for t in trained.tasks("test:3")] == [t.id for t in shown.tasks("test:3")]
    assert trained.graph.fingerprint != shown.graph.fingerprint
