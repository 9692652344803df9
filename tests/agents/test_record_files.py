"""Files of records are read as what they are, or refused by the file and the line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import BaseModel

from metier.agents import MetierError
from metier.agents.record_files import cut_torn_line, read_record, read_records


class Card(BaseModel):
    name: str
    score: float = 0.0


class CardError(MetierError):
    """A card cannot be read."""


def one(path: Path) -> Card:
    return read_record(path, Card, CardError, what="card", expected="a card", remedy="Write it again.")


def many(path: Path) -> list[Card]:
    return list(read_records(path, Card, CardError, what="card", expected="cards", remedy="Remove the line."))


WRONG = [
    (b"", "not JSON"), (b"[]", "should be an object"), (b"\xff", "is not UTF-8"), (b'{"name": 3}', "name: 3"),
    (b"{", "not JSON"),
    (b'{"name": "\\ud800"}', "surrogate"), (b'{"name": "x", "score": ' + b"1" * 5000 + b"}", "digits|number"),
    (b'{"name": ' + b"[" * 5000, "deep|recursion"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "named"), WRONG)
def test_what_is_no_record_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "card.json"
    path.write_bytes(content)
    with pytest.raises(
        CardError, match=rf"card\.json is no card: .*(?i:{named}).*expected a card. Write it again"
    ) as error:
        one(path)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(("content", "named"), WRONG[1:])
def test_a_line_that_is_no_record_is_named_by_its_number(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "cards.jsonl"
    path.write_bytes(b'{"name": "a"}\n\n' + content + b'\n{"name": "b"}\n')
    with pytest.raises(CardError, match=r"cards\.jsonl.* line 3 .*Remove the line"):
        many(path)


@pytest.mark.parametrize("read", [one, many])
def test_no_file_a_folder_and_a_pipe_are_refused(tmp_path: Path, read: object) -> None:
    assert callable(read)
    path = tmp_path / "card.json"
    with pytest.raises(CardError, match="no such file"):
        read(path)
    path.mkdir()
    with pytest.raises(CardError, match="it is a folder"):
        read(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(CardError, match="no regular file"):
        read(path)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "cards.jsonl"
    names = ["one\u2028two", "a\x85b", "form\x0cfeed"]
    path.write_text("".join(Card(name=name).model_dump_json() + "\n" for name in names), encoding="utf-8")
    assert [card.name for card in many(path)] == names


@pytest.mark.parametrize("torn", [b"", b'{"na', "é".encode()[:1], b"x" * 200_000])
@pytest.mark.parametrize("whole", [b"", b"{}\n", b"x" * 70_000 + b"\n"])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, whole: bytes, torn: bytes) -> None:
    path = tmp_path / "cards.jsonl"
    path.write_bytes(whole + torn)
    cut_torn_line(path)
    assert path.read_bytes() == whole
