"""Chat completions: a request becomes an ask, or a run of a workflow, and its reply a completion."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from ....agents.answers.answer_schema import answer_schema
from ....agents.backend import OnText
from ....agents.errors import RunError, RunInterrupted
from ....agents.graphs.nodes import BuiltGraph
from ....agents.messages import Ask, Message, Usage
from ....agents.prompts import prompt_layout, render_prompt, task_text
from ....agents.recorded_values import type_adapter
from ....agents.sampling import until_stop
from ....agents.thinking import ThinkingProfile
from ....agents.turns import Turn, kept_turns, turns_field
from ...events import Event
from ...runs.session import Session
from ...settings.server import ServerSettings
from ..error_replies import RequestRefused, error_body
from ..live_runs import LiveRuns
from ..served_models import ServedModels, ServedRole, ServedVariant, ServedWorkflow
from ..typed_inputs import role_inputs, workflow_input
from .chat_protocol import AskOrigin, ChatRequest, Completed, asked_schema, to_messages
from .sampling_requests import MAX_SEED
from .thinking_requests import asked_thinking
from .tool_requests import AskedTools, asked_tools

__all__ = ["Answer", "Chat"]


_OF_ASKS = (
    "max_completion_tokens", "max_tokens", "temperature", "thinking", "reasoning_effort", "reasoning",
    "chat_template_kwargs", "metier", "tools",
)  # fmt: skip

Answer = Callable[[OnText | None], Awaitable[Completed]]
"""Does what a request asks for; hands text on as it comes where it is wanted."""


class Chat:
    """Answers chat requests from a session. `run_options` is kept with runs, so that `metier resume` can go on."""

    def __init__(
        self,
        session: Session,
        models: ServedModels,
        runs: LiveRuns,
        settings: ServerSettings,
        run_options: Callable[[ServedWorkflow], dict[str, Any]],
    ) -> None:
        self._session = session
        self._models = models
        self._runs = runs
        self._settings = settings
        self._run_options = run_options

    def plan_choices(self, request: ChatRequest) -> list[Answer]:
        """`plan` for each of a request's `n` answers."""
        if request.n > self._settings.choices:
            raise RequestRefused(
                f"n={request.n}",
                param="n",
                expected=f"at most {self._settings.choices}",
                remedy="Ask for fewer, or raise server.choices.",
            )
        if request.n == 1 or request.seed is None:
            return [self.plan(request) for _ in range(request.n)]
        seeds = [(request.seed + number) % (MAX_SEED + 1) for number in range(request.n)]
        return [self.plan(request.model_copy(update={"seed": seed})) for seed in seeds]

    def plan(self, request: ChatRequest) -> Answer:
        """Check a request and return what answers it; raises RequestRefused for what can be known to be wrong."""
        served = self._models.find(request.model)
        if isinstance(served, ServedWorkflow):
            run = self._plan_run(served, request)
            return lambda on_text: run()
        settings = self._settings
        tools = asked_tools(
            request.tools, request.tool_choice, request.parallel_tool_calls, settings.tools, settings.calls
        )
        if isinstance(served, ServedRole):
            ask, reason = self._role_ask(served, request, tools)
        else:
            ask, reason = self._variant_ask(served, request, tools), "named by the request"
        if tools is None:
            return lambda on_text: self._ask(ask, reason, on_text)
        free_text = ask.answer_schema is None
        # Texts that stop an answer are looked for in it, not in the JSON that it is written in beside calls.
        stop, sampling = ask.sampling.stop, ask.sampling.model_copy(update={"stop": ()})
        asked = ask.model_copy(update={"answer_schema": tools.schema(ask.answer_schema), "sampling": sampling})

        async def called(on_text: OnText | None) -> Completed:
            """Nothing is handed on before it is known whether it is an answer."""
            done = await self._ask(asked, reason, None)
            text, calls = tools.read(done.text, free_text)
            if calls:
                return replace(done, text=text, calls=calls, logprobs=None, finish_reason="tool_calls")
            kept = until_stop(text, stop)
            return replace(done, text=kept, finish_reason=done.finish_reason if kept == text else "stop")

        return called

    # --- asks ---------------------------------------------------------------------------------------------

    async def _ask(self, ask: Ask, reason: str, on_text: OnText | None) -> Completed:
        began_s = time.monotonic()
        reply = await self._session.ask(ask, on_text=on_text)
        usage = reply.usage
        reason = f"{reason}; {reply.placement}" if reply.placement else reason
        known = ask.role if ask.role in self._models.roles else ""
        data = usage.model_dump(exclude_defaults=True)
        data |= {"variant": ask.variant, "reason": reason, "seconds": time.monotonic() - began_s}
        self._session.emit(Event(kind="ask_finished", step_path=ask.step_path, role=known, data=data))
        profile = None if reply.profile is None else reply.profile.model_dump()
        origin = {"variant": ask.variant, "engine": reply.engine, "reason": reason, "profile": profile}
        return Completed(reply.text, reply.thinking, reply.finish_reason, usage, origin, reply.logprobs)

    def _role_ask(self, served: ServedRole, request: ChatRequest, tools: AskedTools | None) -> tuple[Ask, str]:
        role = served.role
        first, *rest = to_messages(request.messages)
        if first.role != "user" or any(message.role == "system" for message in rest):
            raise RequestRefused(
                f"messages that begin with one of {first.role!r}, or hold one of the system, to role {role.name!r}",
                param="messages",
                code="role_has_its_prompt",
                expected="a user message with the role's inputs, and after it what was said since",
                remedy="A role has instructions of its own. To send yours, name a variant.",
            )
        self._check_format(request, role.gives, f"role {role.name!r}")
        inputs = role_inputs(role, first.content, self._settings.json_depth)
        origin = request.metier or AskOrigin()
        ask = self._new_ask(
            request,
            messages=(*render_prompt(role, inputs, () if tools is None else tools.tools), *rest),
            role=role.name,
            answer_schema=answer_schema(role.gives),
            max_tokens=self._answer_tokens(request, role.max_tokens),
            thinking=role.thinking,
            temperature=role.temperature if request.temperature is None else request.temperature,
            top_p=role.top_p if request.top_p is None else request.share(),
            task=origin.task or self._task(served, inputs, first),
            prompt_layout=prompt_layout(role.gives),
        )
        ask, reason = self._session.route(ask)
        thinking = self._thinking(request)
        if thinking is not None:
            ask = ask.model_copy(update={"thinking": thinking})
        return ask, reason

    def _task(self, served: ServedRole, inputs: dict[str, Any], first: Message) -> str:
        takes = self._models.workflows[served.workflow].graph.takes
        own = next((value for value in inputs.values() if isinstance(value, takes)), None)
        return first.content if own is None else task_text(own)

    def _variant_ask(self, served: ServedVariant, request: ChatRequest, tools: AskedTools | None) -> Ask:
        messages = to_messages(request.messages)
        origin = request.metier or AskOrigin()
        schema = asked_schema(request.response_format)
        return self._new_ask(
            request,
            messages=messages if tools is None else tools.told(messages, schema),
            role=origin.role,
            variant=served.variant,
            answer_schema=schema,
            max_tokens=self._answer_tokens(request, self._settings.answer_tokens),
            thinking=self._thinking(request),
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.share(),
            task=origin.task or next((m.content for m in messages if m.role == "user"), ""),
            prompt_layout=origin.prompt_layout,
        )

    def _new_ask(self, request: ChatRequest, **fields: Any) -> Ask:
        origin = request.metier or AskOrigin()
        return Ask(
            run_id=origin.run_id or f"request-{uuid.uuid4().hex[:12]}",
            step_path=origin.step_path or fields["role"] or "request",
            attempt=origin.attempt,
            round=origin.round,
            seed=request.seed,
            sampling=request.sampling(),
            priority=request.priority,
            **fields,
        )

    def _thinking(self, request: ChatRequest) -> ThinkingProfile | None:
        words = (request.reasoning_effort, request.reasoning, request.chat_template_kwargs)
        return asked_thinking(self._settings.efforts, request.thinking, *words)

    def _answer_tokens(self, request: ChatRequest, default: int) -> int:
        wanted = request.max_completion_tokens or request.max_tokens or default
        if wanted > self._settings.max_answer_tokens:
            raise RequestRefused(
                f"max_completion_tokens={wanted}",
                param="max_completion_tokens",
                expected=f"at most {self._settings.max_answer_tokens}",
                remedy="Ask for less, or raise server.max_answer_tokens.",
            )
        return wanted

    def _check_format(self, request: ChatRequest, gives: Any, what: str) -> None:
        """A role or workflow has its type: a client may repeat it, not change it."""
        asked = asked_schema(request.response_format)
        if asked is None or asked == {"type": "object"}:
            return
        ours = list((answer_schema(gives) or {}).get("properties", ()))
        properties = asked.get("properties")
        theirs = list(properties) if isinstance(properties, dict) else []
        if sorted(theirs) != sorted(ours):
            raise RequestRefused(
                f"response_format asks {what} for {', '.join(theirs) or 'something else'}",
                param="response_format",
                expected=f"what it gives: {', '.join(ours) or 'free text'}",
                remedy="Leave response_format out, or name a variant to ask in a type of your own.",
            )

    # --- runs ---------------------------------------------------------------------------------------------

    def _plan_run(self, served: ServedWorkflow, request: ChatRequest) -> Callable[[], Awaitable[Completed]]:
        graph = served.graph
        for name in _said_of_asks(request):
            raise RequestRefused(
                f"{name} for workflow {graph.name!r}",
                code="unsupported_parameter",
                param=name,
                expected="what its roles say of themselves",
                remedy="Leave it out, or name a role.",
            )
        self._check_format(request, graph.gives, f"workflow {graph.name!r}")
        value = self._workflow_input(graph, to_messages(request.messages))

        async def run() -> Completed:
            return await self._run(served, value, request.seed or 0)

        return run

    def _workflow_input(self, graph: BuiltGraph, messages: tuple[Message, ...]) -> BaseModel:
        """The last message, and those before it as turns where the workflow takes any."""
        turns = turns_field(graph.takes)
        roles = [message.role for message in messages]
        if roles != ["user", "assistant"] * (len(messages) // 2) + ["user"] or (len(messages) > 1 and turns is None):
            raise RequestRefused(
                f"{len(messages)} messages, the first of {messages[0].role}, to workflow {graph.name!r}",
                code="one_message",
                param="messages",
                expected="one user message: the workflow's input"
                if turns is None
                else "messages of user and assistant in turns, the last of them the workflow's input",
                remedy="A workflow goes on with a conversation where its input has a field of type list[Turn]."
                if turns is None
                else "",
            )
        value = workflow_input(graph, messages[-1].content, self._settings.json_depth)
        if turns is None or len(messages) == 1:
            return value
        pairs = zip(messages[::2], messages[1::2], strict=False)
        earlier = [Turn(asked=asked.content, replied=replied.content) for asked, replied in pairs]
        return value.model_copy(update={turns: list(kept_turns(earlier, self._session.settings.conversation_tokens))})

    async def _run(self, served: ServedWorkflow, value: BaseModel, seed: int) -> Completed:
        session, graph = self._session, served.graph
        run_id = session.prepare(graph, value, seed=seed, label="served", options=self._run_options(served))
        try:
            output = await self._runs.go(served, run_id)
        except RunError as error:
            status, body, _ = error_body(error)
            waits = isinstance(error, RunInterrupted)
            raise RequestRefused(
                body["error"]["message"],
                status=status,
                code=body["error"]["code"],
                remedy=f"{'Answer' if waits else 'See'} it at /v1/runs/{run_id}{'/resume' if waits else ''}.",
            ) from error
        text = output if isinstance(output, str) else type_adapter(graph.gives).dump_json(output).decode()
        return Completed(text, usage=run_usage(session, run_id), origin={"run_id": run_id})


def _said_of_asks(request: ChatRequest) -> Iterator[str]:
    """Fields that say how one ask is made, which a workflow's roles say themselves, where they say anything."""
    yield from request.sampling().asks_for
    says = {"n": request.n > 1, "top_p": request.top_p not in (None, 1), "priority": request.priority != 0}
    yield from (name for name, said in says.items() if said)
    yield from (name for name in _OF_ASKS if getattr(request, name) is not None)


def run_usage(session: Session, run_id: str) -> Usage:
    """What all asks of a run have used together."""
    sums = ", ".join(f"coalesce(sum({name}), 0) AS {name}" for name in Usage.model_fields)
    (row,) = session.store.query(f"SELECT {sums} FROM asks WHERE run = ?", run_id)
    return Usage(**dict(row))
