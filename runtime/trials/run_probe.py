"""What `metier probe` does: engines for all candidates, and the workflow under one assignment after another."""

from __future__ import annotations

import shlex
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from rich.table import Table

from ...agents.answers.answers import parse_answer
from ...agents.errors import AnswerError, AskRejectedError, ProfileError, RunError, RunInterrupted, UnknownVariantError
from ...agents.graphs.nodes import RoleWork
from ...agents.graphs.step_paths import StepPath
from ...agents.graphs.workflow_file import Verifier, WorkflowFile, load_workflow
from ...agents.tasksets import Task, TaskSet
from ...agents.tools.calls import read_calls, read_text_answer
from ...agents.whole_files import write_whole
from ...router.assignment import BASE, Assignment, load_assignment
from ...router.probing.evaluator import Evaluator, OnOutcome
from ...router.probing.journal import Journal, record_key
from ...router.probing.outcomes import Outcome
from ...router.probing.probe import ProbeResult, probe
from ...router.probing.profile import Footprint, Profile, write_profiles
from ...router.route import Router
from ...router.solving.engine_work import EngineWork
from ...router.space import Candidate, Space, role_rounds, space_of
from ...specializers.machine.machine import Machine
from ...specializers.shelf.shelf import Shelf
from ..backends import SCRIPTED, BackendRequest, OpenBackend, open_backend
from ..console import StepBar, say, show
from ..events import STARTUP, Event, in_words
from ..output_files import writing
from ..runs.run_plan import RunResult
from ..runs.session import Session
from ..settings.session import Settings
from ..store.store import RunStore
from .footprints import footprints, footprints_elsewhere
from .machines import measured_on, note_machine
from .probe_options import OPTIONS, ProbeOptions
from .replayed_backend import RecordedReply, ReplayedBackend
from .replayed_calls import RecordedCall, ReplayedCalls
from .work_meter import WorkMeter

__all__ = ["SessionRunner", "Trials", "open_trials", "run_probe"]

PROFILES, RUNS, REPLIES, CALLS = "profiles.jsonl", "runs.jsonl", "replies.jsonl", "calls.jsonl"
WORK = "engine_work.jsonl"


@dataclass(frozen=True)
class Trials:
    """What is needed to run a workflow under any assignment of the candidates, and to measure what the runs cost."""

    file: WorkflowFile
    space: Space
    backend: ReplayedBackend
    tools: ReplayedCalls
    settings: Settings
    options: ProbeOptions
    variants: Mapping[str, str]
    footprints: Mapping[str, Footprint]
    runs: Journal[Outcome]
    meter: WorkMeter
    machine: Machine

    def evaluator(self, tasks: TaskSet, on_outcome: OnOutcome | None = None) -> Evaluator:
        """Scores assignments on tasks."""
        return Evaluator(
            self.space,
            {task.id: record_key(task=task.input.model_dump(mode="json"), id=task.id) for task in tasks},
            SessionRunner(self, tasks),
            self.runs,
            identity=record_key(workflow=self.file.graph.fingerprint, seed=self.options.seed, **_serving(self)),
            variants=self.variants,
            on_outcome=on_outcome,
        )


