"""The methods of a recipe one after the other, each in a folder of its own and starting from what the last one made."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ...agents.errors import TrainingError
from ...agents.record_files import read_record
from ...agents.whole_files import write_whole
from ..methods.method import Job, Made, find_method
from ..shelf.base_model import check_base
from ..shelf.companion_files import add_companions
from ..shelf.fier_settings import FierSettings
from ..shelf.variant import AskSpec
from ..training.loop import Progress
from .recipe import Recipe

__all__ = ["TRAINING_LOG", "Stage", "apply_methods", "stage_results"]

T = TypeVar("T")

TRAINING_LOG = "training_log.jsonl"
DONE, SPENT = "made.json", "cpu_s"


@dataclass(frozen=True)
class Stage:
    """One method of a recipe that is done: its name, its folder, what it returned, and its CPU-seconds.

    `cpu_s` counts every process that worked on it, up to the last progress that one killed had made known.
    """

    name: str
    out: Path
    made: Made
    cpu_s: float


@dataclass(frozen=True)
class _StageRecord:
    """What `made.json` keeps of a stage."""

    ask: AskSpec
    card: dict[str, Any]
    log: list[dict[str, int | float]]  # whole numbers stay whole: the log is part of what a variant is named by
    cpu_s: float
    fier: FierSettings | None = None


def apply_methods(recipe: Recipe, job: Job, keep: Callable[[Sequence[Stage]], bool] | None = None) -> list[Stage]:
    """Apply a recipe's methods in order; those completed before a kill are not repeated. `keep` is called with all
    stages so far and returns whether the last one stays; the first that does not stay ends the recipe.
    Raises: RecipeError and TrainingError of the methods, VariantError when a checkpoint they wrote is not whole,
    OSError when the disk is full.
    """
    stages: list[Stage] = []
    for number, settings in enumerate(recipe.methods):
        name = str(settings.model_dump()["method"])
        folder = job.work_dir / f"{number}-{name}"
        folder.mkdir(exist_ok=True)
        stage = _read_done(name, folder)
        if stage is None:
            stage = _apply(name, settings, folder, replace(job, fingerprint=f"{job.fingerprint}-{number}"))
        if keep is not None and not keep([*stages, stage]):
            break
        stages.append(stage)
        weights, adapter = stage.out / "weights", stage.out / "adapter"
        if weights.is_dir():
            job = replace(job, model=weights, adapter=None)
        job = replace(job, ask=stage.made.ask, adapter=adapter if adapter.is_dir() else job.adapter)
        job = replace(job, parent=None, parent_name=None, try_out=None)  # what comes of this is on no shelf yet
    return stages


def stage_results(stages: Sequence[Stage], staging: Path) -> None:
    """Put together the variant's folder: the last weights made, the adapter that goes with them, and the log.

    Raises: OSError when the disk is full.
    """
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for stage in stages:
        if (stage.out / "weights").is_dir():
            shutil.rmtree(staging / "adapter", ignore_errors=True)  # it fits the weights it was made for only
        for part in ("weights", "adapter"):
            if (stage.out / part).is_dir():
                shutil.rmtree(staging / part, ignore_errors=True)
                shutil.copytree(stage.out / part, staging / part, copy_function=_link)
    with (staging / TRAINING_LOG).open("w", encoding="utf-8") as file:
        for stage in stages:
            file.writelines(json.dumps({"method": stage.name, **entry}) + "\n" for entry in stage.made.log)


def _apply(name: str, settings: Any, folder: Path, job: Job) -> Stage:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    spent = _CpuClock(folder / SPENT)

    def note(progress: Progress) -> None:
        spent.write()
        if job.on_progress is not None:
            job.on_progress(progress)

    made = find_method(name).make(settings, replace(job, out=out, work_dir=folder, on_progress=note))
    if (out / "weights").is_dir():
        add_companions(job.model, out / "weights")
        check_base(out / "weights")
    if (made.ask.adapter is None) == (out / "adapter").is_dir():
        raise TrainingError(
            f"method {name!r} returned an ask half with adapter {made.ask.adapter!r}, and "
            f"{'an' if (out / 'adapter').is_dir() else 'no'} adapter folder",
            expected="both or neither",
        )
    stage = Stage(name, out, made, round(spent.seconds(), 1))
    record = {"ask": made.ask.model_dump(), "card": made.card, "log": made.log, "cpu_s": stage.cpu_s}
    if made.fier is not None:
        record["fier"] = made.fier.model_dump()
    write_whole(folder / DONE, json.dumps(record))
    return stage


class _CpuClock:
    """CPU-seconds of this process since now, on top of those that processes before it left in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        before_s = _read(path, float) if path.exists() else 0.0
        self._began_s = time.process_time() - before_s

    def seconds(self) -> float:
        return time.process_time() - self._began_s

    def write(self) -> None:
        write_whole(self._path, f"{self.seconds():.1f}")


def _read_done(name: str, folder: Path) -> Stage | None:
    path = folder / DONE
    if not path.exists():
        return None
    record = _read(path, _StageRecord)
    made = Made(ask=record.ask, card=record.card, log=record.log, fier=record.fier)
    return Stage(name, folder / "out", made, record.cpu_s)


def _read(path: Path, kind: type[T]) -> T:
    """What this file keeps of a stage; raises TrainingError when it is damaged."""
    return read_record(
        path,
        kind,
        TrainingError,
        what="record of a stage",
        expected="what `metier make` wrote there",
        remedy=f"Remove {path}: the method is then applied again.",
    )


def _link(source: str, target: str) -> str:
    """Give a file a second name, so that a checkpoint is not copied; where file systems cannot, copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
