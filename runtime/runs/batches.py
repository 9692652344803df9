"""Batches of runs: how they start, whether a run may be resumed, and a person's answers."""

from __future__ import annotations

import json
import reprlib
import time
import uuid
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ...agents.answers.answers import parse_answer
from ...agents.errors import AnswerError, ResumeError, RunError, RunInterrupted
from ...agents.graphs.graph import TaskGraph
from ...agents.graphs.nodes import BuiltGraph
from ...agents.graphs.pictures import to_mermaid
from ...agents.graphs.step_paths import StepPath
from ...agents.graphs.workflow_shape import workflow_shape
from ...agents.recorded_values import as_json, dump, load
from ...agents.tasksets import Task
from ...agents.text_files import shown
from ...agents.tools.calls import CallAnswer
from ..meters.stamps import stamp_s
from ..store.commands import command
from ..store.records import CONVERSATION, WITH_BASE, BatchRecord, RunRecord
from ..store.store import RunStore

__all__ = [
    "built_graph",
    "check_resumable",
    "goes_on_with",
    "how_to_answer",
    "new_batch",
    "once_mended",
    "recorded",
    "recorded_input",
    "take_answers",
    "waiting_for_person",
]

EXPECTED_CHARACTERS = 10_000
"""Characters of what a task's scorer judges by that are kept to be shown."""


def built_graph(graph: TaskGraph | BuiltGraph) -> BuiltGraph:
    """The workflow, built if it was not. Raises: GraphError."""
    return graph.build() if isinstance(graph, TaskGraph) else graph


def new_batch(
    built: BuiltGraph, tasks: list[Task], seed: int, label: str, options: dict[str, Any]
) -> tuple[BatchRecord, list[RunRecord], list[BaseModel]]:
    """Records of a batch that is about to start, and its inputs as a resume would read them.

    Raises: RunError for an input of the wrong type, or one that cannot be recorded.
    """
    inputs = [recorded(built, task) for task in tasks]
    batch = f"{built.name}-{time.strftime('%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    runs = [
        RunRecord(f"{batch}.{index}", batch, task.id, text, seed, expected=_expected(task.key))
        for index, (task, (_, text)) in enumerate(zip(tasks, inputs, strict=True))
    ]
    record = BatchRecord(
        batch,
        label or built.name,
        built.name,
        built.fingerprint,
        to_mermaid(built),
        options,
        stamp_s(),
        workflow_shape(built).model_dump_json(exclude_defaults=True),
    )
    return record, runs, [value for value, _ in inputs]


def _expected(key: Any) -> str | None:
    """A task's key as text, for people who look at what was solved and what was not."""
    if key is None:
        return None
    try:
        text = as_json(key)
    except ValueError:  # no JSON, or text that is none
        text = reprlib.repr(key).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= EXPECTED_CHARACTERS else f"{text[:EXPECTED_CHARACTERS]}…"


def recorded(built: BuiltGraph, task: Task) -> tuple[BaseModel, str]:
    """An input as a resume would read it, and as JSON.

    Raises: RunError when it is of the wrong type, or cannot be recorded.
    """
    if not isinstance(task.input, built.takes):
        raise RunError(
            f"input {task.input!r} is no {built.takes.__name__}", expected=f"what graph {built.name!r} takes"
        )
    try:
        return dump(task.input, built.takes)
    except Exception as error:
        raise RunError(
            f"the input {reprlib.repr(task.input)} of task {task.id!r} cannot be recorded: {error}",
            expected="an input that a resumed run reads back as it was",
            remedy="Mend the input, or the types of its fields.",
        ) from error


def recorded_input(built: BuiltGraph, run: RunRecord) -> BaseModel:
    """The input that a run was started with; raises ResumeError when it is no longer what the workflow takes."""
    try:
        value: BaseModel = load(run.input, built.takes)
    except ValidationError as error:
        raise ResumeError(
            f"the recorded input of run {run.id} is no {built.takes.__name__}: {error}",
            expected="what the workflow took when the run was started",
            remedy="Start a new run.",
        ) from error
    return value


def check_resumable(store: RunStore, built: BuiltGraph, run: RunRecord) -> None:
    """Raise ResumeError when a run is finished, or was started by another workflow than this one."""
    if run.state == "finished":
        raise ResumeError(f"run {run.id} is finished", expected="a run that is not", remedy="Start a new run.")
    fingerprint = store.batch(run.batch).fingerprint
    if fingerprint not in (built.fingerprint, built.fingerprint_before_0_2):
        raise ResumeError(
            f"run {run.id} was started with workflow {fingerprint}, this one is {built.fingerprint}",
            expected="the same steps, instructions and types",
            remedy="Undo the change to the workflow, or start a new run.",
        )


