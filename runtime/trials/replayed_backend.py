"""A backend that never repeats an ask: equal asks get the recorded reply. It keeps what every run cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from ...agents.backend import Backend, ForeseeingBackend, OnText, Prefetch, Upcoming
from ...agents.graphs.step_paths import PathStep
from ...agents.messages import Ask, Reply
from ...router.assignment import BASE
from ...router.probing.journal import Journal, record_key
from ...router.probing.outcomes import AskCost

__all__ = ["AskedInRun", "RecordedReply", "ReplayedBackend", "common_prefix"]


class RecordedReply(BaseModel):
    """A reply by the content of its ask."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Hash of what the model was shown (see `ReplayedBackend`)."""
    reply: Reply
    """The reply with its usage."""
    machine: str = ""
    """Key of the machine that it was measured on. Empty where that was not noted."""


@dataclass
class AskedInRun:
    """What one run asked: costs in the order the replies came, and each role's answers as (step path, text)."""

    asks: list[AskCost] = field(default_factory=list)
    answers: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    prompts: list[tuple[str, str]] = field(default_factory=list)


class ReplayedBackend:
    """Passes asks on to a backend and records the replies in a journal; an ask that equals a recorded one is not asked.

    Asks are equal when the model sees the same: messages, schema, variant (by the content ids in `variants`), sampling
    with its seed, and the task. So runs that differ in one role share every step before it, and those after it whose
    asks are equal. A reused reply has the cost that was recorded with it. `identity` names what else determines replies
    (the base model, its precision).

    Prompt tokens that two asks share are estimated from their common text, in blocks of `block_tokens`.
    """

    def __init__(
        self,
        backend: Backend,
        journal: Journal[RecordedReply],
        *,
        identity: str = "",
        variants: dict[str, str] | None = None,
        block_tokens: int = 32,
    ) -> None:
        self._backend = backend
        self._journal = journal
        self._identity = identity
        self._variants = variants or {}
        self._block_tokens = block_tokens
        self._runs: dict[str, AskedInRun] = {}
        self._last_run: dict[str, tuple[str, str]] = {}

    async def reply(self, ask: Ask, *, on_text: OnText | None = None) -> Reply:
        """See `Backend.reply`."""
        key = self._key(ask)
        known = self._journal.get(key)
        if known is None:
            reply = await self._backend.reply(ask, on_text=on_text)
            self._journal.add(RecordedReply(key=key, reply=reply))
        else:
            reply = known.reply
            if on_text is not None:
                on_text(reply.text)
        self._note(ask, reply, key, reused=known is not None)
        return reply

    def take(self, run_id: str) -> AskedInRun:
        """Return what a run has asked, and forget it."""
        return self._runs.pop(run_id, AskedInRun())

    def foresee(self, run_id: str, upcoming: Upcoming) -> Prefetch | None:
        """See `ForeseeingBackend`; nothing where the backend does not look ahead."""
        if isinstance(self._backend, ForeseeingBackend):
            return self._backend.foresee(run_id, upcoming)
        return None

    def forget(self, run_id: str) -> None:
        """See `ForeseeingBackend`."""
        if isinstance(self._backend, ForeseeingBackend):
            self._backend.forget(run_id)

    def _key(self, ask: Ask) -> str:
        unseen = {"run_id", "step_path", "attempt", "round", "priority", "remaining_s", "variant", "sampling"}
        seen = ask.model_dump(mode="json", exclude=unseen)
        # Replies were recorded before asks had these fields.
        if not ask.confidence:
            del seen["confidence"]
        seen |= {"sampling": ask.sampling.asks_for} if ask.sampling.asks_for else {}
        variant = ask.variant or BASE
        return record_key(ask=seen, variant=self._variants.get(variant, variant), identity=self._identity)

    def _note(self, ask: Ask, reply: Reply, key: str, *, reused: bool) -> None:
        run = self._runs.setdefault(ask.run_id, AskedInRun())
        name = str(PathStep(ask.role, ask.round))
        text = "\n".join(f"{message.role}\n{message.content}" for message in ask.messages)
        usage = reply.usage
        shared: dict[str, int] = {}
        for earlier, prompt in run.prompts:
            tokens = self._tokens(text, prompt, usage.prompt_tokens)
            if tokens > shared.get(earlier, 0):
                shared[earlier] = tokens
        last = self._last_run.get(name)
        if last is not None and last[0] != ask.run_id:
            shared[""] = self._tokens(text, last[1], usage.prompt_tokens)
        self._last_run[name] = (ask.run_id, text)
        run.prompts.append((name, text))
        run.answers.setdefault(ask.role, []).append((ask.step_path, reply.text))
        run.asks.append(
            AskCost(
                role=ask.role,
                round=ask.round,
                variant=ask.variant or BASE,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                thinking_tokens=usage.thinking_tokens,
                answer_tokens=usage.answer_tokens,
                cpu_s=usage.cpu_s,
                seconds=usage.prefill_s + usage.decode_s,
                swaps=usage.swaps,
                swap_s=usage.swap_s,
                reused=reused,
                content=key,
                shared_tokens={earlier: tokens for earlier, tokens in shared.items() if tokens},
            )
        )

    def _tokens(self, text: str, other: str, prompt_tokens: int) -> int:
        """Whole blocks of the tokens that a prompt shares with another from its start."""
        tokens = prompt_tokens * common_prefix(text, other) // max(len(text), 1)
        return tokens // self._block_tokens * self._block_tokens


def common_prefix(one: str, other: str) -> int:
    """How many characters two texts share from the start, by bisection (comparing slices is fast, loops are not)."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
