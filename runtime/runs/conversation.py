"""Conversations: turns of a user with a workflow or a role, each a run in the store, that end when the user says so.

A conversation is a batch: its id is the batch's, and its n-th turn is the batch's n-th run. The input of a turn's run
holds the earlier turns that it is shown, so a turn goes on like any other run, and what it was asked never depends on
settings that have changed since.
"""

from __future__ import annotations

import reprlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio
from pydantic import BaseModel, ValidationError

from ...agents.backend import OnText
from ...agents.errors import ResumeError, RunError
from ...agents.graphs.graph import TaskGraph
from ...agents.graphs.nodes import BuiltGraph, RoleWork, StepOutput
from ...agents.prompts import render_value
from ...agents.recorded_values import dump, load
from ...agents.roles import Role, type_name
from ...agents.said import read_said
from ...agents.tasksets import Task
from ...agents.turns import Turn, kept_turns, turns_field
from ..events import Event, Listeners
from ..store.records import CONVERSATION, BatchRecord, RunRecord
from ..store.store import RunStore
from .batches import recorded, recorded_input

__all__ = ["Conversation", "SpokenTurn", "find_conversation", "recorded_conversation"]


@dataclass(frozen=True)
class SpokenTurn:
    """One turn of a conversation: what was said, and the reply; None while its run is not finished."""

    number: int
    """From 1."""
    run_id: str
    said: str
    reply: Any
    state: str
    """The state of its run in the store."""


DoRun = Callable[[BuiltGraph, RunRecord, Mapping[str, Any], bool], Awaitable[Any]]
"""Does a turn's run that is recorded: with a person's answers, and whether its events carry text."""


