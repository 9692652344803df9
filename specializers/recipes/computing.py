"""How a recipe's methods compute on this machine: threads and number type, said before they start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..machine.machine import Machine, this_machine
from ..machine.number_types import training_number_type
from ..machine.threads import computing_on, training_threads
from ..methods.trained import training_device
from ..training.loop import TrainingSettings
from .recipe import Recipe

__all__ = ["computing"]


@contextmanager
def computing(recipe: Recipe, threads: int | None, on_note: Callable[[str], None] | None) -> Iterator[Machine]:
    """Within, the methods compute on as many threads as suit the machine; yields the machine, for the card."""
    count, dtype = training_threads(threads), ""
    how = [f"computes on {count}"]
    trained = [settings.dtype for settings in recipe.methods if isinstance(settings, TrainingSettings)]
    if trained:
        found = training_number_type(training_device(), trained[-1])
        dtype = found.dtype
        how.append(f"trains in {found}")
    if on_note is not None:
        on_note(", ".join(how))
    with computing_on(count.threads):
        yield this_machine(dtype)
