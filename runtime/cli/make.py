"""What `metier make` and `metier variants` do: recipes with a progress bar, and the shelf as a table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ...specializers.recipes.recipe import load_recipe
from ...specializers.shelf.shelf import Shelf
from ...specializers.shelf.variant import Variant
from ..settings.session import load_settings

if TYPE_CHECKING:
    from ..engines.pool import EnginePool

__all__ = ["draw_variant", "list_variants", "make_variant", "show_variants"]

console = Console(stderr=True)
WIDE = 140
"""Columns of a terminal from which on everything measured has room beside the rest."""
LINES = 20
"""Lines of progress where there is no terminal to draw a bar on."""
# Of a card, that have columns of their own.
_COLUMNS = frozenset(
    "served_average_bits bytes bytes_before role asks margin quality quality_before compared_with "
    "cpu_ms_per_ask cpu_ms_per_ask_before".split()
)


def make_variant(
    recipe: Path, base: str, shelf: Path | None, work_dir: Path | None, variants: Sequence[Path] = ()
) -> None:
    """Make a variant and say what came of it; see `metier make --help`."""
    from ...specializers.recipes.produce import produce

    loaded = load_recipe(recipe)
    place = Shelf(shelf or load_settings().shelf, also=variants)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task(f"making {loaded.name}", total=None)

        def show(progress: Any) -> None:
            bars.update(
                bar,
                total=progress.steps,
                completed=progress.step,
                description=f"making {loaded.name}, {progress.measured} {progress.value:.3f}",
            )
            if not console.is_terminal and progress.step % max(1, progress.steps // LINES) == 0:
                left = "" if progress.eta_s is None else f", {progress.eta_s:.0f} s left"
                console.print(
                    f"{loaded.name}: step {progress.step} of {progress.steps}, "
                    f"{progress.measured} {progress.value:.3f}{left}",
                    markup=False,
                )

        if not console.is_terminal:
            console.print(f"making {loaded.name} on {base}: reading data", markup=False)

        def note(text: str) -> None:
            console.print(f"{loaded.name}: {text}", markup=False)

        variant = produce(
            loaded,
            shelf=place,
            base=base,
            on_progress=show,
            work_dir=work_dir,
            open_backend=partial(_engines, base),
            on_note=note,
        )
    if "rejected" in variant.card:
        lost = variant.card["rejected"]
        console.print(
            f"{variant.name} ends before {lost['method']!r}: after it, {lost['role']} scores {lost['quality']:.3f} on "
            f"{lost['asks']} asks, {lost['compared_with']} {lost['quality_before']:.3f}, and the recipe allows "
            f"{lost['margin']:g} less.",
            markup=False,
        )
    console.print(f"variant {variant.name} ({variant.id}) is on the shelf: {place.path(variant)}", markup=False)
    show_variants([variant], place)


def _engines(base: str, shelf: Shelf) -> EnginePool:
    """Engines that serve the base and a shelf's variants, to measure what a recipe made."""
    from ...specializers.shelf.base_model import find_base
    from ..engines.pool import EnginePool

    adapted = [variant for variant in shelf.list() if variant.ask.adapter]
    return EnginePool(
        find_base(base),
        lambda name: (shelf.get(name), shelf.path(name)),
        load_settings().engine.with_room_for(variant.ask.rank for variant in adapted),
        adapters={variant.checkpoint for variant in adapted},
    )


def draw_variant(name: str, out: Path, shelf: Path | None, also: list[Path]) -> None:
    """Draw the thinking curves of a variant's card; see `metier variants draw --help`."""
    from ..report.thinking_figures import draw_thinking, thinking_of

    points, curves = thinking_of(Shelf(shelf or load_settings().shelf, also=also).get(name))
    draw_thinking(out, points, curves)
    console.print(f"{len(points)} points of {len(curves)} variants are drawn in {out}", markup=False)


def list_variants(shelf: Path | None, also: list[Path], verify: bool) -> None:
    """Print the shelf as a table; with `verify`, check every file first."""
    place = Shelf(shelf or load_settings().shelf, also=also)
    found = place.list()
    if verify:
        for variant in found:
            place.verify(variant)
        console.print(f"{len(found)} variants verified: every file has the hash of its record.", markup=False)
    if not found:
        console.print(f"No variants in {place.folder}. Make one: metier make RECIPE.yaml", markup=False)
        return
    show_variants(found, place)


def show_variants(variants: list[Variant], shelf: Shelf) -> None:
    """Print variants as a table: lineage, size, and the plain numbers of their cards."""
    names = {v.id: v.name for v in shelf.list()}
    rows = []
    for v in variants:
        size = sum(f.stat().st_size for f in shelf.path(v).rglob("*") if f.is_file()) / 1e6
        quality, cost = _quality(v.card)
        rows.append(
            {
                "name": v.name,
                "id": v.id,
                "parent": names.get(v.parent, v.parent) if v.parent else "base",
                "method": "+".join(m["method"] for m in v.recipe.get("methods", [])) or "–",
                "weights": names.get(v.engine.weights, v.engine.weights),
                "bits": _number(v.card.get("served_average_bits", "–")),
                "adapter": f"{v.ask.adapter} r{v.ask.rank}" if v.ask.adapter else "–",
                "MB": f"{size:.1f}",
                "quality": quality,
                "CPU ms an ask": cost,
                "measured": ", ".join(_measured(v.card)),
            }
        )
    out = Console()
    wide = out.width >= WIDE
    # A column that says nothing of any variant leaves its room to the others.
    heads = [head for head in rows[0] if any(row[head] != "–" for row in rows) and (wide or head != "measured")]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(row[head] for head in heads))
    out.print(table)
    if not wide and len(variants) == 1:
        for line in _measured(variants[0].card):
            out.print(f"  {line}", markup=False, highlight=False)
    elif not wide:
        console.print(f"(A terminal of {WIDE} columns shows what else was measured.)", markup=False)


def _measured(card: dict[str, Any]) -> list[str]:
    """The plain values of a card that have no columns of their own."""
    return [f"{k} {_number(x)}" for k, x in card.items() if isinstance(x, int | float | str) and k not in _COLUMNS]


def _quality(card: dict[str, Any]) -> tuple[str, str]:
    """What a card says of the role's quality and of an ask's cost, beside what it was compared with."""
    if "quality" not in card:
        return "–", "–"
    other = card["compared_with"]
    return (
        f"{card['role']} {card['quality']:.1%} ({other} {card['quality_before']:.1%})",
        f"{card['cpu_ms_per_ask']:.1f} ({other} {card['cpu_ms_per_ask_before']:.1f})",
    )


def _number(value: float | int | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
