"""Journals of earlier probes are read by the keys they were written under."""

from __future__ import annotations

from metier.router.probing.journal import record_key


def test_records_keep_their_keys() -> None:
    assert record_key(part="solver", candidate="größer", n=3) == "79bce308dcdc9c2b"
