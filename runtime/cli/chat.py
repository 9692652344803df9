"""`metier chat`: talk with a workflow, a role or the base in the terminal, or line by line from a pipe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer

from ...agents.errors import GraphError, MetierError, ResumeError, RunError, RunInterrupted, SettingsError
from ...agents.graphs.conversation_graph import conversation_graph
from ...agents.graphs.nodes import BuiltGraph
from ...agents.graphs.workflow_file import WorkflowFile, load_workflow
from ...agents.recorded_values import as_json
from ...agents.roles import Role
from ...router.assignment import Assignment, load_assignment
from ...specializers.shelf.bundled_model import DEFAULT_BASE
from ..backends import DEFAULT_ENGINE, check_engine
from ..console import ERR, say
from ..events import STARTUP, in_words
from ..opening import open_session
from ..runs.conversation import Conversation, find_conversation, recorded_conversation
from ..settings.session import load_settings
from ..store.commands import command
from ..store.records import CONVERSATION, WITH_BASE
from ..store.store import RunStore
from .ending import when_stopped
from .options import (
    DEFAULT_STORE,
    AssignmentFile,
    Base,
    MaxSeconds,
    MaxTokens,
    OtherEngine,
    Seed,
    Sets,
    SettingsFile,
    Shelf,
    Store,
    absolute,
    checked,
    open_store,
    overrides,
)
from .resume import on_engine
from .run import RunOptions

__all__ = ["add_chat_command"]

EXAMPLE = (
    "Example: `metier chat`, `metier chat examples/helpdesk.py --engine scripted`, or `metier chat "
    "examples/solve_and_check.py --role planner --assignment examples/assignment.yaml --shelf examples/variants`"
)

LINE_BYTES = 1 << 20
"""Longest line that is read, in bytes."""

TURNS_SHOWN = 3
"""Last turns that are shown again when a conversation goes on."""

assistant = Role("assistant", takes={"message": str}, gives=str, instructions="Answer the message.")
"""Who answers where no file is named."""


def add_chat_command(app: typer.Typer) -> None:
    """Add `chat` to the command line."""
    app.command(epilog=EXAMPLE)(chat)


def chat(
    workflow: Annotated[
        str | None, typer.Argument(help="file.py, or file.py:name of its TaskGraph; the base itself by default.")
    ] = None,
    role: Annotated[str | None, typer.Option(help="Talk with this role of the workflow.")] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with the conversation of this id, as it was begun.")] = None,
    assignment: AssignmentFile = None,
    base: Base = DEFAULT_BASE,
    shelf: Shelf = None,
    engine: OtherEngine = None,
    max_tokens: MaxTokens = None,
    max_seconds: MaxSeconds = None,
    seed: Seed = 0,
    store: Store = DEFAULT_STORE,
    settings: SettingsFile = None,
    set: Sets = None,
) -> None:
    """Talk with a workflow, one of its roles, or the base: a line is a turn, and Ctrl-D ends the conversation.

    Each turn is a run of the store, so the conversation goes on later with --resume. A workflow has to take earlier
    turns: a field of type list[Turn] in its input. Limits are those of one turn.
    """
    options = checked(
        RunOptions,
        workflow="" if workflow is None else absolute(workflow),
        assignment=None
        if assignment is None
        else load_assignment(assignment).model_dump(mode="json", exclude_defaults=True),
        base=base,
        shelf=[str(folder) for folder in shelf or ()],
        engine=check_engine(engine or DEFAULT_ENGINE),
        max_tokens=max_tokens,
        max_seconds=max_seconds,
        seed=seed,
        settings=None if settings is None else str(settings),
        overrides=overrides(set),
    )
    if resume is not None:
        if workflow is not None or role is not None:
            raise SettingsError(
                "a workflow or a role beside --resume",
                expected="the id alone: the store knows whom the conversation is with",
            )
        options, role = _begun_with(store, resume, engine)
    file = load_workflow(options.workflow) if options.workflow else None
    speaker = _speaker(file, role)
    failed = anyio.run(_talk, options, file, speaker, resume, store)
    if failed:
        raise typer.Exit(1)


def _begun_with(store: Path, id: str, engine: str | None) -> tuple[RunOptions, str | None]:
    """The options that a conversation was begun with, on another `engine` if one is named; and its role."""
    with open_store(store) as runs:
        batch = recorded_conversation(runs, id)
    options = RunOptions.model_validate(batch.options)
    if not options.workflow and WITH_BASE not in batch.options:
        raise ResumeError(
            f"conversation {id} was begun from Python, and the file of whom it is with is not known",
            expected="one that `metier chat` began, or one with a workflow of a file",
            remedy=f"Go on with it from Python: session.chat(…, resume={id!r}).",
        )
    if engine is not None:
        options = options.model_copy(update={"engine": engine})
    elif options.workflow:
        options = on_engine(options, load_workflow(options.workflow), named=False)
    return options, (batch.options[CONVERSATION] or None) if options.workflow else None


def _speaker(file: WorkflowFile | None, role: str | None) -> Role | BuiltGraph:
    if file is None:
        if role is not None:
            raise SettingsError(f"--role {role} without a workflow", expected="the file that has the role before it")
        return assistant
    if role is None:
        return file.graph
    roles = file.graph.roles()
    if role not in roles:
        raise GraphError(f"graph {file.graph.name!r} has no role {role!r}", expected=f"one of {', '.join(roles)}")
    return roles[role]


async def _talk(
    options: RunOptions, file: WorkflowFile | None, speaker: Role | BuiltGraph, resume: str | None, store: Path
) -> bool:
    """Turn after turn until the input ends; whether one of them failed."""
    given = options.assignment
    assignment = Assignment.model_validate(given) if isinstance(given, dict) else None
    if assignment is not None:
        assignment.check_roles({speaker.name} if isinstance(speaker, Role) else speaker.roles())
    settings = load_settings(Path(options.settings) if options.settings else None, options.overrides)
    graph = conversation_graph(speaker)
    with RunStore(store) as runs:
        if resume is not None:
            find_conversation(runs, graph, resume)  # before an engine takes its time to start
        async with (
            open_session(
                base=options.base,
                assignment=assignment,
                engine=options.engine,
                shelf=options.shelf,
                store=runs,
                settings=settings,
                on_event=lambda event: say(in_words(event)) if event.kind in STARTUP else None,
                scripted=None if file is None else file.scripted,
            ) as session,
            session.chat(
                speaker,
                resume=resume,
                seed=options.seed,
                limits=options.limits(),
                options=options.model_dump(mode="json") | ({WITH_BASE: True} if file is None else {}),
            ) as talk,
        ):
            when_stopped(lambda: _how_to_go_on(talk, runs))
            failed = await _turns(talk)
            if talk.begun:
                say(_how_to_go_on(talk, runs))
    return failed


def _how_to_go_on(talk: Conversation, store: RunStore) -> str:
    """Read also when everything is closed."""
    if not talk.begun:
        return "Nothing was said."
    return f"This conversation goes on with: {command('chat', '--resume', talk.id, store=store.path)}"


async def _turns(talk: Conversation) -> bool:
    failed, questions = False, dict[str, str]()
    unfinished = talk.unfinished
    for turn in talk.turns[-TURNS_SHOWN:]:
        say(f"> {turn.said}\n{'' if turn.reply is None else _as_text(turn.reply)}".rstrip(), style="dim")
    async with aclosing(_lines()) as lines:
        if unfinished is not None:
            failed, questions = await _turn(partial(talk.go_on))
        _prompt()
        async for line in lines:
            if isinstance(line, RunError):
                failed_now = True
                _say_error(line)
            elif questions:
                path = next(iter(questions))
                failed_now, questions = await _turn(partial(talk.go_on, answers={path: _data(line)}), questions)
            else:
                failed_now, questions = await _turn(partial(talk.say, line))
            failed |= failed_now
            _prompt()
    return failed


async def _turn(reply: Any, asked: dict[str, str] | None = None) -> tuple[bool, dict[str, str]]:
    """One turn: its words as they come, or the whole reply. Returns whether it failed, and a person's questions."""
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        text = _as_text(await reply(on_text=write))
    except RunInterrupted as waits:
        if written:
            write("\n")
        for question in waits.questions.values():
            say(question, style="yellow")
        return False, dict(waits.questions)
    except MetierError as error:  # an engine's too: the turn is kept, and the pool starts a dead engine again
        if written:
            write("\n")
        _say_error(error)
        return True, asked or {}
    if "".join(written).strip() != text.strip():  # asked again, or nothing that comes word by word
        written = []
        write(text)
    write("\n")
    return False, {}


