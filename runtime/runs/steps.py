"""One step of one run: ask a model or call a function, try again within bounds, and record the result."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any

import anyio
from pydantic import ValidationError

from ...agents.answers.answer_shape import answer_shape
from ...agents.errors import AnswerError, EngineDeadError, MetierError, ResumeError, StepError, StepTimeoutError
from ...agents.graphs.nodes import BuiltNode, FunctionWork, PersonWork, RoleWork
from ...agents.graphs.step_paths import StepPath
from ...agents.messages import Message
from ...agents.prompts import render_prompt
from ...agents.recorded_values import load
from ...agents.roles import Role
from ...agents.turns import Turn
from ...router.escalation import NO_FAILURES, Failures
from ..events import RunEvents
from ..meters.stamps import stamp_s
from ..store.records import StepRecord
from ..store.store import RunStore
from ..tools.calling import ToolCaller
from .asking import Asker, StepAsk
from .batches import once_mended
from .memory import RunMemory
from .run_plan import RunPlan
from .step_values import call_function, content_key, gives_each, typed_output
from .tool_loop import BLOCKED, CallingStep, ToolLoop
from .unforeseen import named

__all__ = ["BLOCKED", "StepRunner"]


class StepRunner:
    """Does the steps of one run: reads recorded ones back; does, retries and records the others.

    Function steps run in a worker thread unless they are async.
    """

    def __init__(self, plan: RunPlan, store: RunStore, asker: Asker, tools: ToolCaller, events: RunEvents) -> None:
        self.run_id = plan.run_id
        self._store = store
        self._asker = asker
        self._events = events
        self._recorded = store.finished_steps(self.run_id) if plan.resumed else {}
        self._first_attempt = store.next_attempts(self.run_id) if plan.resumed else {}
        self._tools = ToolLoop(self.run_id, store, asker, tools, events, self._recorded, plan.resumed)
        self._memory = RunMemory(plan.graph)
        self._given_up = store.skipped_steps(self.run_id) if plan.resumed else frozenset()

    # --- what the executor calls --------------------------------------------------------------------------

    async def run(
        self,
        node: BuiltNode,
        path: str,
        inputs: dict[str, Any],
        round_number: int,
        failures: Failures = NO_FAILURES,
    ) -> Any:
        """Do one role or function step, or read back what is recorded; returns its typed output, or BLOCKED.

        `failures` counts the rounds of its loop that were not accepted. Failures of the step itself are added here and
        dropped with the step, so that a resumed run, which begins the step anew, takes the same levels.
        Raises: AnswerError, StepError, StepTimeoutError, LimitError or EngineError once the tries are used up, and
        ToolError when a role's tools cannot be reached.
        """
        work = node.work
        assert isinstance(work, RoleWork | FunctionWork)
        gives = work.role.gives if isinstance(work, RoleWork) else gives_each(node)
        step = StepRecord(path, work.role.name if isinstance(work, RoleWork) else "", "failed", None, "", stamp_s())
        try:
            with self._naming(path):
                turns = self._earlier_turns(work, path)
                messages = render_prompt(work.role, inputs, (), turns) if isinstance(work, RoleWork) else None
                step.content_key = content_key(messages, inputs)
        except MetierError as error:
            self._fail(step, error)
            raise
        if path in self._recorded:
            output = self._read_back(path, step.content_key, gives)
            self._remember(work, path, messages)
            return output

        talk: CallingStep | None = None

        def once(failures: Failures) -> Awaitable[Any]:
            if isinstance(work, FunctionWork):
                return call_function(work.function, path, inputs)
            if talk is not None:
                return self._tools.answer(talk, failures)
            assert messages is not None
            ask = StepAsk(work.role, messages, round_number, step, self._first_attempt.get(path, 0))
            return self._asker.answer(ask, failures)

        self._events.emit("step_started", path, step.role)
        try:
            with self._naming(path):
                if isinstance(work, RoleWork) and work.role.tools:
                    assert messages is not None
                    ask = StepAsk(work.role, messages, round_number, step, self._first_attempt.get(path, 0))
                    talk = await self._tools.begin(ask, inputs, turns)
                given = await self._try(node, step, once, failures)
                if given is BLOCKED:
                    return BLOCKED
                output, step.output = typed_output(given, gives, path, parsed=isinstance(work, RoleWork))
            step.state = "done"
        except BaseException as error:
            self._fail(step, error)
            raise
        self._record(step)
        self._remember(work, path, messages)
        seconds = step.finished_at - step.started_at
        self._events.emit("step_finished", path, step.role, output=step.output, seconds=seconds)
        return output

    def skip(self, path: str, reason: str) -> None:
        """Record that a step does not run, and why."""
        self._events.emit("step_skipped", path, reason=reason)

    def was_given_up(self, path: str) -> bool:
        """Whether an item of a fan-out failed before the run was resumed, and the fan-out went on without it."""
        return path in self._given_up

    def give_up(self, path: str, error: BaseException) -> None:
        """Record that a fan-out goes on without an item, so that a resumed run does so too."""
        now = stamp_s()
        self._store.record_step(self.run_id, StepRecord(path, "", "skipped", None, "", now, now, str(error)))
        self._events.emit("step_skipped", path, reason=str(error))

    def begin_round(self, path: str, max_rounds: int) -> None:
        """Record that a round of a loop begins."""
        self._events.emit("round_started", path, of=max_rounds)

    def ask_person(self, node: BuiltNode, work: PersonWork, path: str, inputs: dict[str, Any]) -> Any:
        """A person's answer when there is one; otherwise keep the question and return BLOCKED."""
        asked = self._store.questions(self.run_id).get(path)
        if asked is None or asked[1] is None:
            role = Role(node.name.lower(), {n: t.type for n, t in node.inputs.items()}, str, work.question)
            question = role.render_instructions(inputs)
            gives = "text" if node.gives is str else answer_shape(node.gives).text
            self._store.ask_question(self.run_id, path, question, gives)
            return BLOCKED
        return asked[1].strip() if node.gives is str else load(asked[1], node.gives)

    # --- inside -------------------------------------------------------------------------------------------

    async def _try(
        self, node: BuiltNode, step: StepRecord, once: Callable[[Failures], Awaitable[Any]], failures: Failures
    ) -> Any:
        """Do a step; when it fails, again while tries are left."""
        for left in range(node.retries, -1, -1):
            step.tries = node.retries - left + 1
            try:
                with anyio.fail_after(node.timeout_s):
                    return await once(failures)
            except TimeoutError as error:
                failure: MetierError = StepTimeoutError(
                    f"step {step.path!r} took longer than timeout_s={node.timeout_s}, {step.tries} times",
                    expected="an answer within the time-out",
                    remedy="Raise timeout_s, lower max_tokens, or give the role a faster variant.",
                )
                failure.__cause__ = error
            except (AnswerError, StepError, EngineDeadError) as error:
                failure = error
                if isinstance(error, AnswerError):
                    failures = failures._replace(unparsed=failures.unparsed + 1)
            if not left:
                raise failure
            self._events.emit("ask_retried", step.path, step.role, reason=str(failure))
        raise AssertionError("unreachable: the last try returns or raises")

    def _read_back(self, path: str, key: str, gives: Any) -> Any:
        output, recorded_key = self._recorded[path]
        if recorded_key != key:
            raise ResumeError(
                f"step {path!r} of run {self.run_id} was recorded with other inputs than it has now",
                expected="the same workflow, prompts and function results as when the run was started",
                remedy="Start a new run, or undo the change to the workflow.",
            )
        try:
            return load(output or "null", gives)
        except ValidationError as error:
            raise ResumeError(
                f"the recorded output of step {path!r} is no longer what the step gives: {error}",
                expected="the answer types the run was started with",
                remedy="Start a new run.",
            ) from error

    def _earlier_turns(self, work: RoleWork | FunctionWork, path: str) -> tuple[Turn, ...]:
        if isinstance(work, FunctionWork) or not work.role.memory:
            return ()
        return self._memory.earlier(work.role, StepPath.parse(path))

    def _remember(self, work: RoleWork | FunctionWork, path: str, prompt: tuple[Message, ...] | None) -> None:
        """Keep the turn of a finished step, of a role with memory: its own prompt, and the reply that was accepted.

        It is read from the store in any case, so that a resumed run remembers the same to the letter. The message has
        its place in the prompt also where the ask says more than `prompt` does: of tools, calls and corrections.
        """
        if prompt is None or isinstance(work, FunctionWork) or not work.role.memory:
            return
        messages, reply = self._store.replies(self.run_id, path)[0]
        turn = Turn(asked=messages[len(prompt) - 1].content, replied=reply)
        self._memory.keep(work.role, StepPath.parse(path), turn)

    def _naming(self, path: str) -> AbstractContextManager[None]:
        return named(StepError, f"step {path!r}", lambda: once_mended(self._store, self.run_id))

    def _fail(self, step: StepRecord, error: BaseException) -> None:
        """Record that a step failed; of one that was cancelled, what its asks cost."""
        step.error = str(error) or type(error).__name__
        if isinstance(error, MetierError):
            self._record(step)
            self._events.emit("step_failed", step.path, step.role, error=step.error)
        elif step.asks:
            # Cancelled: nothing may be awaited here.
            self._record(step)

    def _record(self, step: StepRecord) -> None:
        step.finished_at = stamp_s()
        self._store.record_step(self.run_id, step)