class SessionRunner:
    """Runs tasks under an assignment in a session of their own, on the trials' backend: a `RunTasks`."""

    def __init__(self, trials: Trials, tasks: TaskSet) -> None:
        self._trials = trials
        self._tasks = tasks
        self._by_id = {task.id: task for task in tasks}
        self._verifiers = trials.file.verifiers()

    async def __call__(self, assignment: Assignment, tasks: Sequence[str], on_outcome: OnOutcome) -> None:
        """See `RunTasks`. Raises what keeps runs from being made at all (engines, adapters), rather than score it 0."""
        trials = self._trials
        chosen = [self._by_id[task] for task in tasks]
        subset = TaskSet(self._tasks.name, self._tasks.split, tuple(chosen), self._tasks.scorer, self._tasks.seeds)
        with RunStore(":memory:") as store:
            session = Session(trials.backend, Router(assignment), store, trials.settings, tools=trials.tools)
            results = await session.map(
                trials.file.graph, subset, concurrency=trials.options.concurrency, seed=trials.options.seed
            )
        trials.meter.note()
        for task, result in zip(chosen, results, strict=True):
            on_outcome(self._outcome(task, result))

    def _outcome(self, task: Task, result: RunResult) -> Outcome:
        error = result.error
        if isinstance(error, RunInterrupted):
            raise ProfileError(
                f"the workflow waits for a person at task {task.id!r}", expected="a workflow that runs by itself"
            )
        if error is not None and not isinstance(error, RunError | AskRejectedError):
            raise error
        record = self._trials.backend.take(result.run_id)
        return Outcome(
            key="",
            task=task.id,
            score=result.score or 0.0,
            asks=tuple(record.asks),
            role_scores={
                role: self._verified(role, verifier, task, record.answers[role])
                for role, verifier in self._verifiers.items()
                if role in record.answers
            },
            error="" if error is None else str(error),
        )

    def _verified(self, role: str, verifier: Verifier, task: Task, answers: Sequence[tuple[str, str]]) -> float:
        total, counted = 0.0, 0
        for path, text in answers:
            work = self._trials.file.graph.step_at(StepPath.parse(path)).work
            assert isinstance(work, RoleWork)  # nothing else is asked
            if work.role.tools:
                if read_calls(text) is not None:
                    continue  # no answer yet
                text = read_text_answer(text) if work.role.gives is str else text
            counted += 1
            try:
                total += float(verifier(task, parse_answer(text, work.role.gives)))
            except AnswerError:
                continue  # a run without an answer scores 0
            except Exception as error:
                raise ProfileError(
                    f"the verifier of role {role!r} raised {type(error).__name__}: {error}",
                    expected="a number from 0 to 1 for any answer",
                ) from error
        return total / max(counted, 1)


@asynccontextmanager
async def open_trials(options: ProbeOptions, folder: Path) -> AsyncGenerator[Trials]:
    """Open engines and journals for a workflow and its candidates; all of it is closed at the end.

    Raises: GraphError, AssignmentError, UnknownVariantError, BaseModelError, ProfileError.
    """
    file, settings = load_workflow(options.workflow), options.load_settings()
    space = _space(file, options)
    names = sorted({c.variant for part in space.parts for c in space.candidates[part]} - {BASE})
    with (
        Journal(folder / RUNS, Outcome) as runs,
        Journal(folder / REPLIES, RecordedReply) as replies,
        Journal(folder / CALLS, RecordedCall) as calls,
        Journal(folder / WORK, EngineWork) as work,
    ):
        shelf = Shelf(settings.shelf, also=[Path(place) for place in options.shelf])
        everyone = (None, *names)
        request = BackendRequest(
            shelf, settings, options.base, names=everyone, ready=everyone, scripted=file.scripted, on_event=_tell
        )
        async with open_backend(options.engine, request) as opened, ReplayedCalls(settings.tools, calls) as tools:
            if opened.start is not None:
                await opened.start()  # all engines, before the first run is measured
            variants, needs = _candidates_on(opened, shelf, names)
            settings = settings.model_copy(update={"engine": opened.settings})
            replayed = ReplayedBackend(
                opened.backend,
                replies,
                identity=record_key(base=variants.get(BASE, BASE), engine=options.engine == SCRIPTED),
                variants=variants,
                block_tokens=settings.engine.block_tokens,
            )
            machine = measured_on(options.engine, opened)
            note_machine(folder, machine, (runs, replies, work), mix=options.mix_machines, on_note=say)
            meter = WorkMeter(opened.checkpoint_totals, work)
            yield Trials(file, space, replayed, tools, settings, options, variants, needs, runs, meter, machine)


async def run_probe(options: ProbeOptions, folder: Path) -> None:
    """Probe a workflow and print the profiles; see `metier probe --help`."""
    incumbent = None if options.incumbent is None else load_assignment(options.incumbent)
    with Journal(folder / PROFILES, Profile) as profiles:
        new = not len(
            profiles
        )  # what this ends with is added to it: that it can be is known before anything is measured
    if new:
        (folder / PROFILES).unlink()  # a probe that does not end leaves none
    async with open_trials(options, folder) as trials:
        tasks = trials.file.tasks(options.tasks)
        with writing(folder / OPTIONS):
            write_whole(folder / OPTIONS, options.model_dump_json(indent=2) + "\n")
        arms = 1 + sum(len(trials.space.candidates[part]) - 1 for part in trials.space.parts)
        with StepBar(f"probing {trials.file.graph.name}", "runs at most") as bar:
            evaluator = trials.evaluator(tasks, _Counts(bar, arms * len(tasks)).on_outcome)
            try:
                result = await probe(
                    evaluator,
                    None if incumbent is None else trials.space.read(incumbent),
                    options.probe,
                    workflow=trials.file.graph.fingerprint,
                    footprints=trials.footprints,
                    variants=trials.variants,
                    machine=trials.machine,
                    engine_costs=trials.meter.costs,
                    on_note=say,
                )
            except anyio.get_cancelled_exc_class():
                say(f"stopped: {len(trials.runs)} runs are kept in {folder}; the same command goes on with them")
                raise
        write_profiles(folder / PROFILES, result.profiles)
    _show(result, evaluator, folder)


