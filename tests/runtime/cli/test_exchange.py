"""`metier variants add`, `merge` and `export`, as a newcomer uses them and as they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.agents import AdapterError, Message, SettingsError, TaskSetError, TrafficRow, VariantError, write_traffic
from metier.runtime.cli.exchange import add_variant, export_variant, merge_variant
from metier.specializers import Shelf
from metier.specializers.adapters.adoption import adopt_adapter
from tests.runtime.cli.test_cli import metier
from tests.specializers.adapters.loopback_hub import loopback_hub
from tests.specializers.adapters.test_adapter_check import change_config, change_tensors
from tests.specializers.adapters.test_adapter_conversion import write_adapter
from tests.specializers.adapters.test_adapter_mending import rename
from tests.tiny_model import write_random_lora
from tests.tiny_trex import TASKS, write_random_trex


def test_a_lora_goes_onto_the_shelf_and_out_and_onto_another(tmp_path: Path, tiny_base: Path) -> None:
    write_random_lora(tmp_path / "lora", tiny_base, rank=4)
    added = metier(
        "variants", "add", "lora", "--name", "solver", "--base", str(tiny_base), "--set", "shelf=mine", cwd=tmp_path
    )
    assert added.returncode == 0, added.stderr
    assert "is on the shelf" in added.stderr and "lora r4" in added.stdout
    assert "layers" not in added.stderr
    sent = metier("variants", "export", "solver", "out/solver", "--set", "shelf=none", "--shelf", "mine", cwd=tmp_path)
    assert sent.returncode == 0, sent.stderr
    taken = metier(
        "variants", "add", "out/solver", "--name", "s", "--base", str(tiny_base), cwd=tmp_path, METIER_SHELF="theirs"
    )
    assert taken.returncode == 0, taken.stderr
    listed = metier("variants", "--set", "shelf=none", "--shelf", "theirs", cwd=tmp_path)
    assert Shelf(tmp_path / "mine").get("solver").id in listed.stdout


def test_a_variant_goes_to_a_hub_and_comes_back(tmp_path: Path, tiny_base: Path) -> None:
    lora = write_random_lora(tmp_path / "lora", tiny_base, rank=4)
    made = adopt_adapter(lora, name="solver", shelf=Shelf(tmp_path / "mine"), base=tiny_base)
    with loopback_hub() as hub:
        of_hub = {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_nobody", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hub"),
        }  # fmt: skip
        sent = metier("variants", "push", "solver", "ann/solver", "--set", "shelf=mine", cwd=tmp_path, **of_hub)
        assert sent.returncode == 0, sent.stderr
        assert sent.stdout.strip() == f"{hub.url}/ann/solver/commit/{hub.sha('ann/solver')}"
        words = ("variants", "pull", "ann/solver", "--base", str(tiny_base), "--set", "shelf=theirs")
        taken = metier(*words, cwd=tmp_path, **of_hub)
        assert taken.returncode == 0, taken.stderr
        assert "fetching variant.json" in taken.stderr and "lora r4" in taken.stdout
        assert Shelf(tmp_path / "theirs").get("solver").id == made.id
        refused = metier(*words, "--max-gib", "0.0000001", cwd=tmp_path, **of_hub)
    assert refused.returncode == 2 and "--max-gib" in refused.stderr and "Traceback" not in refused.stderr


def test_a_conversion_shows_progress_and_what_it_lost(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "vera", tiny_base, "VERA", r=4)
    add_variant(adapter, "solver", str(tiny_base), Shelf(tmp_path / "shelf"), 64, 0.0)
    said = capsys.readouterr()
    assert "adding vera: 14 of 14 layers" in said.err
    assert "VERA became LoRA of rank 4: exact" in said.err
    assert "lora r4" in said.out and "converted" in said.out
    add_variant(adapter, "less", str(tiny_base), Shelf(tmp_path / "shelf"), 2, 1.0)
    assert "rank 2: loses" in capsys.readouterr().err


def test_an_adapter_is_merged_into_a_checkpoint_of_its_own(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "dora", tiny_base, "LORA", use_dora=True)
    change_config(adapter, base_model_name_or_path="org/other")
    shelf = Shelf(tmp_path / "shelf")
    with pytest.raises(AdapterError, match=f"`metier variants merge {adapter} --name NAME`"):
        add_variant(adapter, "solver", str(tiny_base), shelf, 64, 0.0)
    merge_variant(adapter, "solver", str(tiny_base), shelf)
    said = capsys.readouterr()
    assert "merging dora: 5 of 5 steps" in said.err
    assert "LORA became weights: rounding to the base's format loses 0.0%" in said.err
    assert "says it was made for org/other" in said.err
    assert shelf.get("solver").engine.weights == "own" and "merged" in said.out
    with pytest.raises(VariantError, match="name 'No Name'"):
        merge_variant(adapter, "No Name", str(tiny_base), shelf)


def test_what_was_mended_is_said(tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_random_lora(tmp_path / "lora", tiny_base, rank=4)
    change_tensors(adapter, lambda tensors: rename(tensors, lambda name: f"module.{name}"))
    add_variant(adapter, "solver", str(tiny_base), Shelf(tmp_path / "shelf"), 64, 0.0)
    assert "mended or left out in lora: names of tensors" in capsys.readouterr().err


def test_trex_is_exported_as_lora_per_cluster(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = Shelf(tmp_path / "shelf")
    add_variant(write_random_trex(tmp_path / "trex", tiny_base), "all", str(tiny_base), shelf, 64, 0.0)
    rows = [
        TrafficRow(role="solver", messages=(Message(role="user", content=text),), reply="Yes.", task=text)
        for text in TASKS
    ]
    write_traffic(tmp_path / "rows.jsonl", rows)

    def export(out: Path, traffic: Path | None = None, recipe: Path | None = None) -> None:
        export_variant("all", out, "lora", str(tiny_base), shelf, recipe, traffic)

    with pytest.raises(SettingsError, match="neither of --recipe and --traffic"):
        export(tmp_path / "out")
    with pytest.raises(TaskSetError, match="nope.jsonl cannot be read: no such file"):
        export(tmp_path / "out", tmp_path / "nope.jsonl")
    capsys.readouterr()
    export(tmp_path / "out", tmp_path / "rows.jsonl")
    said = capsys.readouterr()
    assert "freezing the gate of all" in said.err and "no adapter" in said.out
    exported = Shelf(tmp_path / "none", also=[tmp_path / "out"]).list()
    assert len(exported) > 1
    assert {variant.id for variant in exported} < {variant.id for variant in shelf.list()}
    assert all(variant.name in said.out for variant in exported)
    with pytest.raises(VariantError, match="expected a new folder"):
        export(tmp_path / "out", tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("export", "solver", "out"), "UnknownVariantError: no variant 'solver' on the shelf"),
        (("--shelf", "s", "add", ".", "--name", "x"), "SettingsError: options before 'add'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = metier("variants", *words, cwd=tmp_path, METIER_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr


def test_help_has_an_example(tmp_path: Path) -> None:
    for verb in ("add", "export"):
        done = metier("variants", verb, "--help", cwd=tmp_path)
        assert f"Example: metier variants {verb}" in done.stdout
