"""Asks a model on behalf of a step, until the answer fits its type and is sure enough."""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...agents.answers.answer_schema import answer_schema
from ...agents.answers.answers import correction_messages, parse_answer
from ...agents.backend import Backend
from ...agents.errors import AnswerError, EngineError, LimitError
from ...agents.messages import Ask, Message, Reply, Usage
from ...agents.prompts import prompt_layout, task_text
from ...agents.roles import Role
from ...agents.tools.calls import read_calls, read_text_answer
from ...router.escalation import Failures
from ...router.route import Route
from ..events import RunEvents
from ..meters.stamps import stamp_s
from ..store.records import AskRecord, StepRecord
from .outlook import RunOutlook
from .run_plan import RunPlan
from .unforeseen import named

__all__ = ["Asker", "RouteAsk", "StepAsk"]

LARGEST_COUNT = 2**63 - 1
"""The largest integer that SQLite keeps."""

RETRY_TEMPERATURE = 0.7
"""Temperature of an ask that repeats, word for word, a greedy one whose reply did not parse."""

RouteAsk = Callable[[Ask, Failures], Route]
"""Route of an ask, given the failures before it."""


@dataclass(frozen=True)
class StepAsk:
    """The ask of one step of a run: role, round of its loop, and prompt."""

    role: Role
    messages: tuple[Message, ...]
    round: int
    record: StepRecord
    """Called with every ask that is made and its reply."""

    first_attempt: int = 0
    """Number of the first ask; a resumed run counts on from those it had."""

    turn_schema: dict[str, Any] | None = None
    """Schema of a reply that may call tools instead; None is the answer's own."""

    may_call: bool = False
    """Whether the reply may be calls of tools."""


