"""The verbs of the command line that measure variants and assign them to roles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import anyio
import typer

from ...agents.errors import SettingsError
from ...router.probing.probe import ProbeSettings
from ...router.solving.assigned import AssignSettings, Goal
from ...router.solving.limits import Limits
from ...specializers.shelf.bundled_model import DEFAULT_BASE
from ..backends import DEFAULT_ENGINE
from ..output_files import can_be_written, can_hold_files
from .ending import SAME_COMMAND, when_stopped
from .options import (
    Base,
    Concurrency,
    Engine,
    Seed,
    Sets,
    SettingsFile,
    Shelf,
    Tasks,
    Workflow,
    absolute,
    checked,
    comma_separated,
    names_option,
    overrides,
)

__all__ = ["add_router_commands"]

DEFAULT_FOLDER = Path("runs/probe")
MixMachines = Annotated[
    bool, typer.Option("--mix-machines", help="Use what other machines measured as if it had been measured here.")
]


def add_router_commands(app: typer.Typer) -> None:
    """Add `probe` and `assign` to the command line."""
    app.command(
        epilog="Example: `metier probe examples/solve_and_check.py --tasks tune:48 --shelf examples/variants "
        "--variants base,planner,solver,critic --incumbent examples/assignment.yaml`"
    )(probe)
    app.command(epilog="Example: `metier assign --probe runs/probe --quality-loss 0.02 --out assignment.yaml`")(assign)


def probe(
    workflow: Workflow,
    tasks: Tasks,
    variants: Annotated[
        list[str], names_option("Candidates for every role; NAME@TOKENS thinks no longer than so many tokens.")
    ],
    incumbent: Annotated[
        Path | None,
        typer.Option(
            help="Assignment (YAML) in which one role at a time is replaced; else one is found.", resolve_path=True
        ),
    ] = None,
    split_rounds: Annotated[bool, typer.Option(help="Tell a loop's first round from later ones.")] = True,
    base: Base = DEFAULT_BASE,
    shelf: Shelf = None,
    engine: Engine = DEFAULT_ENGINE,
    concurrency: Concurrency = None,
    batch: Annotated[int, typer.Option(help="Tasks between two looks at which candidates are clearly worse.")] = 8,
    margin: Annotated[float, typer.Option(help="Drop a candidate that is worse by more than this, surely.")] = 0.05,
    seed: Seed = 0,
    mix_machines: MixMachines = False,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of profiles and of what was run.", callback=can_hold_files)
    ] = DEFAULT_FOLDER,
    settings: SettingsFile = None,
    set: Sets = None,
) -> None:
    """Measure every candidate at every role by running the workflow with only that role replaced.

    Stopped or killed, the same command goes on where it was: no run and no ask is made twice. On a machine that does
    other work too, add --set engine.threads=1: threads that spin for each other cost CPU-seconds that are not ours.
    """
    from ..trials.probe_options import ProbeOptions
    from ..trials.run_probe import run_probe

    candidates = comma_separated(variants)
    if not candidates:
        raise SettingsError("no --variants", expected="names on the shelf, such as --variants base,solver,critic")
    options = checked(
        ProbeOptions,
        workflow=absolute(workflow),
        tasks=tasks,
        variants=candidates,
        incumbent=None if incumbent is None else str(incumbent),
        split_rounds=split_rounds,
        base=base,
        shelf=tuple(str(place) for place in shelf or ()),
        engine=engine,
        concurrency=concurrency,
        seed=seed,
        settings=None if settings is None else str(settings),
        overrides=overrides(set),
        mix_machines=mix_machines,
        probe=checked(ProbeSettings, options={"batch_tasks": "--batch"}, batch_tasks=batch, margin=margin),
    )
    anyio.run(run_probe, options, folder)


def assign(
    folder: Annotated[Path, typer.Option("--probe", help="Folder of `metier probe`.")] = DEFAULT_FOLDER,
    out: Annotated[Path, typer.Option(help="Where the assignment goes.", callback=can_be_written)] = Path(
        "assignment.yaml"
    ),
    minimise: Annotated[Goal, typer.Option(help="What is made as small as the limits let it be.")] = "cpu_s",
    quality_loss: Annotated[float, typer.Option(help="How far below the incumbent the score may be.")] = 0.02,
    min_quality: Annotated[float | None, typer.Option(help="Lowest score, instead of a loss.")] = None,
    max_cpu_s: Annotated[float | None, typer.Option(help="CPU-seconds a task.")] = None,
    max_latency_s: Annotated[float | None, typer.Option(help="Seconds a task, one ask after the other.")] = None,
    max_tokens: Annotated[float | None, typer.Option(help="Prompt and generated tokens a task.")] = None,
    max_memory_mib: Annotated[float | None, typer.Option(help="Checkpoints, caches and slots of all engines.")] = None,
    check: Annotated[
        str | None,
        typer.Option(help="split:size[:seed] of held-out tasks; by default the probe's, with the next seed."),
    ] = None,
    checks: Annotated[int, typer.Option(help="How many assignments to try before giving up.")] = 8,
    variants: Annotated[list[str] | None, names_option("Only these candidates.")] = None,
    measure_baselines: Annotated[bool, typer.Option(help="Run the baselines on the held-out tasks too.")] = False,
    mix_machines: MixMachines = False,
    rescale: Annotated[
        bool, typer.Option("--rescale", help="Scale another machine's costs by a few of its runs, made again here.")
    ] = False,
    set: Sets = None,
) -> None:
    """Choose a variant for every role within limits, check it on held-out tasks, write the assignment with reasons."""
    from ..trials.run_assign import run_assign

    settings = checked(
        AssignSettings,
        minimise=minimise,
        limits=checked(
            Limits,
            options={
                name: f"--max-{name.replace('_', '-')}" for name in ("cpu_s", "latency_s", "tokens", "memory_mib")
            },
            min_quality=min_quality,
            cpu_s=max_cpu_s,
            latency_s=max_latency_s,
            tokens=max_tokens,
            memory_mib=max_memory_mib,
        ),
        quality_loss=quality_loss,
        checks=checks,
        measure_baselines=measure_baselines,
    )

    async def run() -> None:
        await run_assign(
            folder,
            settings,
            out=out,
            check=check,
            candidates=comma_separated(variants),
            overrides=overrides(set),
            mix_machines=mix_machines,
            rescale=rescale,
        )

    when_stopped(lambda: SAME_COMMAND)
    anyio.run(run)
