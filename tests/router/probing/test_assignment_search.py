"""The study of how many runs a search takes: its counting, and our search on a table that is made by a formula."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def study() -> ModuleType:
    """The benchmark as a module; what it imports lies beside it."""
    path = Path(__file__).parents[3] / "benchmarks" / "assignment_search.py"
    spec = importlib.util.spec_from_file_location("assignment_search", path)
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules["assignment_search"] = module
    spec.loader.exec_module(module)
    return module


def test_runs_and_asks_are_counted_once(study: ModuleType) -> None:
    table = study.synthetic_table(tasks=5)
    assert "nothing was measured" in table.name
    meter = study.Meter(table)
    one, other = ("base", "base", "base"), ("base", "base", "critic")
    for cast in (one, one, other):
        meter.score(cast, 0)
    assert len(meter.seen) == 2 and len(meter.asked) == 4  # the critic alone is asked again


def test_a_table_survives_its_file(study: ModuleType, tmp_path: Path) -> None:
    table = study.synthetic_table(tasks=3)
    table.write(tmp_path / "t" / "table.json")
    assert study.Table.read(tmp_path / "t" / "table.json") == table


def test_ours_needs_fewer_than_coordinate_ascent_and_half_of_brute_force(study: ModuleType) -> None:
    table = study.synthetic_table(2, best=(0.7, 0.9))
    rows = {row.method: row for row in study.study(table, ["ours", "coordinate ascent", "brute force"], 3)}
    assert rows["ours"].hits == rows["brute force"].hits == 3
    assert rows["ours"].counting_misses < rows["coordinate ascent"].counting_misses
    assert rows["ours"].counting_misses <= rows["brute force"].evaluations / 2 == 1600
    text = study.show(table, list(rows.values()), 3)
    assert "| brute force | 3200 (3200-3200) |" in text


def test_a_method_that_cannot_run_says_why(study: ModuleType) -> None:
    (row,) = study.study(study.synthetic_table(tasks=3), ["agentopt lm_proposal"], 1)
    assert row.note and row.hits == 0