def take_answers(store: RunStore, built: BuiltGraph, run_id: str, answers: Mapping[str, Any]) -> RunRecord:
    """Check that a run can be resumed, and keep a person's answers for when it is; returns the run.

    Raises: ResumeError when it is finished or another workflow's, nothing waits at a path, or an answer does not fit;
    RunTakenError while another process is at it.
    """
    with store.claim(run_id):
        run = store.run(run_id)
        check_resumable(store, built, run)
        _keep_answers(store, built, run, answers)
    return run


def _keep_answers(store: RunStore, built: BuiltGraph, run: RunRecord, answers: Mapping[str, Any]) -> None:
    """Keep a person's answers, by step path, for when the run goes on: all of them or none.

    Raises: ResumeError when nothing waits at a path, or an answer is not of the type that was asked for there.
    """
    asked = store.questions(run.id)
    texts: dict[str, str] = {}
    for path, answer in answers.items():
        if path not in asked:
            raise ResumeError(
                f"run {run.id} has no question at {path!r}", expected=f"one of {', '.join(asked) or 'none'}"
            )
        if asked[path][1] is not None:
            raise ResumeError(
                f"the question at {path!r} of run {run.id} is answered already: {shown(asked[path][1])}",
                expected="a question that waits",
                remedy="Go on with the run without an answer, or start a new run.",
            )
        at = StepPath.parse(path)
        # Only calls of tools are numbered at their last level: a loop asks nobody itself.
        gives = built.step_at(at).gives if at.steps[-1].round is None else CallAnswer
        texts[path] = _answer_text(answer, gives, path)
    for path, text in texts.items():
        store.answer_question(run.id, path, text)


def _answer_text(answer: Any, gives: Any, path: str) -> str:
    """A person's answer as it is recorded."""
    try:
        if isinstance(answer, BaseModel) and isinstance(gives, type) and isinstance(answer, gives):
            return dump(answer, gives)[1]
        text = answer.model_dump_json() if isinstance(answer, BaseModel) else json.dumps(answer)
        answer = parse_answer(text, gives)
        return text if gives is str else dump(answer, gives)[1]
    except AnswerError as error:
        raise ResumeError(
            f"the answer {text} does not fit the question at {path!r}: {error.problem}", expected=error.expected
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ResumeError(
            f"the answer {reprlib.repr(answer)} to the question at {path!r} cannot be recorded: {error}",
            expected="JSON data, or an object of the type that is asked for",
        ) from error


def waiting_for_person(store: RunStore, run_id: str) -> RunInterrupted:
    """The interrupt to raise for a run that waits, with its open questions."""
    waiting = {path: q for path, (q, answer) in store.questions(run_id).items() if answer is None}
    told = "; ".join(f"{path}: {question}" for path, question in waiting.items())
    return RunInterrupted(
        f"run {run_id} waits for a person. {told}",
        remedy=f"Answer with: {how_to_answer(store, run_id, next(iter(waiting)))}",
        questions=waiting,
        run_id=run_id,
    )


def how_to_answer(store: RunStore, run_id: str, path: str) -> str:
    """How a person answers the question at `path` of a run: a command, or Python where no command can go on with it."""
    batch = store.batch(store.run(run_id).batch)
    known = _known_to_commands(store, batch)
    if CONVERSATION in batch.options:
        talk = goes_on_with(store, batch)
        return talk if known else f"{talk}, then chat.go_on(answers={{{path!r}: …}})"
    if known:
        return command("resume", run_id, "--answer", "{…}", "--at", path, store=store.path)
    return f"session.resume(graph, {run_id!r}, answers={{{path!r}: …}})"


def goes_on_with(store: RunStore, conversation: BatchRecord) -> str:
    """What goes on with a conversation: a command, or Python where no command knows whom it is with."""
    if _known_to_commands(store, conversation):
        return command("chat", "--resume", conversation.id, store=store.path)
    return f"session.chat(…, resume={conversation.id!r})"


def once_mended(store: RunStore, run_id: str) -> str:
    """What to do about a run that met an exception: look at the cause, and how to go on then."""
    batch = store.batch(store.run(run_id).batch)
    known = _known_to_commands(store, batch)
    if CONVERSATION in batch.options:
        how = goes_on_with(store, batch)
    else:
        how = command("resume", run_id, store=store.path) if known else f"session.resume(graph, {run_id!r})"
    if not known:
        return f"Look at the cause; {how} then goes on from here."
    return f"Look at the cause; this then goes on from here: {how}"


def _known_to_commands(store: RunStore, batch: BatchRecord) -> bool:
    """Whether the command line can go on with a batch: its store is a file, and it knows the file of the workflow."""
    known = batch.options.get("workflow") or batch.options.get(WITH_BASE)
    return store.path != ":memory:" and bool(known)
