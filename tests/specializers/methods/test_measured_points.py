"""What a killed sweep had measured is there for the next one, but for the line that was cut off."""

from __future__ import annotations

from pathlib import Path

from metier.specializers.methods.measured_points import add_measured, read_measured


def test_a_cut_line_is_left_out_and_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    assert read_measured(path) == []
    add_measured(path, {"budget": 8, "scores": [1.0, 0.0]})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"budget": 16, "sco')
    assert read_measured(path) == [{"budget": 8, "scores": [1.0, 0.0]}]
    add_measured(path, {"budget": 32, "scores": []})
    add_measured(path, {"budget": 64, "scores": []})
    assert [point["budget"] for point in read_measured(path)] == [8, 32, 64]
