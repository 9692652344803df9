"""The tiny families: each writes a whole checkpoint, the same each time, that transformers reads back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from metier.specializers.shelf.base_model import check_base
from tests.tiny_families import FAMILIES, FAMILIES_THAT_DIFFER, HYBRIDS, write_tiny_family


@pytest.mark.parametrize("name", [*FAMILIES, *HYBRIDS])
def test_a_tiny_family_is_a_whole_checkpoint(tmp_path: Path, tiny_family: Callable[[str], Path], name: str) -> None:
    folder = tiny_family(name)
    check_base(folder)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    assert model.config.model_type == {**FAMILIES, **HYBRIDS}[name]["model_type"]
    again = write_tiny_family(tmp_path / "again", name)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[5, 6, 7] * 10])).logits
    # Not flat, so that an adapter or a mistake is seen; not so sharp that nothing else has a chance.
    assert 0.5 < float(torch.distributions.Categorical(logits=logits[0, -1]).entropy()) < 6.2


def test_the_families_that_differ_are_families() -> None:
    assert set(FAMILIES_THAT_DIFFER) < set(FAMILIES)


def test_the_module_is_light() -> None:
    loaded = "import sys, tests.tiny_families; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", loaded],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == "set()", done.stderr
