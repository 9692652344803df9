"""Errors that task groups wrap, unwrapped."""

from __future__ import annotations

from .errors import MetierError

__all__ = ["first_error"]


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error of a task group to show: one that was not made on purpose hides behind no other."""
    errors = group.exceptions
    worst = next((e for e in errors if not isinstance(e, MetierError | BaseExceptionGroup)), errors[0])
    return first_error(worst) if isinstance(worst, BaseExceptionGroup) else worst
