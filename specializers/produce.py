"""From a recipe to a variant on the shelf; a killed run goes on where its last checkpoint was."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..agents.errors import RecipeError, TrainingError, VariantError
from ..agents.prompts import PROMPT_LAYOUT
from .base_model import base_fingerprint, find_base
from .bundled_model import BUNDLED
from .file_lock import exclusive
from .methods import Job, Made, find_method
from .recipe import Recipe, data_fingerprint, read_rows
from .shelf import Shelf
from .training import Progress
from .variant import EngineSpec, Variant

__all__ = ["TRAINING_LOG", "produce"]

TRAINING_LOG = "training_log.jsonl"


def produce(
    recipe: Recipe,
    *,
    shelf: Shelf,
    base: str | Path,
    on_progress: Callable[[Progress], None] | None = None,
    work_dir: Path | None = None,
) -> Variant:
    """Make the variant a recipe describes, put it on the shelf, and return its record.

    `base` is anything `find_base` takes. Checkpoints go to `work_dir` (by default beside the shelf's variants),
    in a folder named by recipe, data, base and parent: a run that was killed, also with kill -9, goes on from
    its last checkpoint and ends with the same weights. A variant already made this way is returned at once.
    Raises: RecipeError (parent, data or settings do not fit), TrainingError (not finite, or another process is
    making it), VariantError (shelf, base or parent cannot be used).
    """
    folder = find_base(base)
    fingerprint = base_fingerprint(folder)
    parent = None if recipe.parent == "base" else shelf.get(recipe.parent)
    if parent is not None and parent.base != fingerprint:
        raise RecipeError(
            f"recipe {recipe.name!r}: parent {recipe.parent!r} descends from base {parent.base}",
            expected=f"a variant of the base in use, {fingerprint}",
            remedy="Name the parent's own base, or another parent.",
        )
    rows = read_rows(recipe)
    layouts = {row.prompt_layout for row in rows} - {PROMPT_LAYOUT}
    if layouts:
        raise RecipeError(
            f"recipe {recipe.name!r}: its rows have prompt layout {sorted(layouts)}",
            expected=f"layout {PROMPT_LAYOUT}",
            remedy="Export the traffic again with this version.",
        )
    record: dict[str, Any] = {
        "base": fingerprint,
        "parent": None if parent is None else parent.id,
        "recipe": recipe.model_dump(mode="json"),
        "seed": recipe.seed,
        "data": data_fingerprint(rows),
        "prompt_layout": PROMPT_LAYOUT,
    }
    for known in shelf.list():
        if known.model_dump(mode="json", include=set(record)) == record:
            return known
    weights = "base" if parent is None else parent.engine.weights
    adapter = None if parent is None or parent.ask.adapter is None else shelf.path(parent) / "adapter"
    job_name = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    work = (work_dir or shelf.folder / ".work") / job_name
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VariantError(
            f"the work folder {work} cannot be made: {error.strerror or error}",
            expected="a folder that can be written",
            remedy="Choose another shelf, or another work folder.",
        ) from error
    with exclusive(work / "lock", wait=False) as alone:
        if not alone:
            raise TrainingError(
                f"another process is making {recipe.name!r}", expected="one at a time", remedy="Wait for it."
            )
        staging = work / "staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        job = Job(
            model=folder if weights == "base" else shelf.path(weights) / "weights",
            base_name=base if isinstance(base, str) and base in BUNDLED else folder.name,
            adapter=adapter,
            rows=rows,
            seed=recipe.seed,
            out=staging,
            work_dir=work,
            fingerprint=job_name,
            on_progress=on_progress,
        )
        made, seconds = _apply_methods(recipe, job)
        variant = shelf.add(
            staging,
            name=recipe.name,
            record={
                **record,
                "engine": EngineSpec(base=fingerprint, weights=weights),
                "ask": made.ask,
                "card": {**made.card, "cpu_s": seconds},
            },
        )
    shutil.rmtree(work, ignore_errors=True)
    return variant


def _apply_methods(recipe: Recipe, job: Job) -> tuple[Made, float]:
    """Apply the recipe's methods in order, each to what the one before made; returns the CPU-seconds too."""
    log: list[dict[str, Any]] = []
    made: Made | None = None
    began = time.process_time()
    for number, settings in enumerate(recipe.methods):
        name = str(settings.model_dump()["method"])
        stage = job.work_dir / f"{number}-{name}"
        stage.mkdir(exist_ok=True)
        made = find_method(name).make(settings, replace(job, work_dir=stage, fingerprint=f"{job.fingerprint}-{number}"))
        log += [{"method": name, **entry} for entry in made.log]
        if (job.out / "adapter").is_dir():
            job = replace(job, adapter=job.out / "adapter")
    assert made is not None  # a recipe has at least one method
    with (job.out / TRAINING_LOG).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in log)
    return made, round(time.process_time() - began, 1)
