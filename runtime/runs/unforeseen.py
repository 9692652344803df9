"""Exceptions that nobody foresaw become errors of the one step or run that met them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...agents.errors import MetierError, first_error

__all__ = ["named"]

_SHOWN_CHARACTERS = 500


@contextmanager
def named(kind: type[MetierError], what: str, remedy: str | Callable[[], str]) -> Iterator[None]:
    """Raise any exception of the block as `kind`, with its cause; `what` says who raised it, `remedy` what to do.

    Errors of metier's own tree pass, and so does what is no Exception: cancellation, the end of the process.
    """
    try:
        yield
    except MetierError:
        raise
    except Exception as error:
        first = first_error(error) if isinstance(error, ExceptionGroup) else error
        if isinstance(first, MetierError):
            raise first from first.__cause__
        raise kind(
            f"{what} raised {_in_short(first)}",
            expected="a result, or one of metier's own errors",
            remedy=remedy if isinstance(remedy, str) else remedy(),
        ) from error


def _in_short(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:
        text = "(it cannot be shown)"
    text = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
    return f"{type(error).__name__}: {text}"
