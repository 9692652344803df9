"""The table of adapter kinds: whole, and the only place where kinds are told apart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from metier.specializers.adapters.adapter_check import _check_of
from metier.specializers.shelf.adapter_kinds import ADAPTER_KINDS, AdapterName, kind_of_peft_type
from metier.specializers.shelf.variant import AskSpec

ROOT = Path(__file__).parents[3]


def test_every_kind_has_a_row_and_a_check() -> None:
    assert tuple(ADAPTER_KINDS) == get_args(AdapterName)
    for name, kind in ADAPTER_KINDS.items():
        assert kind_of_peft_type(kind.peft_type) is kind
        assert AskSpec(adapter=name, rank=1).kind is kind
        assert callable(_check_of(kind))
    assert AskSpec().kind is None
    assert kind_of_peft_type("IA3") is None and kind_of_peft_type(None) is None


def test_nobody_else_compares_kinds_by_name() -> None:
    names = "|".join(re.escape(word) for kind in ADAPTER_KINDS.values() for word in (kind.name, kind.peft_type))
    compared = re.compile(rf"""(==|!=|\bin) *\(?[^\n:]*["']({names})["']""")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for room in ("agents", "specializers", "router", "runtime")
        for path in sorted((ROOT / room).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"adapter|kind|peft_type", line) and compared.search(line)
    ]
    assert not found
