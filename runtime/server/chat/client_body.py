"""The base of what clients send: fields that say nothing are dropped, those that cannot be honoured are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from ..error_replies import RequestRefused, shortened

__all__ = ["ANY", "ClientBody", "Unserved"]

ANY = None
"""Every value of a field that has no effect on answers."""


@dataclass(frozen=True)
class Unserved:
    """A field of clients, or values of one, without an effect here."""

    why: str
    """Why nothing is missed without it; where not every value is harmless, why the others are refused."""

    harmless: tuple[Any, ...] | None = ANY
    """Values that change nothing."""

    def drops(self, value: Any) -> bool:
        """Whether a value may be left out."""
        return self.harmless is None or any(type(value) is type(one) and value == one for one in self.harmless)


class ClientBody(BaseModel):
    """An object in a client's request. Null is the same as a field left out; unknown fields are refused.

    `unserved` names what clients send without an effect here: harmless values are dropped, and others refused with the
    reason unless the model has a field of that name.
    Raises: RequestRefused for them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unserved: ClassVar[Mapping[str, Unserved]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_says_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept: dict[Any, Any] = {}
        for name, value in given.items():
            rule = cls.unserved.get(name)
            if value is None or (rule is not None and rule.drops(value)):
                continue
            if rule is not None and name not in cls.model_fields:
                raise _refused(name, value, rule)
            kept[name] = value
        return kept


def _refused(name: str, value: Any, rule: Unserved) -> RequestRefused:
    others = " or ".join(shortened(one) for one in rule.harmless or ())
    return RequestRefused(
        f"{name}={shortened(value)}: {rule.why}",
        code="unsupported_parameter",
        param=name,
        expected=f"a request without it{f', or with {others}' if others else ''}",
    )