def _space(file: WorkflowFile, options: ProbeOptions) -> Space:
    """The candidates named, and those that the incumbent has at its parts."""
    space = space_of(file.graph, [Candidate.read(name) for name in options.variants], split_rounds=options.split_rounds)
    if options.incumbent is None:
        return space
    assignment = load_assignment(options.incumbent)
    assignment.check_roles(role_rounds(file.graph))
    own = space.read(assignment)
    more = {part: tuple(dict.fromkeys((*space.candidates[part], own[part]))) for part in space.parts}
    return Space(space.parts, more, space.rounds)


def _candidates_on(
    opened: OpenBackend, shelf: Shelf, names: Sequence[str]
) -> tuple[dict[str, str], dict[str, Footprint]]:
    """Content ids and footprints of base and candidates, by name; a fake has neither."""
    if opened.model == SCRIPTED:
        return {}, {}
    wanted = {}
    for name in names:
        with suppress(UnknownVariantError):  # a server may serve what lies on no shelf of ours
            wanted[name] = shelf.get(name)
    ids = {
        BASE: opened.model,
        **{name: wanted[name].id if name in wanted else f"{name} at {opened.model}" for name in names},
    }
    if opened.base_folder is None:
        return ids, footprints_elsewhere(names, wanted)
    base = opened.base_folder

    def checkpoint(id: str) -> Path:
        return base if id == BASE else shelf.path(id) / "weights"

    return ids, footprints(wanted, checkpoint, opened.settings)


def _tell(event: Event) -> None:
    """Show what the probe waits for."""
    if event.kind in STARTUP:
        say(in_words(event))


def _serving(trials: Trials) -> dict[str, Any]:
    engine = trials.settings.engine
    return {
        "dtype": engine.dtype,
        "base": trials.variants.get(BASE, BASE),
        "scripted": trials.options.engine == SCRIPTED,
    }


class _Counts:
    """The results of a probe's runs so far, beside its progress bar."""

    def __init__(self, bar: StepBar, total: int) -> None:
        self._bar, self._total = bar, total
        self._runs = self._reused = self._asks = self._solved = 0

    def on_outcome(self, outcome: Outcome) -> None:
        """Take note of one run."""
        self._runs += 1
        self._solved += outcome.score >= 1.0
        self._asks += len(outcome.asks)
        self._reused += sum(ask.reused for ask in outcome.asks)
        reused = f"{self._reused} of {self._asks} asks reused"
        self._bar.show(self._runs, self._total, f"{self._solved} solved", reused)


def _show(result: ProbeResult, evaluator: Evaluator, folder: Path) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    heads = ("part", "variant", "n", "quality", "95 %", "gain", "role", "CPU-s", "s", "prompt", "cached", "written", "")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in result.profiles:
        table.add_row(str(row.part), str(row.candidate), *_cells(row, result))
    show(table)
    counts = evaluator.counts
    say(
        f"{counts.runs} runs made ({counts.asks} asks, {counts.asks_reused} reused from other runs, "
        f"{counts.cpu_s:.1f} CPU-s), {counts.recalled} known from before, {result.saved_runs} saved by dropping early. "
        f"Profiles: {folder / PROFILES}. Next: metier assign --probe {shlex.quote(str(folder))}"
    )


def _cells(row: Profile, result: ProbeResult) -> list[str]:
    low, high = row.quality_interval
    incumbent = result.incumbent[row.part] == row.candidate
    return [
        str(row.n),
        f"{row.quality:.3f}",
        f"{low:.2f}-{high:.2f}",
        "incumbent" if incumbent else f"{row.gain:+.3f}",
        "–" if row.role_quality is None else f"{row.role_quality:.3f}",
        f"{row.cpu_s:.3f}",
        f"{row.seconds:.2f}",
        f"{row.prompt_tokens:.0f}",
        f"{row.cached_tokens:.0f}",
        f"{row.thinking_used + row.answer_tokens:.0f}",
        row.dropped,
    ]
