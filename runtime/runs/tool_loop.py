"""A step of a role with tools: ask, make the calls of the reply, tell their results, until the reply is the answer.

The reply is recorded before its calls are made, and each call as a step of its own, `solver/tool[2]`, counted over the
whole step. So a run that was killed goes on at the calls it was at and repeats none that is recorded. Messages are only
appended to, so that each ask's prompt begins with the whole last one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import anyio

from ...agents.answers.answer_schema import answer_schema
from ...agents.answers.answer_shape import answer_shape
from ...agents.answers.held_schema import served_schema
from ...agents.content_hash import content_hash
from ...agents.errors import ResumeError
from ...agents.graphs.step_paths import PathStep, StepPath
from ...agents.messages import Message
from ...agents.prompts import render_prompt
from ...agents.tools.calls import CallAnswer, ToolCall, ToolCalls, read_calls, results_text, turn_schema
from ...agents.tools.tool import Tool
from ...agents.turns import Turn
from ...router.escalation import Failures
from ..events import RunEvents
from ..meters.stamps import stamp_s
from ..store.records import StepRecord
from ..store.store import RunStore
from ..tools.calling import CallResult, ToolCaller
from .asking import Asker, StepAsk

__all__ = ["BLOCKED", "CallingStep", "ToolLoop"]


UNKNOWN = "(unknown)"
"""Under which calls are counted whose tool there is not: a model without a grammar may make up any number of names."""


class _Blocked:
    """The run waits for a person at this step."""


BLOCKED: Final = _Blocked()


@dataclass
class CallingStep:
    """How far one step has come. It outlives the tries of the step: a later try goes on from the last results."""

    ask: StepAsk
    tools: Mapping[str, Tool]
    numbered: int = 0
    """Calls of the turns before this one."""
    calls: ToolCalls | None = None
    """Calls whose results the model was not told yet."""

    @property
    def calls_left(self) -> int:
        """How many calls the role may still make."""
        return self.ask.role.max_calls - self.numbered


class ToolLoop:
    """The steps of one run whose roles have tools.

    `recorded` maps the paths of calls that were made to (result as JSON, content key).
    """

    def __init__(
        self,
        run_id: str,
        store: RunStore,
        asker: Asker,
        caller: ToolCaller,
        events: RunEvents,
        recorded: dict[str, tuple[str | None, str]],
        resumed: bool,
    ) -> None:
        self._run_id = run_id
        self._store = store
        self._asker = asker
        self._caller = caller
        self._events = events
        self._recorded = recorded
        self._begun = store.begun_calls(run_id) if resumed else set[str]()

    async def begin(self, ask: StepAsk, inputs: Mapping[str, Any], remembered: Sequence[Turn] = ()) -> CallingStep:
        """Where a step begins, or was when its run ended. Raises: what `ToolCaller.tools_of` raises."""
        tools = await self._caller.tools_of(ask.role)
        prompt = render_prompt(ask.role, inputs, tools, remembered)
        talk = CallingStep(replace(ask, messages=prompt), {each.name: each for each in tools})
        for messages, reply in self._store.replies(self._run_id, ask.record.path) if ask.first_attempt else ():
            calls = read_calls(reply)
            if calls is not None:
                talk.ask = replace(ask, messages=(*messages, Message(role="assistant", content=reply)))
                talk.calls = calls
                before = (read_calls(m.content) for m in messages[len(prompt) :] if m.role == "assistant")
                talk.numbered = sum(len(earlier.tool_calls) for earlier in before if earlier is not None)
                break
        return talk

    async def answer(self, talk: CallingStep, failures: Failures) -> Any:
        """The step's answer, as `Asker.answer`; BLOCKED when a person has to say what came of a call."""
        while True:
            if talk.calls is None:
                answer = answer_schema(talk.ask.role.gives)
                schema = served_schema(turn_schema(talk.tools.values(), answer, talk.calls_left))
                ask = replace(talk.ask, turn_schema=schema, may_call=talk.calls_left > 0)
                given = await self._asker.answer(ask, failures)
                if not isinstance(given, ToolCalls):
                    return given
                self._keep(talk, given)
            results = await self._make(talk)
            if results is None:
                return BLOCKED
            self._tell(talk, results)

    def _keep(self, talk: CallingStep, calls: ToolCalls) -> None:
        """Record the reply before any of its calls is made."""
        asks = talk.ask.record.asks
        self._store.record_asks(self._run_id, talk.ask.record.path, asks)
        said = Message(role="assistant", content=asks[-1].reply)
        messages, attempts = (*asks[-1].messages, said), talk.ask.first_attempt + len(asks)
        asks.clear()
        talk.ask = replace(talk.ask, messages=messages, first_attempt=attempts)
        talk.calls = calls

    async def _make(self, talk: CallingStep) -> list[str] | None:
        """Make the calls of a reply, all at once; None when a person is asked about one of them."""
        assert talk.calls is not None
        results: dict[int, str | None] = {}

        async def make(number: int, call: ToolCall) -> None:
            results[number] = await self._result(talk, number, call)

        async with anyio.create_task_group() as tasks:
            for number, call in enumerate(talk.calls.tool_calls, talk.numbered + 1):
                tasks.start_soon(make, number, call)
        told = [results[number] for number in sorted(results)]
        known = [text for text in told if text is not None]
        return known if len(known) == len(told) else None

    def _tell(self, talk: CallingStep, results: list[str]) -> None:
        assert talk.calls is not None
        calls, talk.calls = talk.calls.tool_calls, None
        talk.numbered += len(calls)
        text = results_text([(call.name, result) for call, result in zip(calls, results, strict=True)], talk.calls_left)
        talk.ask = replace(talk.ask, messages=(*talk.ask.messages, Message(role="user", content=text)))

    async def _result(self, talk: CallingStep, number: int, call: ToolCall) -> str | None:
        """The result of one call: as recorded, as a person says, or by making it. None when a person is asked."""
        if number > talk.ask.role.max_calls:
            return f"error: not called, at most {talk.ask.role.max_calls} calls are made"
        path = str(StepPath.parse(talk.ask.record.path).then(PathStep("tool", number)))
        key = content_hash([call.name, call.arguments])
        if path in self._recorded:
            return self._read_back(path, key)
        called = talk.tools.get(call.name)
        name = UNKNOWN if called is None else called.name
        record = StepRecord(path, "", "begun", None, key, stamp_s(), tool=name)
        if path in self._begun:
            said = self._ask_person(path, call)
            if said is None:
                return None
            if not said.call_again:
                return self._record(record, CallResult(said.result))
        if called is not None and not called.repeat:
            self._store.begin_call(self._run_id, record)
            self._begun.add(path)
        self._events.emit("step_started", path, tool=name)
        if called is None:
            result = CallResult(f"error: no tool {call.name!r}; there are {', '.join(talk.tools)}", failed=True)
        else:
            result = await self._caller.call(called, call.arguments)
        text = self._record(record, result)
        seconds = record.finished_at - record.started_at
        failure = {"error": text} if result.failed else {}
        self._events.emit("step_finished", path, tool=name, output=record.output, seconds=seconds, **failure)
        return text

    def _record(self, record: StepRecord, result: CallResult) -> str:
        record.state, record.output = "done", json.dumps(result.text)
        record.error = result.text if result.failed else None
        record.finished_at = stamp_s()
        self._store.record_step(self._run_id, record)
        self._recorded[record.path] = (record.output, record.content_key)
        self._begun.discard(record.path)
        return result.text

    def _read_back(self, path: str, key: str) -> str:
        output, recorded_key = self._recorded[path]
        if recorded_key != key:
            raise ResumeError(
                f"call {path!r} of run {self._run_id} was recorded with other arguments than it has now",
                expected="the same conversation as when it was made",
                remedy="Start a new run.",
            )
        return str(json.loads(output or '""'))

    def _ask_person(self, path: str, call: ToolCall) -> CallAnswer | None:
        """What a person says of a call that was begun and whose result is not known; None while that is asked."""
        _, answer = self._store.questions(self._run_id).get(path, ("", None))
        if answer is not None:
            return CallAnswer.model_validate_json(answer)
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        question = (
            f"Tool {call.name!r} was called with {arguments}, and the run ended before its result was known. It must "
            'not be called twice. Was it done? Answer {"result": "what it gave"}, or {"call_again": true}.'
        )
        self._store.ask_question(self._run_id, path, question, answer_shape(CallAnswer).text)
        return None
