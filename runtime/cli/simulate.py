"""The verb of the command line that tries other set-ups on a simulated clock."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...agents.errors import SettingsError

__all__ = ["add_simulate_command"]


def add_simulate_command(app: typer.Typer) -> None:
    """Add `simulate` to the command line."""
    app.command(
        epilog="Example: `metier simulate runs/runs.db --concurrency 8,16,32 --slots 2,4`, or "
        "`metier simulate runs/runs.db --replicas 2 --placement placed,round-robin --programs 500`"
    )(simulate)


def simulate(
    store: Annotated[Path, typer.Argument(help="Run store whose programs and times are simulated.")],
    batch: Annotated[
        list[str] | None,
        typer.Option(help="Batch to fit, by id or label; the newest by default. Several give a broader fit."),
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Programs at a time.")] = "",
    replicas: Annotated[str, typer.Option(help="Engines, each with cores of its own.")] = "",
    slots: Annotated[str, typer.Option(help="Adapter slots of an engine.")] = "",
    placement: Annotated[
        str,
        typer.Option(
            help="Which replica gets an ask: placed (ours), placed-sample, least-loaded, round-robin, adapter-hash."
        ),
    ] = "",
    order: Annotated[str, typer.Option(help="Which ask an engine takes up first: first_come, shortest_first.")] = "",
    max_running: Annotated[str, typer.Option(help="Asks of one step.")] = "",
    kv_tokens: Annotated[str, typer.Option(help="Tokens a key-value cache holds; no bound by default.")] = "",
    programs: Annotated[int | None, typer.Option(min=1, help="How many programs; recorded ones are repeated.")] = None,
    assign: Annotated[
        list[str] | None, typer.Option(help="role=variant, or role=base: what plays it instead; may be repeated.")
    ] = None,
    foresight: Annotated[bool | None, typer.Option(help="Whether slots know which adapters come next.")] = None,
    validate: Annotated[
        list[Path] | None, typer.Option(help="Instead: predict the batches of this store and compare; may be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict how long recorded programs would take on another set-up, in seconds and without an engine.

    What is not given is as it was recorded. Numbers and names may be several, comma-separated: every combination is
    tried.
    """
    from ..simulator.command import SimulateOptions, run_simulate

    sweep: dict[str, list[Any]] = {}
    for name, text in (
        ("concurrency", concurrency), ("replicas", replicas), ("placement", placement), ("order", order),
        ("adapter_slots", slots), ("max_running", max_running), ("kv_tokens", kv_tokens),
    ):  # fmt: skip
        values = [part.strip() for part in text.split(",") if part.strip()]
        if values:
            sweep[name] = values
    if programs is not None:
        sweep["programs"] = [programs]
    if foresight is not None:
        sweep["foresight"] = [foresight]
    assigned = dict(_pair(text) for text in assign or ())
    if validate and (sweep or assigned):
        raise SettingsError(
            "--validate compares batches as they were served", expected="it without options of another set-up"
        )
    run_simulate(
        SimulateOptions(
            store=store,
            batches=tuple(batch or ()),
            sweep=sweep,
            assigned=assigned,
            against=tuple(validate or ()),
            as_json=json,
        )
    )


def _pair(text: str) -> tuple[str, str]:
    role, _, variant = text.partition("=")
    if not role or not variant:
        raise SettingsError(f"--assign {text!r} cannot be read", expected="role=variant, such as critic=base")
    return role, variant
