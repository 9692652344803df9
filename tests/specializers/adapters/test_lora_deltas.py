"""What a LoRA adds is one number for all who ask: it equals peft's own merge, whatever ranks and scalings it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from metier.agents import RecipeError, TrainingError
from metier.specializers import AskSpec
from metier.specializers.adapters.adapter_mending import write_mended
from metier.specializers.adapters.lora_deltas import LoraDeltas
from metier.specializers.checkpoints.checkpoint_files import CheckpointReader
from metier.specializers.methods.adapter_training import go_on_from_lora
from metier.specializers.methods.lora import METHOD, LoraSettings
from metier.specializers.methods.method import Job
from metier.specializers.methods.trained import add_lora
from metier.specializers.methods.tunable import load_folded
from tests.specializers.adapters.adapter_forms import TOKENS, Form, base_logits, lora_forms, peft_logits, write_form
from tests.tiny_families import write_tiny_family
from tests.tiny_model import LINEAR_TARGETS, write_random_lora

SHARED = ("output head as target", "embedding as target", "tied embedding and head")
SAME_SUMS = ("dropout", "started gaussian", "started orthogonal", "EVA", "MiCA", "targets all-linear", "MonteCLoRA")
PLAIN = [form for form in lora_forms() if form.outcome == "served" and form.name not in SAME_SUMS]
FIT = [form for form in PLAIN if form.name not in SHARED]


def names(form: Form) -> str:
    return form.name


@pytest.fixture(scope="module")
def untied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_family(tmp_path_factory.mktemp("untied") / "tiny", "llama3")


def write_plain(folder: Path, base: Path, form: Form) -> Path:
    """The form as it is on a shelf: peft writes copies of the base, and what only training uses, into some."""
    write_mended(write_form(folder / "written", base, form), folder / "adapter", base)
    return folder / "adapter"


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged: dict[str, torch.Tensor] = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return merged


def job(base: Path, adapter: Path, tmp_path: Path, rank: int = 8) -> Job:
    return Job(
        model=base,
        base_name="tiny",
        adapter=adapter,
        rows=(),
        seed=0,
        out=tmp_path,
        work_dir=tmp_path,
        fingerprint="f",
        ask=AskSpec(adapter="lora", rank=rank),
    )


@pytest.mark.parametrize("form", PLAIN, ids=names)
def test_what_is_added_is_what_peft_merges(tmp_path: Path, untied_base: Path, form: Form) -> None:
    adapter = write_plain(tmp_path, untied_base, form)
    deltas, reader = LoraDeltas(adapter, untied_base), CheckpointReader(untied_base)
    expected = peft_merged(untied_base, adapter)
    changed = 0
    for name in reader.tensors:
        before = reader.read(name).float()
        after = deltas.add(name, before)
        torch.testing.assert_close(after, expected[name], atol=1e-6, rtol=1e-5)
        changed += not torch.equal(after, before)
    assert changed == len(deltas.layers) > 0


@pytest.mark.parametrize("form", FIT, ids=names)
def test_folding_gives_the_adapters_own_logits(tmp_path: Path, tiny_base: Path, form: Form) -> None:
    adapter = write_plain(tmp_path, tiny_base, form)
    with torch.no_grad():
        folded = load_folded(job(tiny_base, adapter, tmp_path)).eval()(input_ids=TOKENS).logits
    torch.testing.assert_close(folded, peft_logits(tiny_base, adapter), atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", FIT, ids=names)
def test_training_goes_on_from_where_the_parent_is(tmp_path: Path, tiny_base: Path, form: Form) -> None:
    adapter = write_plain(tmp_path, tiny_base, form)
    tuned = fresh(tiny_base, rank=8, alpha=24.0)
    go_on_from_lora(tuned, LoraDeltas(adapter, tiny_base))
    with torch.no_grad():
        found = tuned.eval()(input_ids=TOKENS).logits
    expected = peft_logits(tiny_base, adapter)
    assert (expected - base_logits(tiny_base)).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SHARED)
def test_a_layer_without_a_weight_of_its_own_is_not_merged(tmp_path: Path, tiny_base: Path, name: str) -> None:
    form = next(form for form in PLAIN if form.name == name)
    adapter = write_plain(tmp_path, tiny_base, form)
    with pytest.raises(RecipeError, match=r"shares its weight with another layer.*`metier variants merge "):
        LoraDeltas(adapter, tiny_base)


def test_a_parent_that_the_recipe_cannot_go_on_from_is_named_before_training(tmp_path: Path, tiny_base: Path) -> None:
    adapter = write_random_lora(tmp_path / "adapter", tiny_base, rank=4)
    assert METHOD.check is not None
    METHOD.check(LoraSettings(rank=4), job(tiny_base, adapter, tmp_path))
    with pytest.raises(RecipeError, match="rank 8 differs from the parent adapter's rank 4"):
        METHOD.check(LoraSettings(rank=8), job(tiny_base, adapter, tmp_path))
    with pytest.raises(RecipeError, match=r"changes down_proj, which is not among targets .*Add down_proj"):
        METHOD.check(LoraSettings(rank=4, targets=("q_proj",)), job(tiny_base, adapter, tmp_path))
    with pytest.raises(TrainingError, match="tensors for other layers"):
        go_on_from_lora(fresh(tiny_base, rank=4, targets=("q_proj",)), LoraDeltas(adapter, tiny_base))


def fresh(base: Path, *, rank: int, alpha: float = 16.0, targets: Any = LINEAR_TARGETS) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return add_lora(model, rank=rank, alpha=alpha, dropout=0.0, targets=targets, seed=0)
