"""Which tokens an ask that thinks may write next, so that its thinking keeps to its profile.

Budget forcing (s1, arXiv 2501.19393, section 3.1) made exact: the end tag is forced at the maximum, an attempt to end
too early is turned into "Wait" or forbidden. Nothing here knows vLLM; `thinking_processor` applies it to logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.thinking import ThinkingProfile
from .end_tag import EndTag, ThinkingScanner

__all__ = ["BudgetForcing", "Constraint", "ThinkingRules"]


@dataclass(frozen=True)
class ThinkingRules:
    """A thinking profile together with the tags in token ids; travels with a request as plain values."""

    profile: ThinkingProfile
    close: str
    close_ids: tuple[int, ...]
    wait_ids: tuple[int, ...]

    def to_plain(self) -> dict[str, Any]:
        """As values that cross process borders."""
        ids = {"close_ids": list(self.close_ids), "wait_ids": list(self.wait_ids)}
        return {"profile": self.profile.model_dump(), "close": self.close, **ids}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> ThinkingRules:
        """The rules again."""
        profile = ThinkingProfile.model_validate(plain["profile"])
        return cls(profile, plain["close"], tuple(plain["close_ids"]), tuple(plain["wait_ids"]))


@dataclass(frozen=True)
class Constraint:
    """What the next token may be: exactly `forced`, or anything but `banned`. Both empty: anything."""

    forced: int | None = None
    banned: frozenset[int] = frozenset()


class BudgetForcing:
    """The rules applied to one reply, token by token.

    `read` takes what was written; `next` says what may come. What `next` decides counts once its token is read: a
    scheduler may ask several times for one place (a long prompt is computed in pieces whose samples are dropped).
    """

    def __init__(self, rules: ThinkingRules, tag: EndTag, stop_ids: Iterable[int]) -> None:
        self._rules = rules
        self._tag = tag
        self._stop_ids = frozenset(stop_ids)
        self._scanner = ThinkingScanner(tag)
        self._waits = rules.profile.waits
        self._planned: tuple[int, ...] = ()
        self._plan_is_wait = False
        self._forcing: tuple[int, ...] = ()

    @property
    def closed(self) -> bool:
        """Whether thinking has ended; nothing is forced or banned any more."""
        return self._scanner.closed

    def read(self, token_ids: Sequence[int]) -> None:
        """Read the tokens written since the last call."""
        for token in token_ids:
            if self._scanner.closed:
                return
            self._follow(token)
            self._scanner.read((token,))

    def next(self, best: Callable[[], int]) -> Constraint:
        """What the next token may be, given the token the model would like `best`."""
        if self._scanner.closed:
            return Constraint()
        self._planned = ()
        if self._forcing:
            return Constraint(forced=self._forcing[0])
        if self._scanner.tokens >= self._rules.profile.max_tokens:
            return Constraint(forced=self._rest_of_close()[0])
        return self._choose(best())

    def _follow(self, token: int) -> None:
        """Go on with what is being forced, or begin with what was planned, if this is its token."""
        if self._forcing:
            self._forcing = self._forcing[1:] if token == self._forcing[0] else ()
        elif self._planned and token == self._planned[0]:
            self._forcing = self._planned[1:]
            self._waits -= self._plan_is_wait
        self._planned = ()

    def _choose(self, best: int) -> Constraint:
        """Within the budget: the model may write what it likes, but not end where it may not, nor in the wrong way."""
        # A reply must not stop while it thinks, and what a token holds behind the tag would be lost to the answer.
        stray: set[int] = set(self._stop_ids)
        early: set[int] = set()
        ending = 0 if best in stray else None
        for characters, tokens in self._scanner.begun():
            completion = self._tag.completions[characters]
            stray |= completion.over
            if not self._may_end(self._scanner.tokens - tokens):
                early |= completion.exact
            if best in completion.exact or best in completion.over:
                ending = tokens
        if ending is not None:
            thought = self._scanner.tokens - ending
            if self._wait_is_due(thought):
                return self._plan(self._rules.wait_ids, is_wait=True)
            if best in stray and self._may_end(thought):
                return self._plan(self._rest_of_close())
        return Constraint(banned=frozenset(stray | early))

    def _may_end(self, thought: int) -> bool:
        return thought >= self._rules.profile.min_tokens and not self._wait_is_due(thought)

    def _wait_is_due(self, thought: int) -> bool:
        profile = self._rules.profile
        room = profile.max_tokens - self._scanner.tokens >= len(self._rules.wait_ids)
        return self._waits > 0 and room and (profile.min_tokens == 0 or thought < profile.min_tokens)

    def _plan(self, token_ids: tuple[int, ...], *, is_wait: bool = False) -> Constraint:
        self._planned, self._plan_is_wait = token_ids, is_wait
        return Constraint(forced=token_ids[0])

    def _rest_of_close(self) -> tuple[int, ...]:
        """What is still missing of the end tag: all of it, unless a part that may count as its beginning is there."""
        close, last = self._rules.close_ids, tuple(self._scanner.last)
        for written in range(len(close) - 1, 0, -1):
            enough = self._scanner.tokens - written >= self._rules.profile.min_tokens
            if enough and last[-written:] == close[:written]:
                return close[written:]
        return close
