"""What a killed sweep had measured is there for the next one, but for the line that was cut off."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from metier.agents import TrainingError
from metier.specializers.methods.measured_points import add_measured, read_measured


@dataclass(frozen=True)
class Point:
    budget: int
    scores: tuple[float, ...]


def test_a_cut_line_is_left_out_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    assert read_measured(path, Point) == []
    add_measured(path, {"budget": 8, "scores": [1.0, 0.0]})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"budget": 16, "sco')
    assert read_measured(path, Point) == [Point(8, (1.0, 0.0))]
    add_measured(path, {"budget": 32, "scores": []})
    add_measured(path, {"budget": 64, "scores": []})
    assert [point.budget for point in read_measured(path, Point)] == [8, 32, 64]


@pytest.mark.parametrize("line", [b"\xff", b"[]", b"{", b'{"budget": "x", "scores": []}', b"[" * 9000, b"1" * 5000])
def test_a_line_that_is_no_point_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "sweep.jsonl"
    add_measured(path, {"budget": 8, "scores": []})
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(TrainingError, match=r"sweep\.jsonl.*line 2.*Remove the line"):
        read_measured(path, Point)
