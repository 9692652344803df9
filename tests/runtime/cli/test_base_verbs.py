"""`metier doctor --base`: what a base is good for, on the terminal."""

from __future__ import annotations

from pathlib import Path

from metier.runtime.cli.doctor import base_findings
from tests.tiny_families import write_tiny_family


def test_a_base_has_a_line_for_each_method_and_a_reason_where_it_is_refused(tmp_path: Path) -> None:
    found = {one.part: one for one in base_findings(str(write_tiny_family(tmp_path / "model", "gemma2")))}
    assert found["model: lora"].state == "good"
    assert found["model: fier"].state == "missing" and "capped attention logits" in found["model: fier"].found
    assert found["model: fier"].remedy
