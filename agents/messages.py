"""The words exchanged with any model: an ask, its reply, and what the reply cost."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .frozen_model import FrozenModel
from .sampling import Sampling, WrittenToken
from .thinking import ThinkingProfile

__all__ = ["Ask", "Message", "Reply", "Usage", "add_usage"]


class Message(FrozenModel):
    """One chat message.

    >>> Message(role="user", content="What is 2 + 2?").role
    'user'
    """

    role: Literal["system", "user", "assistant"]
    """Whose message it is."""

    content: str
    """Its text."""


class Ask(FrozenModel):
    """One request to a model: what a step of a run wants written.

    >>> question = Message(role="user", content="What is 2 + 2?")
    >>> ask = Ask(run_id="r1", step_path="attempt[2]/solver", role="solver", messages=(question,), round=2)
    >>> ask.id
    'r1/attempt[2]/solver~0'
    """

    run_id: str
    """The run that asks."""

    step_path: str
    """Path of the step that asks, such as `attempt[2]/critic`; with `run_id` the identity of the step."""

    role: str
    """Name of the role that asks."""

    messages: tuple[Message, ...]
    """The prompt."""

    attempt: int = Field(default=0, ge=0)
    """Counts corrections and retries of the step, from 0."""

    round: int = Field(default=1, ge=1)
    """Round of the innermost loop, from 1."""

    variant: str | None = None
    """Content id or name of the variant that the router chose. None is the base."""

    answer_schema: dict[str, Any] | None = None
    """JSON schema that the answer has to fit. None is free text."""

    max_tokens: int = Field(default=256, ge=1)
    """Most tokens of the answer, thinking apart."""

    thinking: ThinkingProfile | None = None
    """How long to think before the answer. None where neither role nor assignment says."""

    temperature: float = Field(default=0.0, ge=0.0)
    """Sampling temperature. 0 is greedy."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the probability mass that is sampled from."""

    seed: int | None = None
    """Seed of sampling."""

    sampling: Sampling = Sampling()
    """Everything else about sampling, and what is reported of it."""

    priority: int = 0
    """Order in the engine's queue. The smallest goes first."""

    remaining_s: float = Field(default=0.0, ge=0.0)
    """Critical path of the run from this ask on, in seconds. 0 where it is not known."""

    confidence: bool = False
    """Whether the reply should have the log-probability of its answer, where the backend reports it."""

    prompt_layout: int = 1
    """Version of the prompt layout that the messages have."""

    task: str = ""
    """The run's input as text (`task_text`), the same in every ask of the run."""

    @property
    def id(self) -> str:
        """Name of this ask, unique within a store: run, step path and attempt."""
        return f"{self.run_id}/{self.step_path}~{self.attempt}"


class Usage(FrozenModel):
    """What one reply cost, from the engine's own counters and timestamps."""

    prompt_tokens: int = 0
    """Tokens of the whole prompt."""

    cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""

    thinking_tokens: int = 0
    """Tokens generated before the end of thinking."""

    answer_tokens: int = 0
    """All other generated tokens: the end tag, the answer and its end."""

    queue_s: float = 0.0
    """Seconds until the ask was first scheduled."""

    prefill_s: float = 0.0
    """Seconds from then until the first token."""

    decode_s: float = 0.0
    """Seconds from then until the last token."""

    cpu_s: float = 0.0
    """CPU-seconds of the engine's process charged to this ask, adapter loads included."""

    swaps: int = 0
    """Adapter loads that this ask caused, and prefetched ones that it was the first to use."""

    swap_s: float = 0.0
    """Seconds that it waited for them."""

    slot_wait_s: float = 0.0
    """Part of `queue_s` in which it waited for another adapter to leave a slot."""

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


class Reply(FrozenModel):
    """A model's answer to one ask.

    >>> usage = Usage(prompt_tokens=9, thinking_tokens=3, answer_tokens=2)
    >>> Reply(text="4", thinking="2 and 2", usage=usage).usage.total_tokens
    14
    """

    text: str
    """The answer alone."""

    thinking: str = ""
    """The thinking before it, without tags."""

    profile: ThinkingProfile | None = None
    """The thinking profile that the ask was served with, which may be the variant's own."""

    finish_reason: Literal["stop", "length"] = "stop"
    """`stop` where the model ended the answer, `length` where `max_tokens` did."""

    grammar: str = ""
    """What held the reply to the ask's schema: `xgrammar`, or `guidance` where xgrammar cannot. "" for free text, and
    where the backend does not say."""

    mean_logprob: float | None = None
    """Mean log-probability of the answer's tokens in nats, for asks with `confidence`. None where the backend has none.
    """

    logprobs: tuple[WrittenToken, ...] | None = None
    """The answer's tokens, for asks with `sampling.logprobs`. None where the backend has none."""

    usage: Usage = Usage()
    """What it cost."""

    variant: str | None = None
    """Variant that answered. None is the base."""

    engine: str = ""
    """Name of the engine that answered."""

    placement: str = ""
    """Why this engine answered, where there was a choice of several."""


def add_usage(usage: Usage, **more: float) -> Usage:
    """`usage` with amounts added to some of its fields."""
    return usage.model_copy(update={name: getattr(usage, name) + value for name, value in more.items()})
