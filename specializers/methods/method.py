"""The methods a recipe may name: what each is given, what it returns, and where it lives.

A method writes an adapter, a checkpoint, or both. The next method of the recipe starts from what it wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from ...agents.backend import Backend
from ...agents.chat.chat_template import TemplateSettings
from ...agents.errors import RecipeError, did_you_mean
from ...agents.traffic import TrafficRow
from ..shelf.fier_settings import FierSettings
from ..shelf.variant import AskSpec
from ..training.loop import Progress

__all__ = ["METHODS", "Job", "Made", "Method", "find_method"]

# Method name → module of this package that defines METHOD; imported when a recipe names it.
METHODS = {
    "depth_pruning": ".pruning.depth",
    "fier": ".fier.fier",
    "lora": ".lora",
    "msq": ".msq.msq",
    "npft": ".npft.npft",
    "pat": ".pat.pat",
    "ptq": ".ptq.ptq",
    "shortest_correct": ".thinking.shortest_correct",
    "thinking": ".thinking.sweep",
    "trex": ".trex.trex",
    "width_pruning": ".pruning.width",
}


@dataclass(frozen=True)
class Job:
    """What a method is given.

    `parent` is the content id of the variant on the shelf that this starts from, `parent_name` its name; None for the
    base and after another method of the recipe. `serve` opens a backend that serves the whole shelf, None where
    there is none. `try_out` puts the parent with each of the given engine halves on a shelf of candidates, and returns
    their ids and a backend, not opened yet, that serves them; None where there is none, and after another method of
    the recipe. `folder` is where the recipe's relative paths start.
    `model` is the checkpoint folder to start from; `adapter` and `ask` are the adapter folder and the ask half of
    what came before, if it has an adapter. `base_name` is how people call the base. Results go to `out`: `adapter/`
    in the peft layout, `weights/` as a checkpoint (tokenizer files are added to it). New weights drop the adapter,
    unless the method writes one that fits them. Checkpoints of the work go to `work_dir`; `fingerprint` covers
    recipe, data, base and parent. `template` is how prompts are written in the model's chat template.
    """

    model: Path
    base_name: str
    adapter: Path | None
    rows: Sequence[TrafficRow]
    seed: int
    out: Path
    work_dir: Path
    fingerprint: str
    on_progress: Callable[[Progress], None] | None = None
    ask: AskSpec = AskSpec()
    parent: str | None = None
    parent_name: str | None = None
    serve: Callable[[], AbstractAsyncContextManager[Backend]] | None = None
    try_out: Callable[[Sequence[Made]], tuple[list[str], AbstractAsyncContextManager[Backend]]] | None = None
    folder: Path = Path()
    template: TemplateSettings = TemplateSettings()


@dataclass(frozen=True)
class Made:
    """What a method returns: the new ask half, what it measured, its log, one entry per step, and new attention."""

    ask: AskSpec
    card: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)
    fier: FierSettings | None = None


@dataclass(frozen=True)
class Method:
    """One way to make a variant: its settings as a pydantic model, and the function that does it.

    `makes` says whether it writes new weights, `needs_data(settings)` whether it looks at rows. `check(settings,
    job)` raises RecipeError for what cannot work on the job's checkpoint; it is called before any method of the
    recipe runs, as long as that checkpoint is the one the method will get, and must take no time.
    """

    settings: type[BaseModel]
    make: Callable[[Any, Job], Made]
    makes: Literal["adapter", "weights"] = "adapter"
    needs_data: Callable[[Any], bool] = lambda settings: True
    check: Callable[[Any, Job], None] | None = None


def find_method(name: str) -> Method:
    """Import the method of that name; raises RecipeError that lists those there are."""
    if name not in METHODS:
        raise RecipeError(
            f"there is no method {name!r}",
            expected=f"one of {', '.join(sorted(METHODS))}",
            remedy=did_you_mean(name, METHODS, "Correct the method's name."),
        )
    method = import_module(METHODS[name], __package__).METHOD
    assert isinstance(method, Method)
    return method
