"""Every recipe that ships loads, and so do those of the pruning study's arms."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from metier.specializers import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipe_loads(path: Path) -> None:
    assert load_recipe(path).methods


def test_the_pruning_study_has_valid_arms_and_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("pruning_study", ROOT / "benchmarks" / "pruning_study.py")
    assert spec is not None and spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    for arm in study.ARMS:
        if study.ARMS[arm]:
            assert study.recipe(arm, 0).name == arm
    row = {"seed": 0, "parameters_of_base": 0.78}
    study.print_tables([{**row, "arm": "lora", "solved": "1110"}, {**row, "arm": "pat-448", "solved": "1100"}])
    assert "| pat-448 | 0.780 | 50.0" in capsys.readouterr().out
