"""Files and folders appear whole or not at all, and what was there before stays until then."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from metier.agents.whole_files import try_file, try_folder, whole_file, whole_folder, write_whole


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


def test_what_cannot_be_written_is_known_before_and_trying_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "left.part").write_text("left by a kill")
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    for name in ("new", "old", "left"):
        try_file(tmp_path / name)
    try_folder(tmp_path / "a" / "b")
    try_folder(tmp_path)
    for wrong in (tmp_path, tmp_path / "none" / "new", tmp_path / "old" / "new", tmp_path / ("n" * 251)):
        with pytest.raises(OSError):
            try_file(wrong)
    for wrong in (tmp_path / "old", tmp_path / "old" / "new", tmp_path / "a" / ("n" * 300)):
        with pytest.raises(OSError):
            try_folder(wrong)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_pipe_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    try_file(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "text")
    reader.join()
    assert read == ["text"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
