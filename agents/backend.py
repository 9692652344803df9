"""The interface to any model, and the public fake that replaces a model in tests."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from inspect import isawaitable
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, TypeAdapter, ValidationError

from .answers.answers import split_thinking
from .errors import AskRejectedError
from .messages import Ask, Reply, Usage
from .sampling import WrittenToken, until_stop

__all__ = ["Backend", "ForeseeingBackend", "Prefetch", "ResumedText", "ScriptedBackend", "Upcoming"]

OnText = Callable[[str], None]
Script = Callable[[Ask], Any] | Iterable[Any]


class Backend(Protocol):
    """Anything that turns an ask into a reply: an engine here, a server elsewhere, the scripted fake.

    >>> from metier.agents import Ask, Reply
    >>> class Echo:
    ...     async def reply(self, ask: Ask, *, on_text=None) -> Reply:
    ...         return Reply(text=ask.messages[-1].content)
    >>> backend: Backend = Echo()
    """

    async def reply(self, ask: Ask, *, on_text: OnText | None = None) -> Reply:
        """Answer `ask`; call `on_text` with each new piece of the answer when given. Thinking is not streamed.

        Raises: AskRejectedError (this ask cannot be served), EngineDeadError (retry after a restart).
        """
        ...


class ScriptedBackend:
    """A backend that replies from scripts, to test workflows without a model.

    `scripts` maps a role name to either a function of the ask or a sequence of replies used in order. A reply
    may be text, a pydantic object (sent as JSON) or any JSON value; a function may be async and may raise. Text
    may begin with thinking, `<think>2 and 2</think>4`. An ask that thinks gets as many words of it as its `max_tokens`
    of thinking allows; any other ask gets the answer alone.
    The answer ends before the texts of `sampling.stop`; with `sampling.logprobs` each of its words is a certain token.
    `default` answers roles without a script. Token counts are words, so they are predictable. Every ask is
    kept in `asks`, in order; `keep_asks=False` is for long runs.

    >>> import anyio
    >>> from metier.agents import Ask, Message
    >>> backend = ScriptedBackend({"solver": ["4", "5"]}, default=lambda ask: f"no, says {ask.role}")
    >>> async def main():
    ...     for role in ("solver", "solver", "critic"):
    ...         ask = Ask(run_id="r", step_path=role, role=role, messages=(Message(role="user", content="2 + 2?"),))
    ...         print((await backend.reply(ask)).text)
    >>> anyio.run(main)
    4
    5
    no, says critic
    """

    def __init__(
        self,
        scripts: Mapping[str, Script] | None = None,
        *,
        default: Script | None = None,
        keep_asks: bool = True,
    ) -> None:
        self.asks: list[Ask] = []
        self._keep_asks = keep_asks
        self._scripts = {role: _as_function(role, s) for role, s in (scripts or {}).items()}
        self._default = None if default is None else _as_function("default", default)

    async def reply(self, ask: Ask, *, on_text: OnText | None = None) -> Reply:
        """Answer `ask` from its role's script.

        Raises: AskRejectedError when the role has no script, or its script has run out.
        """
        if self._keep_asks:
            self.asks.append(ask)
        script = self._scripts.get(ask.role, self._default)
        if script is None:
            raise AskRejectedError(
                f"no script for role {ask.role!r}",
                expected=f"one of {sorted(self._scripts)}",
                remedy="Give ScriptedBackend a script for this role, or a default.",
            )
        said = script(ask)
        if isawaitable(said):
            said = await said
        thinking, text = split_thinking(_as_text(said)) if _thinks(said) else ("", _as_text(said))
        thinking = " ".join(thinking.split()[: 0 if ask.thinking is None else ask.thinking.max_tokens])
        text = until_stop(text, ask.sampling.stop)
        if on_text is not None:
            for piece in re.findall(r"\S+\s*|\s+", text):
                on_text(piece)
        prompt_tokens = sum(len(m.content.split()) for m in ask.messages)
        usage = Usage(
            prompt_tokens=prompt_tokens, thinking_tokens=len(thinking.split()), answer_tokens=len(text.split())
        )
        return Reply(
            text=text,
            thinking=thinking,
            profile=ask.thinking,
            logprobs=None if ask.sampling.logprobs is None else _certain(text),
            usage=usage,
            variant=ask.variant,
            engine="scripted",
        )


def _as_function(role: str, script: Script) -> Callable[[Ask], Any | Awaitable[Any]]:
    if callable(script):
        return script
    queue = deque(script if not isinstance(script, str) else [script])

    def next_reply(ask: Ask) -> Any:
        if not queue:
            raise AskRejectedError(
                f"the script of role {role!r} has run out at step {ask.step_path!r}",
                expected="a reply for every ask",
                remedy="Add replies to the script, or use a function of the ask.",
            )
        return queue.popleft()

    return next_reply


def _certain(text: str) -> tuple[WrittenToken, ...]:
    """A script's words as tokens, of which each was certain."""
    return tuple(WrittenToken(token=word, logprob=0.0) for word in re.findall(r"\S+\s*|\s+", text))


def _thinks(said: Any) -> bool:
    """Whether a script's reply begins with thinking; later tags are part of the answer."""
    return isinstance(said, str) and said.lstrip().startswith("<think>")


def _as_text(said: Any) -> str:
    if isinstance(said, str):
        return said
    if not isinstance(said, BaseModel):
        return TypeAdapter(Any).dump_json(said, by_alias=True).decode()
    for by_alias in (True, False):  # under the names that a model is asked for, which are those its type reads
        text = said.model_dump_json(by_alias=by_alias)
        try:
            type(said).model_validate_json(text)
        except ValidationError:
            continue
        return text
    return said.model_dump_json()


Upcoming = tuple[tuple[str | None, int], ...]
"""Pairs of variant (None is the base) and the fewest asks until it is used, nearest first: 0 is the step that begins
now, 1 the next ask. Distances above the setting `foresight_asks` are guesses."""


Prefetch = Callable[[], Coroutine[Any, Any, None]]
"""Loads what was announced; awaited in a task beside the run."""


@runtime_checkable
class ForeseeingBackend(Protocol):
    """A backend that also learns which variants will be asked next."""

    def foresee(self, run_id: str, upcoming: Upcoming) -> Prefetch | None:
        """Learn which variants a run may ask for from now on; replaces its last announcement. Must not raise."""
        ...

    def forget(self, run_id: str) -> None:
        """Learn that a run has ended, with or without an error."""
        ...


class ResumedText:
    """Streams an ask's text once, although an ask that is tried again begins its text anew.

    The second attempt's text is passed on from where the first stopped. The two may differ (sampling, or a near tie in
    another batch); the reply's own text is what counts.
    """

    def __init__(self, on_text: OnText) -> None:
        self._on_text = on_text
        self._passed = 0
        self._written = 0

    def restart(self) -> None:
        """The text begins anew."""
        self._written = 0

    def __call__(self, piece: str) -> None:
        """Pass on the part of `piece` that was not passed on before."""
        self._written += len(piece)
        fresh = self._written - self._passed
        if fresh > 0:
            self._passed = self._written
            self._on_text(piece[-fresh:])
