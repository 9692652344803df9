"""Every form that peft writes ends as docs/adapters.md says: served, converted, merged, or refused by name."""

from __future__ import annotations

import importlib.util
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from metier.agents import AdapterError
from metier.specializers import Shelf
from metier.specializers.adapters.adoption import adopt_adapter, merge_onto_shelf
from tests.specializers.adapters.adapter_forms import FORMS, WHY, Form, base_logits, peft_logits, write_form

ROOT = Path(__file__).parents[3]
MAX_RANK = 16
"""Of conversions: a quarter of the tiny base's width, so that a full rank is too much, as it is with real models."""

# Those that others here stand for, or that cost more than they show every day: `make models` makes all.
SELDOM = frozenset(
    (
        "dropout",
        "some layers of a list",
        "started gaussian",
        "started orthogonal",
        "targets all-linear",
        "modules_to_save: norms",
        "bias: lora_only",
        "VeRA",
        "VB-LoRA",
        "MiSS",
        "TinyLoRA",
        "DeLoRA",
        "UniLoRA",
        "PSOFT",
        "LoHa",
        "FourierFT",
        "WaveFT",
        "RandLoRA",
        "BOFT",
        "HRA",
        "HiRA",
        "RoAd",
        "GLoRA",
        "FRoD",
        "PEANuT",
        "OSF",
        "DEFT",
        "Supertuning",
    )
)
EVERY = [pytest.param(form, id=form.name, marks=[pytest.mark.models] if form.name in SELDOM else []) for form in FORMS]


@pytest.mark.parametrize("form", EVERY)
def test_every_form_ends_as_the_table_says(tmp_path: Path, tiny_base: Path, form: Form) -> None:
    base, shelf = form.base(tmp_path, tiny_base), Shelf(tmp_path / "shelf")
    adapter = write_form(tmp_path / "adapter", base, form)
    if form.outcome in ("served", "converted"):
        variant = adopt_adapter(adapter, name="it", shelf=shelf, base=base, max_rank=MAX_RANK)
        made = variant.recipe["methods"][0]["method"]
        assert made == {"served": "adopted", "converted": "converted"}[form.outcome]
        same_as_peft(base, adapter, peft_logits(base, shelf.path(variant) / "adapter"))
        return
    with pytest.raises(AdapterError) as refused:
        adopt_adapter(adapter, name="it", shelf=shelf, base=base, max_rank=MAX_RANK)
    assert ("metier variants merge" in str(refused.value)) == (form.outcome == "merged"), refused.value
    if form.needs and find_spec(form.needs) is None:
        with pytest.raises(AdapterError, match=f"peft cannot load .* {form.needs} is not available"):
            merge_onto_shelf(adapter, name="it", shelf=shelf, base=base)
        return
    if form.outcome == "merged":
        assert re.search(rf"`metier variants merge {re.escape(str(adapter))} --name NAME`", str(refused.value))
        variant = merge_onto_shelf(adapter, name="it", shelf=shelf, base=base)
        shelf.verify(variant)
        assert variant.engine.weights == "own" and variant.ask.adapter is None
        same_as_peft(base, adapter, base_logits(shelf.path(variant) / "weights"))
        return
    with pytest.raises(AdapterError) as refused:
        merge_onto_shelf(adapter, name="it", shelf=shelf, base=base)
    assert "metier variants merge" not in str(refused.value)
    assert shelf.list() == []


def test_the_page_has_the_table_of_these_forms() -> None:
    script = ROOT / "scripts" / "write_adapters_page.py"
    spec = importlib.util.spec_from_file_location("write_adapters_page", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert written == module.adapters_page(), "run: python scripts/write_adapters_page.py"
    assert not {*WHY, *SELDOM} - {form.name for form in FORMS}


def same_as_peft(base: Path, adapter: Path, found: torch.Tensor) -> None:
    expected = peft_logits(base, adapter)
    assert (expected - base_logits(base)).abs().max() > 0.05, "the form changes nothing, so nothing is shown"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
