"""What `metier variants add`, `merge`, `export`, `push` and `pull` do: adapters into and out of the shelf."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.table import Table

from ...agents.errors import SettingsError, VariantError
from ...agents.traffic import TrafficRow, read_traffic
from ...specializers.adapters.adoption import adopt_adapter, merge_onto_shelf
from ...specializers.adapters.hub import pull_variant, push_variant
from ...specializers.recipes.recipe import load_recipe, read_rows
from ...specializers.shelf.shelf import Shelf
from ...specializers.shelf.variant import Variant
from ..console import StepBar, say, show
from .make import show_variants

__all__ = ["add_variant", "export_variant", "merge_variant", "pull_from_hub", "push_to_hub"]


def add_variant(folder: Path, name: str, base: str, shelf: Shelf, max_rank: int, accept_error: float) -> None:
    """Put an adapter folder on the shelf and say what came of it; see `metier variants add --help`."""
    with StepBar(f"adding {folder.name}", "layers") as bar:
        variant = adopt_adapter(
            folder,
            name=name,
            shelf=shelf,
            base=base,
            max_rank=max_rank,
            accept_error=accept_error,
            on_progress=bar.show,
        )
    _say_origin(variant, base)
    (method,) = variant.recipe["methods"] if len(variant.recipe.get("methods", ())) == 1 else ({},)
    if "mended" in method:
        say(f"mended or left out in {folder.name}: {', '.join(method['mended'])}")
    conversion = variant.card.get("conversion")
    if conversion is not None:
        kind = variant.recipe["methods"][0]["peft_type"]
        lost = "exact" if conversion["exact"] else f"loses {conversion['share']:.1%} of what it changes"
        say(
            f"{kind} became LoRA of rank {variant.ask.rank}: {lost} (max |d logit| {conversion['max_logit']:.2g}, "
            f"KL {conversion['kl_nats']:.2g} nats a token)"
        )
    say(f"variant {variant.name} ({variant.id}) is on the shelf: {shelf.path(variant)}")
    show_variants([variant], shelf)


def merge_variant(folder: Path, name: str, base: str, shelf: Shelf) -> None:
    """Put the base with an adapter merged into it on the shelf; see `metier variants merge --help`."""
    with StepBar(f"merging {folder.name}", "steps") as bar:
        variant = merge_onto_shelf(folder, name=name, shelf=shelf, base=base, on_progress=bar.show)
    _say_origin(variant, base)
    merge = variant.card["merge"]
    say(
        f"{variant.recipe['methods'][0]['peft_type']} became weights: rounding to the base's format loses "
        f"{merge['share']:.1%} of what it changes (max |d logit| {merge['max_logit']:.2g}, KL {merge['kl_nats']:.2g} "
        "nats a token)"
    )
    say(f"variant {variant.name} ({variant.id}) is on the shelf: {shelf.path(variant)}")
    show_variants([variant], shelf)


def push_to_hub(name: str, repo: str, shelf: Shelf, public: bool) -> None:
    """Send a variant to a repository and say where it is; see `metier variants push --help`."""
    say(f"variant {name} is sent to {repo}")
    show(push_variant(name, repo, shelf=shelf, public=public))


def pull_from_hub(repo: str, name: str | None, base: str, shelf: Shelf, revision: str | None, max_gib: float) -> None:
    """Fetch a variant or an adapter and put it on the shelf; see `metier variants pull --help`."""
    variant = pull_variant(
        repo,
        name=name,
        shelf=shelf,
        base=base,
        revision=revision,
        max_gib=max_gib,
        on_file=lambda file, size: say(f"fetching {file}, {size / 2**20:.1f} MiB"),
    )
    say(f"variant {variant.name} ({variant.id}) is on the shelf: {shelf.path(variant)}")
    show_variants([variant], shelf)


def _say_origin(variant: Variant, base: str) -> None:
    other = variant.card.get("made_for")
    if other is not None:
        say(f"note: its adapter_config.json says it was made for {other}, and it is used on {base}")


def export_variant(
    name: str,
    out: Path,
    as_kind: Literal["lora"] | None,
    base: str,
    shelf: Shelf,
    recipe: Path | None,
    traffic: Path | None,
) -> None:
    """Copy a variant's folder out of the shelf, T-REX as LoRA if asked; see `metier variants export --help`."""
    variant = shelf.get(name)
    if as_kind is None or variant.ask.adapter == as_kind:
        shelf.export(variant, out, on_left_out=_say_left_out)
        say(f"variant {variant.name} ({variant.id}) is in {out}")
        return
    if out.exists():
        raise VariantError(f"{out} exists", expected="a new folder", remedy="Remove it, or choose another.")
    _export_as_lora(name, out, base, shelf, _rows(recipe, traffic))


def _say_left_out(file: str) -> None:
    say(f"left out {file}: it is not in the variant's record, or no regular file")


def _export_as_lora(name: str, out: Path, base: str, shelf: Shelf, rows: list[TrafficRow]) -> None:
    from ...specializers.methods.trex.export import export_as_lora

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("variant", "rows", "KL", "no adapter", "same", "loss", "frozen", "base"):
        table.add_column(head, overflow="fold")
    with StepBar(f"freezing the gate of {name}", "clusters") as bar:
        for variant, done in export_as_lora(name, rows, shelf=shelf, base=base, on_progress=bar.show):
            shelf.export(variant, out / variant.name, on_left_out=_say_left_out)
            table.add_row(
                variant.name,
                f"{done.calibration_rows}+{done.held_out_rows}",
                f"{done.error.kl_nats:.3g}",
                f"{done.error.base_kl_nats:.3g}",
                f"{done.error.agreement:.1%}",
                f"{done.loss.token_gate:.3g}",
                f"{done.loss.frozen:.3g}",
                f"{done.loss.base:.3g}",
            )
    say(
        "Each variant is the adapter with its gate held fixed for one cluster of tasks. Rows: calibration + held "
        "out. KL: nats a token from the gate that moves with every token, and beside it that of no adapter. Same: "
        "share of tokens whose best token is the same. Loss: of the held-out answers, with that gate, frozen, and "
        "on the base."
    )
    show(table)


def _rows(recipe: Path | None, traffic: Path | None) -> list[TrafficRow]:
    if (recipe is None) == (traffic is None):
        raise SettingsError(
            f"{'neither' if recipe is None else 'both'} of --recipe and --traffic",
            expected="the rows that set the frozen gates and measure their loss",
            remedy="Give the recipe the variant was made from, or its exported traffic.",
        )
    if recipe is not None:
        return read_rows(load_recipe(recipe))
    assert traffic is not None
    return list(read_traffic(traffic))
