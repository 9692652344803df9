"""From a recipe to a variant on the shelf; a killed run goes on where its last checkpoint was."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...agents.backend import Backend
from ...agents.chat.chat_template import TemplateSettings
from ...agents.content_hash import content_hash
from ...agents.errors import QualityError, RecipeError, TrainingError, VariantError
from ...agents.prompts import PROMPT_LAYOUT
from ...agents.traffic import data_fingerprint
from ...agents.whole_files import try_folder
from ..checkpoints.self_check import make_self_check
from ..methods.method import Job, Made, find_method
from ..shelf.base_model import base_fingerprint, find_base
from ..shelf.bundled_model import BUNDLED
from ..shelf.file_lock import exclusive
from ..shelf.shelf import Shelf
from ..shelf.variant import AskSpec, EngineSpec, Variant
from ..training.loop import Progress
from .acceptance import Judge, OpenBackend
from .computing import computing
from .recipe import Recipe, read_rows
from .stages import TRAINING_LOG, Stage, apply_methods, stage_results

__all__ = ["TRAINING_LOG", "produce"]

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
_PLAIN = TemplateSettings()


def produce(
    recipe: Recipe,
    *,
    shelf: Shelf,
    base: str | Path,
    on_progress: Callable[[Progress], None] | None = None,
    work_dir: Path | None = None,
    open_backend: OpenBackend | None = None,
    on_note: Callable[[str], None] | None = None,
    threads: int | None = None,
    template: TemplateSettings = _PLAIN,
) -> Variant:
    """Make the variant a recipe describes, put it on the shelf, and return its record.

    `base` is anything `find_base` takes. Checkpoints go to `work_dir` (by default beside the shelf's variants),
    in a folder named by recipe, data, base and parent: a run that was killed, also with kill -9, goes on after
    the last method that was done, or from the checkpoint of the one that was not, and ends with the same weights.
    A variant already made this way is returned at once.

    A recipe with `accept` measures what each method made through `open_backend(shelf)`, and ends with the last one
    that held the role's quality; its card says what was rejected. `on_note` hears what is being measured, and how it
    is computed: on `threads`, or as many as `training_threads` finds free.
    `template` says how prompts are written in the base's chat template; its arguments, and tags that were set, become
    part of the record.
    Raises: RecipeError (parent, data or settings do not fit), TrainingError (not finite, or another process is
    making it), QualityError (already the first method lost too much), VariantError (shelf, base or parent cannot be
    used, or the disk is full).
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
    layout = max([1 if parent is None else parent.prompt_layout, *(row.prompt_layout for row in rows)])
    if layout > PROMPT_LAYOUT:
        raise RecipeError(
            f"recipe {recipe.name!r}: its rows have prompt layout {layout}",
            expected=f"at most layout {PROMPT_LAYOUT}",
            remedy="Export the traffic again with this version.",
        )
    written: dict[str, Any] = {"chat_template_args": template.args} if template.args else {}
    if template.tags is not None:
        written["thinking_tags"] = template.tags.model_dump(mode="json")
    record: dict[str, Any] = {
        "base": fingerprint,
        "parent": None if parent is None else parent.id,
        "recipe": recipe.model_dump(mode="json", exclude={"accept"}),
        "seed": recipe.seed,
        "data": data_fingerprint(rows),
        "prompt_layout": layout,
        **written,
    }
    # What is accepted decides where a recipe ends, not what its methods make: another margin trains nothing again.
    job_name = content_hash(record)
    asked = record
    if recipe.accept is not None:
        accept = recipe.accept.model_dump(mode="json")
        asked = {**record, "recipe": {**record["recipe"], "accept": accept}}
    for known in shelf.list():
        if known.model_dump(mode="json", include={*asked, "chat_template_args", "thinking_tags"}) == asked:
            return known
    work = (work_dir or shelf.folder / ".work") / job_name
    checkpoint = "base" if parent is None else parent.checkpoint
    job = Job(
        model=folder if checkpoint == "base" else shelf.path(checkpoint) / "weights",
        base_name=base if isinstance(base, str) and base in BUNDLED else folder.name,
        adapter=None if parent is None or parent.ask.adapter is None else shelf.path(parent) / "adapter",
        ask=AskSpec() if parent is None else parent.ask,
        rows=rows,
        seed=recipe.seed,
        out=work / "staging",
        work_dir=work,
        fingerprint=job_name,
        on_progress=on_progress,
        parent=None if parent is None else parent.id,
        parent_name=None if parent is None else parent.name,
        serve=None if open_backend is None else partial(open_backend, shelf),
        folder=recipe.folder,
        template=template,
    )
    _check_methods(recipe, job)
    for title, place in (("work folder", work), ("shelf", shelf.folder)):
        try:
            place.mkdir(parents=True, exist_ok=True)
            try_folder(place)
        except OSError as error:
            raise VariantError(
                f"the {title} {place} cannot be made or written: {error.strerror or error}",
                expected="a folder that can be written",
                remedy="Choose another shelf, or another work folder.",
            ) from error
    with exclusive(work / "lock", wait=False) as alone:
        if not alone:
            raise TrainingError(
                f"another process is making {recipe.name!r}", expected="one at a time", remedy="Wait for it."
            )
        making = _Making(recipe, job, parent, checkpoint, record)
        if open_backend is not None:
            try_out = partial(making.try_out, _candidates(shelf, work), open_backend)
            making = replace(making, job=replace(job, try_out=try_out))
        try:
            judge = _judge(recipe, shelf, work, open_backend, on_note)
            with computing(recipe, threads, on_note) as machine:
                stages, card = making.kept(judge) if judge else (apply_methods(recipe, making.job), {})
                card = {**_card(stages), **card, "machine": machine.model_dump(mode="json")}
                variant = replace(making, record=asked).add(stages, shelf, name=recipe.name, card=card, self_check=True)
        except Exception as error:
            if not _is_write_error(error):
                raise
            raise VariantError(
                f"variant {recipe.name!r} cannot be written: {error}",
                expected=f"room for it in {work}",
                remedy="Free space there, or choose another work folder, and make it again: it goes on.",
            ) from error
    shutil.rmtree(work, ignore_errors=True)
    return variant


@dataclass(frozen=True)
class _Making:
    """A recipe at work: turns the stages that are done into a variant on a shelf."""

    recipe: Recipe
    job: Job
    parent: Variant | None
    checkpoint: str
    record: dict[str, Any]

    def add(
        self, stages: Sequence[Stage], shelf: Shelf, *, name: str, card: dict[str, Any], self_check: bool
    ) -> Variant:
        """Put what the stages made on a shelf; `self_check` adds what its engine must answer to the card."""
        out = self.job.out
        stage_results(stages, out)
        own = (out / "weights").is_dir()
        if own and self_check:
            card = {**card, "self_check": make_self_check(out / "weights", self.job.template)}
        engine = EngineSpec(base=self.record["base"]) if self.parent is None else self.parent.engine
        fier = next((stage.made.fier for stage in reversed(stages) if stage.made.fier is not None), None)
        attention = {} if fier is None else {"attention": "fier", "fier": fier}
        changed = {
            "engine": engine.model_copy(update={"weights": "own" if own else self.checkpoint, **attention}),
            "ask": stages[-1].made.ask,
            "card": card,
        }
        return shelf.add(out, name=name, record={**self.record, **changed})

    def try_out(
        self, shelf: Shelf, open_backend: OpenBackend, trials: Sequence[Made]
    ) -> tuple[list[str], AbstractAsyncContextManager[Backend]]:
        """See `Job.try_out`; `shelf` is where the candidates go."""
        ids = []
        for number, made in enumerate(trials):
            out = self.job.work_dir / "trial"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            if self.job.adapter is not None:
                shutil.copytree(self.job.adapter, out / "adapter")
            name = f"{self.recipe.name}.trial-{number}"
            ids.append(self.add([Stage("trial", out, made, 0.0)], shelf, name=name, card={}, self_check=False).id)
        return ids, open_backend(shelf)

    def kept(self, judge: Judge) -> tuple[list[Stage], dict[str, Any]]:
        """Apply the methods for as long as the judge keeps what they make; the stages, and the card's word on it.

        Raises: QualityError when not even the first is kept.
        """
        verdicts: list[dict[str, Any]] = []
        rejected: dict[str, Any] = {}
        last: Variant | None = self.parent

        def keep(stages: Sequence[Stage]) -> bool:
            nonlocal last
            name = f"{self.recipe.name}.{len(stages)}-{stages[-1].name}"
            candidate = self.add(stages, judge.shelf, name=name, card={}, self_check=False)
            accepted, verdict = judge.judge(candidate, last)
            if accepted:
                last = candidate
                verdicts.append(verdict)
            else:
                rejected.update(method=stages[-1].name, **verdict)
            return accepted

        stages = apply_methods(self.recipe, self.job, keep)
        if not stages:
            raise QualityError(
                f"recipe {self.recipe.name!r}: after {rejected['method']!r}, role {rejected['role']!r} scores "
                f"{rejected['quality']:.3f} on {rejected['asks']} asks, {rejected['compared_with']} "
                f"{rejected['quality_before']:.3f}",
                expected=f"at most {rejected['margin']:g} less",
                remedy="Allow a larger `accept.margin` (nothing is trained again), or change the method's settings.",
            )
        return stages, {**verdicts[-1], **({"rejected": rejected} if rejected else {})}


def _judge(
    recipe: Recipe,
    shelf: Shelf,
    work: Path,
    open_backend: OpenBackend | None,
    on_note: Callable[[str], None] | None,
) -> Judge | None:
    if recipe.accept is None:
        return None
    if open_backend is None:
        raise RecipeError(
            f"recipe {recipe.name!r} accepts by quality, and there is no backend to measure it with",
            expected="open_backend=…",
            remedy="Make it with `metier make RECIPE.yaml`, pass a backend, or leave `accept` out.",
        )
    candidates = _candidates(shelf, work)
    return Judge(recipe, recipe.accept, shelf=candidates, work_dir=work, open_backend=open_backend, on_note=on_note)


def _candidates(shelf: Shelf, work: Path) -> Shelf:
    """Where what is only measured lies, beside everything it may descend from."""
    return Shelf(work / "candidates", also=[shelf.folder, *shelf.also])


def _check_methods(recipe: Recipe, job: Job) -> None:
    """Say what cannot work before anything is made; methods after new weights check those when their turn comes."""
    for settings in recipe.methods:
        method = find_method(settings.model_dump()["method"])
        if method.check is not None:
            method.check(settings, job)
        if method.makes == "weights":
            return


def _is_write_error(error: Exception) -> bool:
    """Whether the disk is at fault; safetensors has an error of its own, for this and for other things."""
    if isinstance(error, OSError):
        return error.errno in _WRITE_ERRORS
    return type(error).__name__ == "SafetensorError" and "I/O error" in str(error)


def _card(stages: list[Stage]) -> dict[str, Any]:
    """What was measured: a later method's number stands for an earlier one of that name; `stages` keeps them all."""
    card = {name: value for stage in stages for name, value in stage.made.card.items()}
    if len(stages) > 1:
        card["stages"] = [{"method": stage.name, "cpu_s": stage.cpu_s, **stage.made.card} for stage in stages]
    return {**card, "cpu_s": round(sum(stage.cpu_s for stage in stages), 1)}
