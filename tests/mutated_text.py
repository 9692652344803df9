"""Mutated text files, drawn from a seed: what people, editors, disks and attackers make of a good one."""

from __future__ import annotations

import random
from collections.abc import Callable

__all__ = ["mutated"]

_ODD_VALUES = (
    "[", "{", "}", "]", "- 1", "null", "~", "''", "true", "-1", "0", "1e999", ".nan", ".inf", "-.inf", "9" * 5000,
    "0x" + "f" * 5000, str(2**64), str(-(2**70)), "1.5", "[1, 2]", "{a: b}", "{1: 2}", "{[1]: 2}", "? [a, b]",
    "&a [*a]", "*missing", "!!python/object:os.system x", "!!int x", "!!bool x", "!!timestamp x", "!!binary '*'",
    "!!set {a, b}", "!!omap [a]", "!odd x", "2020-99-99", "2020-01-01", '"\\ud800"', '"\\0"', "'\\x00'", "\x00",
    "\ufeff", "é" * 50, "x" * 3000, "[" * 3000, "{a: " * 3000, "%YAML 9.9\n---", "---\n---\n", "<<: *x", "<<: [1]",
    "\t- x",
)  # fmt: skip


def _replace_value(text: str, draw: random.Random) -> str:
    lines = text.splitlines()
    number = draw.randrange(len(lines))
    head, colon, _ = lines[number].partition(":")
    lines[number] = f"{head}{colon} {draw.choice(_ODD_VALUES)}" if colon else draw.choice(_ODD_VALUES)
    return "\n".join(lines)


def _whole(text: str, draw: random.Random) -> str:
    return draw.choice(_ODD_VALUES)


def _drop_line(text: str, draw: random.Random) -> str:
    lines = text.splitlines()
    del lines[draw.randrange(len(lines))]
    return "\n".join(lines)


def _repeat_line(text: str, draw: random.Random) -> str:
    lines = text.splitlines()
    lines.insert(draw.randrange(len(lines)), draw.choice(lines))
    return "\n".join(lines)


def _indent(text: str, draw: random.Random) -> str:
    lines = text.splitlines()
    number = draw.randrange(len(lines))
    lines[number] = draw.choice((" ", "    ", "\t", "- ")) + lines[number]
    return "\n".join(lines)


def _misspell(text: str, draw: random.Random) -> str:
    place = draw.randrange(len(text))
    return text[:place] + draw.choice("aZ0:-[]{}\"'#&*!|>%@` \n") + text[place + draw.randrange(2) :]


def _bomb(text: str, draw: random.Random) -> str:
    levels = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40))]
    return "\n".join(levels) + "\n" + text


_OF_TEXT: tuple[Callable[[str, random.Random], str], ...] = (
    _replace_value, _replace_value, _replace_value, _whole, _drop_line, _repeat_line, _indent, _misspell, _misspell,
    _bomb,
)  # fmt: skip


def mutated(text: str, draw: random.Random) -> bytes:
    """A mutation of a text file, as bytes: one to three changes of its text, and at times of its bytes."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        text = draw.choice(_OF_TEXT)(text or "a: b", draw)
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if draw.random() < 0.25:
        for _ in range(draw.choice((1, 8))):
            data[draw.randrange(len(data) or 1) : draw.randrange(len(data) or 1)] = draw.randbytes(draw.randrange(1, 4))
    if draw.random() < 0.05:
        del data[draw.randrange(len(data) or 1) :]
    return bytes(data)
