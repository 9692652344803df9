"""Variants that a study trains: made once, with a line now and then of how far it is and what it took."""

from __future__ import annotations

from harness import clocked

from metier.specializers import Recipe, Shelf, Variant
from metier.specializers.recipes.produce import produce
from metier.specializers.shelf.bundled_model import DEFAULT_BASE
from metier.specializers.training.loop import Progress

__all__ = ["make", "say"]


def make(arm: str, recipe: Recipe, shelf: Shelf, base: str = DEFAULT_BASE) -> Variant:
    """Make an arm's variant, or find it on the shelf."""
    with clocked() as spent:
        variant = produce(recipe, shelf=shelf, base=base, on_progress=say)
    took = f"{spent.wall_s:.0f} s, {spent.cpu_s:.0f} CPU-s"
    print(f"{arm}: {variant.name} ({variant.id}), card {variant.card}, {took}", flush=True)
    return variant


def say(progress: Progress) -> None:
    """A line every 20 steps."""
    if progress.step % 20 == 0:
        print(f"step {progress.step}/{progress.steps} loss {progress.value:.3f}, {progress.eta_s:.0f} s", flush=True)
