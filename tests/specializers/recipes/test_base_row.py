"""What `metier doctor --base` says of a base: each method takes it, or says why not, in a moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.agents.errors import BaseModelError
from metier.specializers.methods.method import METHODS
from metier.specializers.recipes.base_row import base_row
from tests.tiny_families import HYBRIDS, write_tiny_family

NOT_PRUNED = {"width_pruning", "depth_pruning", "pat"}


@pytest.mark.parametrize(
    ("family", "refused"),
    [
        ("llama", set()),
        ("phi3", set()),
        ("gemma3", set()),
        ("glm4", set()),
        ("gemma2", {"fier"}),
        ("mistral", {"fier"}),
        ("qwen3_moe", NOT_PRUNED),
        ("gpt2", NOT_PRUNED | {"ptq", "msq", "fier"}),
        *((hybrid, NOT_PRUNED | {"fier"}) for hybrid in HYBRIDS),
    ],
)
def test_methods_take_a_base_or_say_why_not(tmp_path: Path, family: str, refused: set[str]) -> None:
    row = {one.method: one for one in base_row(write_tiny_family(tmp_path / family, family))}
    assert set(row) == set(METHODS) - {"shortest_correct", "thinking"}  # they change no weights
    assert {name for name, one in row.items() if one.refused} == refused
    assert all(one.remedy for one in row.values() if one.refused)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError):
        list(base_row(tmp_path))