class Asker:
    """Asks for the steps of one run; every ask is routed, counted, recorded and sent to listeners.

    A reply that does not parse gets one correction ask. An unsure answer is asked again one level up, as far as the
    ladder goes.
    """

    def __init__(
        self, plan: RunPlan, backend: Backend, route: RouteAsk, outlook: RunOutlook, events: RunEvents
    ) -> None:
        self._plan = plan
        self._backend = backend
        self._route = route
        self._outlook = outlook
        self._events = events
        self._task = task_text(plan.value)
        self._tokens = 0

    async def answer(self, step: StepAsk, failures: Failures) -> Any:
        """The step's answer, an object of the type that its role gives, or the calls of tools that it makes instead.

        Raises: AnswerError when the correction does not parse either, LimitError when the run has used its tokens, and
        what the backend raises.
        """
        while True:
            answer, threshold, logprob = await self._parsed(step, failures)
            if threshold is None or logprob is None or logprob >= threshold:
                return answer
            failures = failures._replace(unsure=failures.unsure + 1, logprob=logprob)
            reason = f"mean log-probability {logprob:.2f} below {threshold:g}"
            self._events.emit("ask_retried", step.record.path, step.role.name, reason=reason)

    async def _parsed(self, step: StepAsk, failures: Failures) -> tuple[Any, float | None, float | None]:
        """Ask, and correct once; returns (answer, threshold, mean log-probability)."""
        reply, threshold = await self._ask(step, step.messages, failures)
        try:
            return _parse(reply, step), threshold, reply.mean_logprob
        except AnswerError as error:
            step.record.asks[-1].error = str(error)
            self._events.emit("ask_retried", step.record.path, step.role.name, reason=str(error))
            corrected = correction_messages(step.messages, reply.text, error)
        reply, threshold = await self._ask(step, corrected, failures)
        try:
            return _parse(reply, step), threshold, reply.mean_logprob
        except AnswerError as error:
            step.record.asks[-1].error = str(error)
            where = f"role {step.role.name!r} at step {step.record.path!r}: "
            raise AnswerError(where + error.problem, expected=error.expected, remedy=error.remedy) from error

    async def _ask(
        self, step: StepAsk, messages: tuple[Message, ...], failures: Failures
    ) -> tuple[Reply, float | None]:
        """One ask; returns (reply, log-probability below which its answer is unsure)."""
        self._check_tokens(step.record.path)
        ask = self._new_ask(step, messages)
        route = self._route(ask, failures)
        ask, reason = route.send(ask), route.reason
        if ask.temperature == 0 and _was_refused(step.record.asks, ask):
            ask = ask.model_copy(update={"temperature": RETRY_TEMPERATURE, "seed": self._ask_seed(step, ask.attempt)})
            reason += f"; at temperature {RETRY_TEMPERATURE:g}, since the same ask has had a reply that does not parse"
        layout = ask.prompt_layout
        record = AskRecord(ask.attempt, step.role.name, ask.variant, reason, layout, messages, stamp_s())
        step.record.asks.append(record)
        on_text = partial(self._emit_text, step) if self._plan.stream else None
        try:
            with named(EngineError, "the backend", "Look at the cause, and resume the run once it is mended."):
                reply = _checked(await self._backend.reply(ask, on_text=on_text))
        except BaseException as error:
            record.error = str(error) or type(error).__name__
            record.answered_at = stamp_s()
            raise
        self._note(record, reply)
        if self._events:
            self._emit_asked(step, ask, route, record)
        return reply, route.min_logprob

    def _new_ask(self, step: StepAsk, messages: tuple[Message, ...]) -> Ask:
        role, outlook = step.role, self._outlook
        attempt = step.first_attempt + len(step.record.asks)
        return Ask(
            run_id=self._plan.run_id,
            step_path=step.record.path,
            role=role.name,
            messages=messages,
            attempt=attempt,
            round=step.round,
            answer_schema=answer_schema(role.gives) if step.turn_schema is None else step.turn_schema,
            max_tokens=role.max_tokens,
            thinking=role.thinking,
            temperature=role.temperature,
            top_p=role.top_p,
            seed=self._ask_seed(step, attempt) if role.temperature > 0 else None,
            priority=0 if outlook.priority is None else outlook.priority.of(step.record.path),
            remaining_s=outlook.remaining.at(step.record.path),
            prompt_layout=prompt_layout(role.gives),
            task=self._task,
        )

    def _note(self, record: AskRecord, reply: Reply) -> None:
        record.answered_at = stamp_s()
        record.engine = reply.engine
        if reply.placement:
            record.reason = f"{record.reason}; {reply.placement}"
        record.reply, record.finish_reason, record.usage = reply.text, reply.finish_reason, reply.usage
        record.thinking, record.profile = reply.thinking, reply.profile
        self._tokens += reply.usage.total_tokens
        if self._outlook.priority is not None:
            self._outlook.priority.note(reply.usage)

    def _check_tokens(self, path: str) -> None:
        limit = self._plan.limits.max_tokens
        if limit is not None and self._tokens >= limit:
            raise LimitError(
                f"run {self._plan.run_id} has used {self._tokens} tokens before step {path!r}",
                expected=f"at most max_tokens={limit}",
                remedy="Raise the limit (--max-tokens) and resume the run: what was recorded is kept.",
            )

    def _ask_seed(self, step: StepAsk, attempt: int) -> int:
        digest = hashlib.sha256(f"{self._plan.record.seed}|{step.record.path}|{attempt}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    def _emit_asked(self, step: StepAsk, ask: Ask, route: Route, record: AskRecord) -> None:
        seconds = record.answered_at - record.asked_at
        data = {"variant": ask.variant, "reason": record.reason, "seconds": seconds}
        data |= record.usage.model_dump(exclude_defaults=True)
        if ask.priority:
            data["priority"] = ask.priority
        if route.climbs:
            data["climbs"] = route.climbs
        self._events.emit("ask_finished", step.record.path, step.role.name, **data)

    def _emit_text(self, step: StepAsk, text: str) -> None:
        self._events.emit("text", step.record.path, step.role.name, text=text)


def _was_refused(earlier: list[AskRecord], ask: Ask) -> bool:
    """Whether the step has asked just this before and could not use the reply: greedy, it would get the same again."""
    return any(
        one.error is not None
        and one.finish_reason
        and (one.variant, one.messages) == (ask.variant, ask.messages)
        and ask.thinking in (None, one.profile)
        for one in earlier
    )


def _parse(reply: Reply, step: StepAsk) -> Any:
    calls = read_calls(reply.text) if step.may_call else None
    if calls is not None:
        return calls
    answer = parse_answer(reply.text, step.role.gives, cut_off=reply.finish_reason == "length")
    return read_text_answer(answer) if step.turn_schema is not None and step.role.gives is str else answer


def _checked(reply: Any) -> Reply:
    """The reply, when it is one whose counts can be recorded; raises EngineError otherwise."""
    if not isinstance(reply, Reply):
        raise EngineError(f"the backend gave {reprlib.repr(reply)}", expected="a Reply", remedy="Mend the backend.")
    for name in Usage.model_fields:
        amount = getattr(reply.usage, name)
        if abs(amount) > LARGEST_COUNT or not math.isfinite(amount):
            raise EngineError(
                f"the backend counts {name}={reprlib.repr(amount)}",
                expected="a finite amount below 2^63",
                remedy="Look at what the server says of its usage.",
            )
    return reply
