"""What `metier simulate` does: fit one recorded batch or several, then predict other set-ups, or check predictions."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from rich.table import Table

from ...agents.errors import SettingsError, TaskSetError
from ...agents.frozen_model import FrozenModel
from ..console import say, show
from ..meters.percentiles import percentile
from ..store.reading import store_for_reading
from .recorded_programs import RecordedBatch, read_programs
from .service_model import FEWEST_ASKS, ServiceModel, fit_service
from .serving_plan import ServingPlan
from .simulation import SimulationResult, simulate

__all__ = ["SimulateOptions", "Validation", "recorded_plan", "run_simulate", "swept_plans", "validate"]

MOST_PLANS = 1000


class SimulateOptions(FrozenModel):
    """What to simulate: every combination of the values in `sweep`, or what the stores in `against` recorded."""

    store: Path
    """Run store that programs and costs are taken from."""

    batches: tuple[str, ...] = ()
    """Batches of it. Empty is the newest."""

    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    """Field of `ServingPlan` → values to try."""

    assigned: dict[str, str] = Field(default_factory=dict)
    """Role → variant that plays it instead."""

    against: tuple[Path, ...] = ()
    """Run stores whose batches are predicted and compared."""

    as_json: bool = False
    """Whether to print JSON."""


@dataclass(frozen=True)
class Validation:
    """A recorded batch and what was predicted for it: with its own programs, and with those of the fit in its place."""

    label: str
    plan: ServingPlan
    variants: dict[str, str]
    recorded_s: float
    own_programs_s: float
    fitted_programs_s: float

    def error(self, predicted_s: float) -> float:
        """(predicted - recorded) ÷ recorded."""
        return predicted_s / self.recorded_s - 1.0


def recorded_plan(batch: RecordedBatch) -> ServingPlan:
    """How a batch was served, as far as its store says."""
    settings = batch.settings
    return ServingPlan(
        concurrency=batch.concurrency,
        replicas=batch.replicas,
        adapter_slots=settings.adapter_slots,
        foresight=settings.foresight,
        foresight_asks=settings.foresight_asks,
        pin_asks=settings.pin_asks,
        prefetch_asks=settings.prefetch_asks,
        pass_asks=settings.adapter_pass_asks,
        max_running=settings.max_running,
        max_batch_tokens=settings.max_batch_tokens,
        block_tokens=settings.block_tokens,
        programs=len(batch.programs),
    )


def swept_plans(plan: ServingPlan, sweep: Mapping[str, Sequence[Any]]) -> list[ServingPlan]:
    """`plan` with every combination of the values; raises SettingsError for a value out of range, or too many."""
    plans = []
    for values in itertools.product(*sweep.values()):
        try:
            plans.append(ServingPlan(**{**plan.model_dump(), **dict(zip(sweep, values, strict=True))}))
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]).replace("_", "-")
            raise SettingsError(f"{name} {first['input']!r}: {first['msg']}", remedy="Correct the value.") from error
        if len(plans) > MOST_PLANS:
            raise SettingsError(
                f"the options make more than {MOST_PLANS} combinations", expected="fewer values at a time"
            )
    return plans


def validate(fitted: Sequence[RecordedBatch], model: ServiceModel, other: RecordedBatch) -> Validation:
    """Predict a recorded batch with a model that was fitted on others."""
    plan = recorded_plan(other)
    programs = [program for batch in fitted for program in batch.programs]
    return Validation(
        label=other.ledger.batch.label,
        plan=plan,
        variants=other.variants,
        recorded_s=other.completion_s,
        own_programs_s=simulate(other.programs, model, plan).completion_s,
        fitted_programs_s=simulate(programs, model, plan.model_copy(update={"variants": other.variants})).completion_s,
    )


def run_simulate(options: SimulateOptions) -> None:
    """Print what the plans come to, or how predictions compare with what was recorded.

    Raises: SettingsError, and what `read_programs` and `fit_service` raise.
    """
    fitted = [read_programs(options.store, name) for name in options.batches or (None,)]
    model = fit_service(fitted)
    if options.against:
        _print_validations(options, model, _validations(options, fitted, model))
        return
    programs = [program for batch in fitted for program in batch.programs]
    _check_roles(fitted, options.assigned)
    plan = recorded_plan(fitted[-1]).model_copy(update={"variants": options.assigned})
    plans = swept_plans(plan, options.sweep)
    outcomes = [(plan, simulate(programs, model, plan)) for plan in plans]
    if options.as_json:
        _print_json(model, plans=[{**plan.model_dump(), **_summary(outcome)} for plan, outcome in outcomes])
        return
    show(_model_line(fitted, model))
    show(_outcome_table(outcomes, options.sweep))
    _print_caution(model)


def _check_roles(fitted: Sequence[RecordedBatch], assigned: Mapping[str, str]) -> None:
    known = {role for batch in fitted for role in batch.variants}
    unknown = sorted(set(assigned) - known)
    if unknown:
        raise SettingsError(
            f"no role {', '.join(unknown)} in these programs", expected=f"one of {', '.join(sorted(known))}"
        )


def _validations(
    options: SimulateOptions, fitted: Sequence[RecordedBatch], model: ServiceModel
) -> list[tuple[Path, Validation]]:
    """Every batch of the other stores that was not fitted and has asks enough to say something."""
    used = {batch.ledger.batch.id for batch in fitted}
    found = []
    for path in options.against:
        read_programs(path)  # so that what is wrong with the store is said
        with store_for_reading(path) as store:
            names = [record.id for record in store.batches() if record.id not in used]
        for name in names:
            try:
                other = read_programs(path, name)
            except TaskSetError:
                continue
            if other.asks >= FEWEST_ASKS and not other.left_out:
                found.append((path, validate(fitted, model, other)))
    if not found:
        raise TaskSetError(
            f"no batch to compare with in {', '.join(map(str, options.against))}",
            expected=f"whole batches of at least {FEWEST_ASKS} asks, other than the fitted ones",
        )
    return found


def _summary(outcome: SimulationResult) -> dict[str, float]:
    return {
        "completion_s": outcome.completion_s,
        "programs_per_min": 60 * len(outcome.program_s) / max(outcome.completion_s, 1e-9),
        "program_p95_s": percentile(outcome.program_s, 0.95),
        "ask_p50_s": percentile(outcome.ask_s, 0.5),
        "ask_p95_s": percentile(outcome.ask_s, 0.95),
        "asks": len(outcome.ask_s),
        "loads": outcome.loads,
        "cached_tokens": outcome.cached_tokens,
        "steps": outcome.steps,
        "busy": outcome.busy,
    }


def _outcome_table(
    outcomes: Sequence[tuple[ServingPlan, SimulationResult]], sweep: Mapping[str, Sequence[Any]]
) -> Table:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    swept = [name for name, values in sweep.items() if len(values) > 1]
    for head in (
        *(name.replace("_", " ") for name in swept),
        "completion s", "programs/min", "program p95 s", "ask p50 s", "ask p95 s", "loads", "cached tokens", "busy",
    ):  # fmt: skip
        drawn.add_column(head, justify="left" if head in ("placement", "order") else "right")
    for plan, outcome in outcomes:
        row = _summary(outcome)
        drawn.add_row(
            *(str(getattr(plan, name)) for name in swept),
            f"{row['completion_s']:.1f}", f"{row['programs_per_min']:.1f}", f"{row['program_p95_s']:.2f}",
            f"{row['ask_p50_s']:.2f}", f"{row['ask_p95_s']:.2f}", f"{outcome.loads}", f"{outcome.cached_tokens}",
            f"{outcome.busy:.0%}",
        )  # fmt: skip
    return drawn


def _print_validations(options: SimulateOptions, model: ServiceModel, found: Sequence[tuple[Path, Validation]]) -> None:
    if options.as_json:
        rows = [
            {
                "store": str(path), "label": v.label, "concurrency": v.plan.concurrency,
                "adapter_slots": v.plan.adapter_slots, "variants": v.variants, "recorded_s": v.recorded_s,
                "own_programs_s": v.own_programs_s, "own_programs_error": v.error(v.own_programs_s),
                "fitted_programs_s": v.fitted_programs_s, "fitted_programs_error": v.error(v.fitted_programs_s),
            }
            for path, v in found
        ]  # fmt: skip
        _print_json(model, validations=rows)
        return
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("batch", "at a time", "slots", "recorded s", "predicted s", "error", "fitted programs s", "error"):
        drawn.add_column(head, justify="left" if head == "batch" else "right")
    for _, v in found:
        drawn.add_row(
            v.label, f"{v.plan.concurrency}", f"{v.plan.adapter_slots}", f"{v.recorded_s:.1f}",
            f"{v.own_programs_s:.1f}", f"{v.error(v.own_programs_s):+.1%}",
            f"{v.fitted_programs_s:.1f}", f"{v.error(v.fitted_programs_s):+.1%}",
        )  # fmt: skip
    show(drawn)
    _print_caution(model)
    worst = max(abs(v.error(v.own_programs_s)) for _, v in found)
    show(f"largest error {worst:.1%} over {len(found)} batches")


def _model_line(fitted: Sequence[RecordedBatch], model: ServiceModel) -> str:
    left_out = sum(batch.left_out for batch in fitted)
    return (
        f"A step takes {1000 * model.step_s:.1f} ms, and {1000 * model.prompt_token_s:.2f} ms a prompt token, "
        f"{1000 * model.row_s:.2f} ms a row, {1000 * model.adapter_s:.2f} ms an adapter; a load "
        f"{1000 * model.load_s:.0f} ms (fitted on {model.fitted_asks} asks, median misfit {model.misfit:.0%}"
        + (f", {left_out} runs that had not ended left out)." if left_out else ").")
        + f" Recorded: {sum(batch.completion_s for batch in fitted):.1f} s."
    )


def _print_caution(model: ServiceModel) -> None:
    if model.extrapolates:
        say(
            f"Nearly all answers were written {model.fewest_rows:.0f} to {model.most_rows:.0f} at a time, so that what "
            "larger and smaller batches take is a guess: fit a batch of another --concurrency too (--batch, twice).",
            style="yellow",
        )


def _print_json(model: ServiceModel, **more: Any) -> None:
    sys.stdout.write(json.dumps({"model": model.model_dump(), **more}, indent=2) + "\n")