class Conversation:
    """Turns with a workflow or a role; made by `Session.chat`.

    >>> import anyio
    >>> from metier.agents import Role, ScriptedBackend
    >>> from metier.runtime import open_session
    >>> helper = Role("helper", takes={"message": str}, gives=str, instructions="Answer the message.")
    >>> backend = ScriptedBackend({"helper": lambda ask: f"that was message {len(ask.messages) // 2}"})
    >>> async def main():
    ...     async with open_session(backend=backend, store=":memory:") as session:
    ...         async with session.chat(helper) as chat:
    ...             print(await chat.say("Hello."))
    ...             print(await chat.say("And now?"))
    ...         return [turn.said for turn in chat.turns]
    >>> anyio.run(main)
    that was message 1
    that was message 2
    ['Hello.', 'And now?']
    """

    def __init__(
        self,
        speaker: Role | TaskGraph | BuiltGraph,
        graph: BuiltGraph,
        batch: BatchRecord,
        store: RunStore,
        listeners: Listeners,
        do: DoRun,
        max_tokens: int,
        seed: int,
    ) -> None:
        self._role = speaker if isinstance(speaker, Role) else None
        self._graph = graph
        self._batch = batch
        self._store = store
        self._listeners = listeners
        self._do = do
        self._max_tokens = max_tokens
        self._seed = seed
        self._one_at_a_time = anyio.Lock()
        self._recorded = store.runs(batch.id)
        finished = [run for run in self._recorded if run.state == "finished"]
        self._earlier = self._with(finished[-1]) if finished else ()

    @property
    def id(self) -> str:
        """Names the conversation in its store: `Session.chat(…, resume=id)` goes on with it."""
        return self._batch.id

    @property
    def begun(self) -> bool:
        """Whether anything was said, so that the store has it."""
        return bool(self._recorded)

    @property
    def turns(self) -> list[SpokenTurn]:
        """Every turn from the first on, also those whose run is not finished."""
        return [self._spoken(number, run) for number, run in enumerate(self._store.runs(self.id), 1)]

    @property
    def unfinished(self) -> SpokenTurn | None:
        """The last turn, when its run is not finished: it was killed or stopped, failed, or waits for a person."""
        turns = self.turns
        return turns[-1] if turns and turns[-1].state != "finished" else None

    async def say(self, what: str | BaseModel, *, on_text: OnText | None = None) -> Any:
        """Say something, and return the reply: what the workflow or the role gives.

        Text is what the input takes as text, or JSON of it; an object is the whole input. Its field for earlier turns
        is left empty: the conversation fills it.
        `on_text` is called with the words of a reply in free text as they come. A last turn that is not finished is
        left as it is, and no later turn is shown it.
        Raises: what `Session.run` raises, also for an input with earlier turns; RunTakenError when the conversation
        has gone on in another process.
        """
        async with self._one_at_a_time:
            number = len(self._recorded) + 1
            _, text = recorded(self._graph, Task(str(number), self._input(what)))
            run = RunRecord(f"{self.id}.{number - 1}", self.id, str(number), text, self._seed)
            if self._recorded:
                self._store.add_turn(run, number - 1)
            else:
                self._store.add_batch(self._batch, [run])
            self._recorded.append(run)
            return await self._reply(run, {}, on_text)

    async def go_on(self, *, answers: Mapping[str, Any] | None = None, on_text: OnText | None = None) -> Any:
        """Finish the last turn, and return its reply. `answers` are a person's, as `Session.resume` takes them.

        Raises: ResumeError when it is finished; otherwise what `Session.resume` raises.
        """
        async with self._one_at_a_time:
            self._recorded = self._store.runs(self.id)
            if not self._recorded or self._recorded[-1].state == "finished":
                raise ResumeError(
                    f"conversation {self.id} has no turn to go on with", expected="a turn that is not finished"
                )
            return await self._reply(self._recorded[-1], answers or {}, on_text)

    # --- inside -------------------------------------------------------------------------------------------

    def _input(self, what: str | BaseModel) -> BaseModel:
        takes = self._graph.takes
        try:
            value = read_said(takes, what) if isinstance(what, str) else takes.model_validate(what)
        except ValueError as error:
            first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            fields = (f'"{n}": {type_name(f.annotation)}' for n, f in takes.model_fields.items() if n != self._turns)
            raise RunError(
                f"{reprlib.repr(what)} cannot be said to {self._graph.name!r}: {first}",
                expected=f"{{{', '.join(fields)}}}, or the text alone where that is all",
            ) from error
        if getattr(value, self._turns):
            raise RunError(
                f"what is said to {self._graph.name!r} has turns in {self._turns!r}",
                expected="none: the conversation fills this field with its own turns",
                remedy=f"Leave {self._turns!r} out.",
            )
        said: BaseModel = value.model_copy(update={self._turns: list(self._earlier)})
        return said

    @property
    def _turns(self) -> str:
        name = turns_field(self._graph.takes)
        assert name is not None  # conversation_graph has seen to it
        return name

    async def _reply(self, run: RunRecord, answers: Mapping[str, Any], on_text: OnText | None) -> Any:
        path = self._text_path() if on_text is not None else None

        def hear(event: Event) -> None:
            if event.kind == "text" and event.run_id == run.id and event.step_path == path and on_text is not None:
                on_text(event.data["text"])

        if path is not None:
            self._listeners.append(hear)
        try:
            output = await self._do(self._graph, run, answers, path is not None)
        finally:
            if path is not None:
                self._listeners.remove(hear)
        self._earlier = self._with(self._store.run(run.id))
        return output

    def _text_path(self) -> str | None:
        """The step whose text is the reply as it comes: a role that gives free text and calls nothing."""
        match self._graph.output:
            case StepOutput(hops=0, path=(name,), field=None):
                work = self._graph.body[name].work
                return name if isinstance(work, RoleWork) and work.role.gives is str and not work.role.tools else None
        return None

    def _with(self, run: RunRecord) -> tuple[Turn, ...]:
        """The turns to show after a finished one: those that it was shown, and itself."""
        value = recorded_input(self._graph, run)
        earlier: list[Turn] = getattr(value, self._turns)
        output = load(run.output or "null", self._graph.gives)
        if self._role is None:
            asked, reply = render_value(value), _as_text(output, self._graph.gives)
        else:  # word for word, so that the next prompt begins with this one and its reply
            messages, reply = self._store.replies(run.id, self._graph.body.nodes[0].name)[0]
            asked = messages[1 + len(self._role.examples) + 2 * len(earlier)].content
        return kept_turns((*earlier, Turn(asked=asked, replied=reply)), self._max_tokens)

    def _spoken(self, number: int, run: RunRecord) -> SpokenTurn:
        said = render_value(recorded_input(self._graph, run))
        reply = load(run.output or "null", self._graph.gives) if run.state == "finished" else None
        return SpokenTurn(number, run.id, said, reply, run.state)


def recorded_conversation(store: RunStore, id: str) -> BatchRecord:
    """A conversation of a store, whoever it is with. Raises: ResumeError when there is none of that id."""
    known = [batch for batch in store.batches() if CONVERSATION in batch.options]
    batch = next((batch for batch in known if batch.id == id), None)
    if batch is None:
        raise ResumeError(
            f"no conversation {id!r} in {store.path}",
            expected=f"one of {', '.join(batch.id for batch in known[-5:]) or 'none yet'}",
            remedy="Open the store that it is in: --store FILE, or open_session(store=…).",
        )
    return batch


def find_conversation(store: RunStore, graph: BuiltGraph, id: str) -> BatchRecord:
    """A conversation that was begun with this workflow or role.

    Raises: ResumeError when there is none of that id, or it was begun with another.
    """
    batch = recorded_conversation(store, id)
    if batch.fingerprint != graph.fingerprint:
        raise ResumeError(
            f"conversation {id} was begun with workflow {batch.fingerprint}, this one is {graph.fingerprint}",
            expected="the same steps, instructions and types",
            remedy="Undo the change, or begin a new conversation.",
        )
    return batch


def _as_text(output: Any, gives: Any) -> str:
    return output if isinstance(output, str) else dump(output, gives)[1]
