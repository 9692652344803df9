"""The words exchanged with any model: an ask, its reply, and what the reply cost."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .thinking import ThinkingProfile

__all__ = ["Ask", "Message", "Reply", "Usage", "add_usage"]


class Message(BaseModel):
    """One chat message.

    >>> Message(role="user", content="What is 2 + 2?").role
    'user'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Ask(BaseModel):
    """One request to a model: what a step of a run wants written.

    `run_id` and `step_path` are the step identity (`attempt[2]/critic`); `attempt` counts corrections and
    retries of that step from 0. `variant` is the content id or name the router chose, None for the base.
    `task` is the run's input as text (`task_text`), the same in every ask of the run. `max_tokens` bounds the
    answer; `thinking` bounds what comes before it, and is None where neither role nor assignment sets it.
    `remaining_s` is the critical path of the run from this ask on in seconds, 0 where it is not known.
    With `confidence` the reply has the log-probability of its answer, where the backend reports it.

    >>> question = Message(role="user", content="What is 2 + 2?")
    >>> ask = Ask(run_id="r1", step_path="attempt[2]/solver", role="solver", messages=(question,), round=2)
    >>> ask.id
    'r1/attempt[2]/solver~0'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    step_path: str
    role: str
    messages: tuple[Message, ...]
    attempt: int = Field(default=0, ge=0)
    round: int = Field(default=1, ge=1)
    variant: str | None = None
    answer_schema: dict[str, Any] | None = None
    max_tokens: int = Field(default=256, ge=1)
    thinking: ThinkingProfile | None = None
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = None
    priority: int = 0
    remaining_s: float = Field(default=0.0, ge=0.0)
    confidence: bool = False
    prompt_layout: int = 1
    task: str = ""

    @property
    def id(self) -> str:
        """Name of this ask, unique within a store: run, step path and attempt."""
        return f"{self.run_id}/{self.step_path}~{self.attempt}"


class Usage(BaseModel):
    """What one reply cost, from the engine's own counters and timestamps.

    Tokens, seconds and CPU-seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: int = 0
    cached_tokens: int = 0
    thinking_tokens: int = 0
    answer_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    cpu_s: float = 0.0
    swaps: int = 0
    swap_s: float = 0.0
    slot_wait_s: float = 0.0

    @property
    def output_tokens(self) -> int:
        """All generated tokens, thinking included."""
        return self.thinking_tokens + self.answer_tokens

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens that were computed, because the prefix cache did not have them."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def total_tokens(self) -> int:
        """Prompt and generated tokens together."""
        return self.prompt_tokens + self.output_tokens


class Reply(BaseModel):
    """A model's answer to one ask: `text` is the answer alone, `thinking` the thinking before it.

    `profile` is the thinking profile the ask was served with, which may be the variant's own. `mean_logprob` is the
    mean log-probability of the answer's tokens in nats, for asks with `confidence`; None where the backend has none.
    `engine` names the engine that answered, `placement` the reason where several could have.

    >>> usage = Usage(prompt_tokens=9, thinking_tokens=3, answer_tokens=2)
    >>> Reply(text="4", thinking="2 and 2", usage=usage).usage.total_tokens
    14
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    thinking: str = ""
    profile: ThinkingProfile | None = None
    finish_reason: Literal["stop", "length"] = "stop"
    mean_logprob: float | None = None
    usage: Usage = Usage()
    variant: str | None = None
    engine: str = ""
    placement: str = ""


def add_usage(usage: Usage, **more: float) -> Usage:
    """`usage` with amounts added to some of its fields."""
    return usage.model_copy(update={name: getattr(usage, name) + value for name, value in more.items()})
