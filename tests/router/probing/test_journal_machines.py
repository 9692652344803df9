"""Journals of several machines: each finds its own records, and those from before machines were noted."""

from __future__ import annotations

from pathlib import Path

from metier.router.probing.journal import Journal
from metier.router.probing.outcomes import Outcome


def outcome(key: str, score: float, machine: str = "") -> Outcome:
    return Outcome(key=key, task="t", score=score, machine=machine)


def test_each_machine_finds_its_own_records(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    with Journal(path, Outcome) as journal:
        journal.add(outcome("old", 0.1))
        journal.measure_on("one")
        journal.add(outcome("both", 0.2))
        journal.add(outcome("of one", 0.3))
    with Journal(path, Outcome) as journal:
        journal.measure_on("two")
        assert journal.get("both") is None and journal.get("of one") is None
        assert journal.get("old") == outcome("old", 0.1)
        assert journal.elsewhere("both") == outcome("both", 0.2, "one")
        assert journal.elsewhere("old") is None, "an unknown machine is not another one"
        assert journal.by_machine() == {"": 1, "one": 2}
        journal.add(outcome("both", 0.4))
        assert journal.get("both") == outcome("both", 0.4, "two")
        assert [key for key, _ in journal.items()] == ["old", "both"]
        assert len(journal) == 4
    with Journal(path, Outcome) as journal:
        journal.measure_on("one")
        assert journal.get("both") == outcome("both", 0.2, "one"), "the newer one of the other machine hides nothing"
        journal.measure_on("three", mix=True)
        assert journal.get("both") == outcome("both", 0.4, "two"), "mixed: the newest of any"
        journal.add(outcome("new", 0.5))
        assert journal.get("new") == outcome("new", 0.5, "three"), "what is added says where it was measured"
