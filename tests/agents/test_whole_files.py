"""Files and folders appear whole or not at all, and what was there before stays until then."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.agents.whole_files import whole_file, whole_folder, write_whole


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    write_whole(path, "old")
    with whole_file(path) as part:
        part.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("written", [True, False])
def test_after_an_error_the_file_is_as_it_was(tmp_path: Path, written: bool) -> None:
    path = tmp_path / "card.json"
    write_whole(path, "old")
    with pytest.raises(ValueError, match="stop"), whole_file(path) as part:
        if written:
            part.write_text("half", encoding="utf-8")
        raise ValueError("stop")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_of_a_file_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    (tmp_path / "card.json.part").write_text("a longer half that was left", encoding="utf-8")
    write_whole(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_has_a_hidden_name_of_its_own_until_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "variant"
    with whole_folder(folder) as first, whole_folder(folder) as second:
        assert first != second and first.name.startswith(".")
        first.mkdir()
        (first / "weights").write_text("w", encoding="utf-8")
        second.mkdir()
    assert [path.name for path in folder.iterdir()] == ["weights"]
    assert list(tmp_path.iterdir()) == [folder]


def test_after_an_error_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), whole_folder(tmp_path / "variant") as part:
        part.mkdir()
        (part / "weights").write_text("half", encoding="utf-8")
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []
