"""One step of one run: ask a model or call a function, try again within bounds, and record what came of it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import anyio
from pydantic import ValidationError

from ...agents.answers import correction_messages, parse_answer
from ...agents.backend import Backend
from ...agents.errors import (
    AnswerError,
    EngineDeadError,
    LimitError,
    MetierError,
    ResumeError,
    StepError,
    StepTimeoutError,
)
from ...agents.messages import Ask, Message, Reply
from ...agents.nodes import BuiltNode, FunctionWork, PersonWork, RoleWork
from ...agents.prompts import PROMPT_LAYOUT, render_prompt
from ...agents.roles import Role
from ...router.escalation import NO_SETBACKS, Setbacks
from ...router.route import Route
from ..events import Event, EventKind, OnEvent
from ..settings.limits import RunLimits
from ..store.records import AskRecord, StepRecord
from ..store.store import RunStore
from .run_priority import RemainingPath, RunPriority
from .step_values import call_function, content_key, gives_each, schema_of, type_adapter, typed_output

__all__ = ["BLOCKED", "StepRunner"]


class _Blocked:
    """The run waits for a person at this step."""


BLOCKED: Final = _Blocked()

RouteAsk = Callable[[Ask, Setbacks], Route]
"""Where an ask goes after what went wrong before it, and why."""


class StepRunner:
    """Does the steps of one run: recorded ones are read back, others are done, retried and recorded.

    A reply that does not parse earns one correction ask within the same try. Function steps run in a worker
    thread unless they are async.
    """

    def __init__(
        self,
        run_id: str,
        store: RunStore,
        route: RouteAsk,
        backend: Backend,
        *,
        on_event: OnEvent | None = None,
        limits: RunLimits | None = None,
        seed: int = 0,
        task: str = "",
        stream: bool = False,
        resumed: bool = False,
        priority: RunPriority | None = None,
        remaining: RemainingPath | None = None,
    ) -> None:
        self.run_id = run_id
        self._store = store
        self._route = route
        self._backend = backend
        self._on_event = on_event
        self._limits = limits or RunLimits()
        self._seed = seed
        self._task = task
        self._stream = stream
        self._priority = priority
        self._remaining = remaining
        self._tokens = 0
        self._recorded = store.finished_steps(run_id) if resumed else {}
        self._first_attempt = store.next_attempts(run_id) if resumed else {}

    # --- what the executor calls --------------------------------------------------------------------------

    async def run(
        self,
        node: BuiltNode,
        path: str,
        inputs: dict[str, Any],
        round_number: int,
        setbacks: Setbacks = NO_SETBACKS,
    ) -> Any:
        """Do one role or function step, or read back what is recorded; returns its typed output.

        `setbacks` says how many rounds of its loop were not accepted. What goes wrong in the step itself is added
        here and forgotten with the step, so that a resumed run, which begins the step anew, takes the same rungs.
        Raises: AnswerError, StepError, StepTimeoutError, LimitError or EngineError once the tries are used up.
        """
        work = node.work
        assert isinstance(work, RoleWork | FunctionWork)
        messages = render_prompt(work.role, inputs) if isinstance(work, RoleWork) else None
        key = content_key(messages, inputs)
        gives = work.role.gives if isinstance(work, RoleWork) else gives_each(node)
        if path in self._recorded:
            return self._read_back(path, key, gives)
        role = work.role.name if isinstance(work, RoleWork) else ""
        step = StepRecord(path, role, "failed", None, key, time.time())
        self._tell("step_started", path, role)
        try:
            output = await self._try(node, path, inputs, messages, round_number, step, setbacks)
            output, step.output = typed_output(output, gives, path)
            step.state = "done"
        except BaseException as error:
            step.error = str(error) or type(error).__name__
            if isinstance(error, MetierError):
                self._record(step)
                self._tell("step_failed", path, role, error=step.error)
            elif step.asks:
                # Cancelled: nothing is waited for here, but what the asks cost must not be lost.
                self._record(step)
            raise
        self._record(step)
        self._tell("step_finished", path, role, output=step.output, seconds=step.finished_at - step.started_at)
        return output

    def skip(self, node: BuiltNode, path: str, reason: str) -> None:
        """Note that a step does not run, and why."""
        self._tell("step_skipped", path, "", reason=reason)

    def ask_person(self, node: BuiltNode, work: PersonWork, path: str, inputs: dict[str, Any]) -> Any:
        """A person's answer when it is there; otherwise the question is kept and the step is BLOCKED."""
        asked = self._store.questions(self.run_id).get(path)
        if asked is None or asked[1] is None:
            role = Role(node.name.lower(), {n: t.type for n, t in node.inputs.items()}, str, work.question)
            question = role.render_instructions(inputs)
            self._store.ask_question(self.run_id, path, question)
            return BLOCKED
        return parse_answer(asked[1], node.gives)

    def emit(self, event: Event) -> None:
        """Pass an event on, with this run's id."""
        if self._on_event is not None:
            self._on_event(event.model_copy(update={"run_id": self.run_id}))

    # --- tries --------------------------------------------------------------------------------------------

    async def _try(
        self,
        node: BuiltNode,
        path: str,
        inputs: dict[str, Any],
        messages: tuple[Message, ...] | None,
        round_number: int,
        step: StepRecord,
        setbacks: Setbacks,
    ) -> Any:
        for left in range(node.retries, -1, -1):
            step.tries = node.retries - left + 1
            try:
                with anyio.fail_after(node.timeout_s):
                    if isinstance(node.work, RoleWork):
                        assert messages is not None
                        return await self._ask_until_sure(node.work.role, path, messages, round_number, step, setbacks)
                    assert isinstance(node.work, FunctionWork)
                    return await call_function(node.work.function, node.name, inputs)
            except TimeoutError as error:
                failure: MetierError = StepTimeoutError(
                    f"step {path!r} took longer than timeout_s={node.timeout_s}, {step.tries} times",
                    expected="an answer within the time-out",
                    remedy="Raise timeout_s, lower max_tokens, or give the role a faster variant.",
                )
                failure.__cause__ = error
            except (AnswerError, StepError, EngineDeadError) as error:
                failure = error
                if isinstance(error, AnswerError):
                    setbacks = setbacks._replace(unparsed=setbacks.unparsed + 1)
            if not left:
                raise failure
            self._tell("ask_retried", path, step.role, reason=str(failure))
        raise AssertionError("unreachable: the last try returns or raises")

    async def _ask_until_sure(
        self,
        role: Role,
        path: str,
        messages: tuple[Message, ...],
        round_number: int,
        step: StepRecord,
        setbacks: Setbacks,
    ) -> Any:
        """Ask, and while the answer is unsure and its ladder goes on, ask again one rung up; the last answer counts."""
        while True:
            answer, threshold, logprob = await self._ask_role(role, path, messages, round_number, step, setbacks)
            if threshold is None or logprob is None or logprob >= threshold:
                return answer
            setbacks = setbacks._replace(unsure=setbacks.unsure + 1, logprob=logprob)
            reason = f"mean log-probability {logprob:.2f} below {threshold:g}"
            self._tell("ask_retried", path, role.name, reason=reason)

    async def _ask_role(
        self,
        role: Role,
        path: str,
        messages: tuple[Message, ...],
        round_number: int,
        step: StepRecord,
        setbacks: Setbacks,
    ) -> tuple[Any, float | None, float | None]:
        """The answer of one ask and its correction, below which log-probability it is unsure, and which it has."""
        reply, threshold = await self._ask(role, path, messages, round_number, step, setbacks)
        try:
            return parse_answer(reply.text, role.gives), threshold, reply.mean_logprob
        except AnswerError as error:
            step.asks[-1].error = str(error)
            self._tell("ask_retried", path, role.name, reason=str(error))
            corrected = correction_messages(messages, reply.text, error)
        reply, threshold = await self._ask(role, path, corrected, round_number, step, setbacks)
        try:
            return parse_answer(reply.text, role.gives), threshold, reply.mean_logprob
        except AnswerError as error:
            step.asks[-1].error = str(error)
            raise

    async def _ask(
        self,
        role: Role,
        path: str,
        messages: tuple[Message, ...],
        round_number: int,
        step: StepRecord,
        setbacks: Setbacks,
    ) -> tuple[Reply, float | None]:
        self._check_tokens(path)
        attempt = self._first_attempt.get(path, 0) + len(step.asks)
        ask = Ask(
            run_id=self.run_id,
            step_path=path,
            role=role.name,
            messages=messages,
            attempt=attempt,
            round=round_number,
            answer_schema=schema_of(role.gives),
            max_tokens=role.max_tokens,
            thinking=role.thinking,
            temperature=role.temperature,
            top_p=role.top_p,
            seed=self._ask_seed(path, attempt) if role.temperature > 0 else None,
            priority=0 if self._priority is None else self._priority.of(path),
            remaining_s=0.0 if self._remaining is None else self._remaining.at(path),
            prompt_layout=PROMPT_LAYOUT,
            task=self._task,
        )
        route = self._route(ask, setbacks)
        ask, reason = route.send(ask), route.reason
        record = AskRecord(attempt, role.name, ask.variant, reason, PROMPT_LAYOUT, messages, time.time())
        step.asks.append(record)
        on_text = partial(self._text, path, role.name) if self._stream else None
        try:
            reply = await self._backend.reply(ask, on_text=on_text)
        except BaseException as error:
            record.error = str(error) or type(error).__name__
            record.answered_at = time.time()
            raise
        record.answered_at = time.time()
        record.engine = reply.engine
        if reply.placement:
            record.reason = f"{reason}; {reply.placement}"
        record.reply, record.finish_reason, record.usage = reply.text, reply.finish_reason, reply.usage
        record.thinking, record.profile = reply.thinking, reply.profile
        self._tokens += reply.usage.total_tokens
        if self._priority is not None:
            self._priority.note(reply.usage)
        if self._on_event is not None:
            usage = reply.usage.model_dump(exclude_defaults=True)
            if ask.priority:
                usage["priority"] = ask.priority
            if route.climbs:
                usage["climbs"] = route.climbs
            seconds = record.answered_at - record.asked_at
            self._tell(
                "ask_finished", path, role.name, variant=ask.variant, reason=record.reason, seconds=seconds, **usage
            )
        return reply, route.min_logprob

    def _check_tokens(self, path: str) -> None:
        limit = self._limits.max_tokens
        if limit is not None and self._tokens >= limit:
            raise LimitError(
                f"run {self.run_id} has used {self._tokens} tokens before step {path!r}",
                expected=f"at most max_tokens={limit}",
                remedy="Raise the limit and `metier resume` the run: what was recorded is kept.",
            )

    def _ask_seed(self, path: str, attempt: int) -> int:
        digest = hashlib.sha256(f"{self._seed}|{path}|{attempt}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    # --- recording ----------------------------------------------------------------------------------------

    def _read_back(self, path: str, key: str, gives: Any) -> Any:
        output, recorded_key = self._recorded[path]
        if recorded_key != key:
            raise ResumeError(
                f"step {path!r} of run {self.run_id} was recorded with other inputs than it has now",
                expected="the same workflow, prompts and function results as when the run was started",
                remedy="Start a new run, or undo the change to the workflow.",
            )
        try:
            return type_adapter(gives).validate_json(output or "null")
        except ValidationError as error:
            raise ResumeError(
                f"the recorded output of step {path!r} is no longer what the step gives: {error}",
                expected="the answer types the run was started with",
                remedy="Start a new run.",
            ) from error

    def _record(self, step: StepRecord) -> None:
        step.finished_at = time.time()
        self._store.record_step(self.run_id, step)

    def _tell(self, kind: EventKind, path: str, role: str, **data: Any) -> None:
        if self._on_event is not None:
            self._on_event(Event(kind=kind, run_id=self.run_id, step_path=path, role=role, data=data))

    def _text(self, path: str, role: str, text: str) -> None:
        self._tell("text", path, role, text=text)
