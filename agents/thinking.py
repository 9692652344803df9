"""How long a role thinks before it answers, and the tags that thinking is written between."""

from __future__ import annotations

from typing import Any, Self

from pydantic import ConfigDict, model_validator

from .errors import SettingsError
from .frozen_model import FrozenModel

__all__ = ["THINKING_OFF", "ThinkingProfile", "ThinkingTags"]


class ThinkingProfile(FrozenModel):
    """How long one ask thinks before it answers, in tokens between the tags; exact to the token on our engines.

    Where people write it, a number is the maximum and `off` (also YAML's false) is 0: `thinking: 64`.
    An ask without a profile is asked as if there were no thinking: no tags, no block.
    Raises: SettingsError when the numbers contradict each other.

    >>> ThinkingProfile(max_tokens=128, min_tokens=32, waits=1).off
    False
    >>> ThinkingProfile.model_validate(64) == ThinkingProfile(max_tokens=64)
    True
    >>> ThinkingProfile.model_validate("off").off
    True
    """

    model_config = ConfigDict(strict=True)

    max_tokens: int
    """Thinking ends at this many tokens at the latest. 0 is off: the ask gets a closed, empty block and answers at
    once."""

    min_tokens: int = 0
    """Thinking does not end before this many tokens."""

    waits: int = 0
    """How often an attempt to end is answered with the word "Wait" instead (budget forcing, arXiv 2501.19393, section
    3.1). These are attempts below `min_tokens` where it is set, else any. A Wait that does not fit below `max_tokens`
    is left out."""

    @model_validator(mode="before")
    @classmethod
    def _read_short_forms(cls, given: Any) -> Any:
        if given is False or given == "off":
            return {"max_tokens": 0}
        if isinstance(given, int) and not isinstance(given, bool):
            return {"max_tokens": given}
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("max_tokens", "min_tokens", "waits"):
            if getattr(self, name) < 0:
                raise SettingsError(
                    f"thinking {name}={getattr(self, name)}",
                    expected="0 or more",
                    remedy="Write max_tokens: 0 (or `off`) for no thinking at all.",
                )
        if self.min_tokens > self.max_tokens:
            raise SettingsError(
                f"thinking min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}",
                expected="a minimum that the maximum leaves room for",
                remedy="Raise max_tokens, or lower min_tokens.",
            )
        if self.waits and not self.max_tokens:
            raise SettingsError(
                f"thinking waits={self.waits} with thinking off",
                expected="a maximum above 0 to wait within",
                remedy="Raise max_tokens, or leave waits out.",
            )
        return self

    @property
    def off(self) -> bool:
        """Whether the ask answers at once, after a closed block."""
        return self.max_tokens == 0


THINKING_OFF = ThinkingProfile(max_tokens=0)
"""Answer at once, after a closed block; a model that was trained to think thinks unless it gets one."""


class ThinkingTags(FrozenModel):
    """The text that thinking is written between, as the model was trained with it.

    Raises: SettingsError when a tag is missing or would hide in another.

    >>> ThinkingTags(open="<reason>", close="</reason>", empty="<reason></reason>").wait
    'Wait'
    """

    open: str = "<think>\n"
    """Put behind the prompt of an ask that thinks."""

    close: str = "</think>"
    """Ends thinking, whether the model writes it or the budget does."""

    empty: str = "<think>\n</think>"
    """Put behind the prompt of an ask with thinking off."""

    wait: str = "Wait"
    """The word that lengthens thinking."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("open", "close", "empty", "wait"):
            if not getattr(self, name).strip():
                raise SettingsError(f"thinking tag {name}={getattr(self, name)!r}", expected="some text")
        if self.close != self.close.strip() or not self.close.isascii():
            raise SettingsError(
                f"thinking tag close={self.close!r}",
                expected="ASCII without white space around it, so that it is found however it is split into tokens",
                remedy="Put white space that belongs behind the tag at the end of `empty` only.",
            )
        for name in ("open", "wait"):
            if self.close in getattr(self, name):
                raise SettingsError(
                    f"thinking tag {name}={getattr(self, name)!r} holds close={self.close!r}",
                    expected="tags that can be told apart",
                )
        if not self.empty.rstrip().endswith(self.close):
            raise SettingsError(
                f"thinking tag empty={self.empty!r}", expected=f"a block that ends with close={self.close!r}"
            )
        return self
