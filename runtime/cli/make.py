"""What `metier make` and `metier variants` do: recipes with a progress bar, and the shelf as a table."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from ...agents.backend import Backend
from ...specializers.recipes.recipe import load_recipe
from ...specializers.shelf.shelf import Shelf
from ...specializers.shelf.variant import Variant
from ..backends import DEFAULT_ENGINE, BackendRequest, open_backend
from ..console import OUT, StepBar, say, show
from ..output_files import writing
from ..settings.session import Settings
from .ending import SAME_COMMAND, when_stopped

__all__ = ["draw_variant", "list_variants", "make_variant", "show_variants"]

WIDE = 140
"""Columns of a terminal from which on everything measured has room beside the rest."""
# Of a card, that have columns of their own.
_COLUMNS = frozenset(
    "served_average_bits bytes bytes_before role asks margin quality quality_before compared_with "
    "cpu_ms_per_ask cpu_ms_per_ask_before".split()
)


def make_variant(recipe: Path, base: str, settings: Settings, shelf: Sequence[Path], work_dir: Path | None) -> None:
    """Make a variant and say what came of it; see `metier make --help`."""
    from ...specializers.recipes.produce import produce

    loaded = load_recipe(recipe)
    when_stopped(lambda: SAME_COMMAND)
    place = Shelf(settings.shelf, also=shelf)

    @asynccontextmanager
    async def measuring(shelf: Shelf) -> AsyncGenerator[Backend]:
        """Engines that serve the base and a shelf's variants, to measure what the recipe made."""
        adapted = tuple(variant.id for variant in shelf.list() if variant.ask.adapter)
        request = BackendRequest(shelf, settings, base, names=(None, *adapted))
        async with open_backend(DEFAULT_ENGINE, request) as opened:
            if opened.start is not None:
                await opened.start()
            yield opened.backend

    say(f"making {loaded.name} on {base}: reading data")
    with StepBar(f"making {loaded.name}", "steps") as bar:

        def on_progress(progress: Any) -> None:
            left = () if progress.eta_s is None else (f"{progress.eta_s:.0f} s left",)
            bar.show(progress.step, progress.steps, f"{progress.measured} {progress.value:.3f}", *left)

        variant = produce(
            loaded,
            shelf=place,
            base=base,
            on_progress=on_progress,
            work_dir=work_dir,
            open_backend=measuring,
            template=settings.engine.template,
            on_note=lambda text: say(f"{loaded.name}: {text}"),
            threads=settings.making.threads,
        )
    if "rejected" in variant.card:
        lost = variant.card["rejected"]
        say(
            f"{variant.name} ends before {lost['method']!r}: after it, {lost['role']} scores {lost['quality']:.3f} on "
            f"{lost['asks']} asks, {lost['compared_with']} {lost['quality_before']:.3f}, and the recipe allows "
            f"{lost['margin']:g} less."
        )
    say(f"variant {variant.name} ({variant.id}) is on the shelf: {place.path(variant)}")
    show_variants([variant], place)


def draw_variant(name: str, out: Path, shelf: Shelf) -> None:
    """Draw the thinking curves of a variant's card; see `metier variants draw --help`."""
    from ..report.thinking_figures import draw_thinking, thinking_of

    points, curves = thinking_of(shelf.get(name))
    with writing(out):
        draw_thinking(out, points, curves)
    say(f"{len(points)} points of {len(curves)} variants are drawn in {out}")


def list_variants(shelf: Shelf, verify: bool) -> None:
    """Print the shelf as a table; with `verify`, check every file first.

    Raises: VariantError when `verify` finds one that is wrong.
    """
    found, damaged = shelf.list(), shelf.damaged()
    for folder, error in damaged:
        say(f"bad: {folder.name}: {error}", style="red")
    if verify:
        for variant in found:
            shelf.verify(variant)
        if damaged:
            raise damaged[0][1]
        say(f"{len(found)} variants verified: every file has the hash of its record.")
    if not found:
        places = ", ".join(map(str, (shelf.folder, *shelf.also)))
        say(f"No variants in {places}. Make one: metier make RECIPE.yaml")
        return
    show_variants(found, shelf)


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
    wide = not OUT.is_terminal or OUT.width >= WIDE
    # A column that says nothing of any variant leaves its room to the others.
    heads = [head for head in rows[0] if any(row[head] != "–" for row in rows) and (wide or head != "measured")]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(row[head] for head in heads))
    show(table)
    if not wide and len(variants) == 1:
        for line in _measured(variants[0].card):
            show(f"  {line}")
    elif not wide:
        say(f"(A terminal of {WIDE} columns shows what else was measured.)")


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
