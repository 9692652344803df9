"""Names by content stay what they are: folders, journals and stores on users' disks carry them."""

from __future__ import annotations

from metier.agents.content_hash import content_hash

RECORD = {
    "base": "0123456789abcdef",
    "parent": None,
    "recipe": {"name": "zähler", "methods": [{"method": "lora", "rank": 8, "learning_rate": 0.001}]},
    "seed": 7,
    "data": "ab",
    "prompt_layout": 1,
}


def test_names_of_both_spellings_are_what_they_were() -> None:
    assert content_hash(RECORD) == "1336b2dd13bc692a"
    assert content_hash(RECORD, compact=True) == "6f388b078e901c6a"
    assert content_hash([{"role": "r.py:x", "data": {"traffic": "t"}}, "fp"]) == "fdd8bcafd0121813"
    assert content_hash(["a", "b: c", "ü"]) == "9a6c6b8269050f65"


def test_the_order_of_keys_does_not_matter() -> None:
    turned = dict(reversed(list(RECORD.items())))
    assert list(turned) != list(RECORD) and content_hash(turned) == content_hash(RECORD)