def _say_error(error: MetierError) -> None:
    say(f"{type(error).__name__}: {error}", style="red")


def _as_text(reply: Any) -> str:
    return reply if isinstance(reply, str) else as_json(reply)


def _data(line: str) -> Any:
    """A person's answer: JSON, or text."""
    try:
        return json.loads(line)
    except ValueError:
        return line


def _prompt() -> None:
    if sys.stdin.isatty():
        ERR.print("> ", end="")


async def _lines() -> AsyncGenerator[str | RunError]:
    """The lines of stdin that are not blank, as they come, until its end; an error in place of one that is too long.

    Read without a thread: one that waits for a line would keep the process from ending at Ctrl-C.
    """
    rest, dropped_bytes = b"", 0  # of the line that is not read to its end
    while True:
        try:
            await anyio.wait_readable(sys.stdin.fileno())
        except (OSError, ValueError):  # a file, which can always be read
            await anyio.lowlevel.checkpoint()
        piece = os.read(sys.stdin.fileno(), LINE_BYTES)
        *lines, rest = (rest + (piece or b"\n")).split(b"\n")
        for line in lines:
            length, dropped_bytes = dropped_bytes + len(line), 0
            if length > LINE_BYTES:
                yield RunError(f"a line of {length} bytes", expected=f"at most {LINE_BYTES} bytes; it was not said")
            elif text := line.decode("utf-8", "replace").strip():
                yield text
        if not piece:
            return
        if dropped_bytes or len(rest) > LINE_BYTES:
            dropped_bytes, rest = dropped_bytes + len(rest), b""
