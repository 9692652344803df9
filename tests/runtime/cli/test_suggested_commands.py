"""Every command that a message suggests can be pasted: the parser takes it, and it names its store."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from metier.runtime.cli.main import app
from metier.runtime.store.commands import command

ROOT = Path(__file__).parents[3]
ROOMS = ("agents", "specializers", "router", "runtime", "examples")
STAND_IN = "stand-in"
"""What a part that is filled in becomes, when it is quoted for a shell."""
UNQUOTED = "two words"
"""What it becomes when it is not: a path with a blank in it."""


class Message(NamedTuple):
    """A text of the program that is no docstring, and where it stands; `remedy` says that it tells what to do."""

    place: str
    text: str
    remedy: bool


def messages(file: Path) -> Iterator[Message]:
    """The texts of one file, f-strings put together."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    said = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
    said |= {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    remedies = {
        id(part)
        for node in nodes
        if isinstance(node, ast.keyword) and node.arg == "remedy"
        for part in ast.walk(node.value)
    }
    for node in nodes:
        if id(node) in said:
            continue
        place = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.JoinedStr):
            yield Message(place, "".join(map(filled_in, node.values)), id(node) in remedies)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield Message(place, node.value, id(node) in remedies)


def filled_in(part: ast.expr) -> str:
    """A part of an f-string as it may look in the message."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    if not isinstance(part.value, ast.Call):
        return UNQUOTED
    name = ast.unparse(part.value.func)
    if name == "command":
        return composed(part.value)
    return STAND_IN if name == "shlex.quote" else UNQUOTED


def composed(call: ast.Call) -> str:
    """What a call of `command` gives, parts that are no constants filled in."""
    words = [word.value if isinstance(word, ast.Constant) else STAND_IN for word in call.args]
    return command(*words, store=UNQUOTED)


def suggested(text: str) -> list[str]:
    """The commands in a text: quoted, or behind a colon up to the end of the line."""
    quoted = re.findall(r"`(metier [a-z][^`]*)`", text)
    return quoted + re.findall(r": (metier [a-z].*?)(?:\.? *$|\. [A-Z])", re.sub(r"`[^`]*`", "", text), re.M)


def calls_of_command() -> Iterator[tuple[str, str]]:
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "command"
                and any(word.arg == "store" for word in node.keywords)
            ):
                yield f"{file.relative_to(ROOT)}:{node.lineno}", composed(node)


def sources() -> list[Path]:
    return sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


def parsed(line: str) -> dict[str, Any]:
    """The options that the parser reads from a pasted line. Raises: click's own errors where it refuses it."""
    here, words = command_line(), shlex.split(line)[1:]
    while words and words[0] in getattr(here, "commands", {}):
        here, words = here.commands[words[0]], words[1:]
    context = here.make_context("metier", list(words))
    assert not hasattr(here, "commands") or here.invoke_without_command, f"{line}: a group without its verb"
    return dict(context.params)


def names_no_store(line: str) -> bool:
    """Whether a line reads a store and does not say which."""
    return shlex.split(line)[1] in ("resume", "report") and "--store" not in line


SUGGESTIONS = [
    (message.place, line)
    for file in sources()
    for message in messages(file)
    for line in suggested(message.text)
    if message.remedy or not line.count(" ") == 1  # `metier probe` alone, elsewhere, is its name
    if "…" not in line and not message.text.startswith("Example: ")
]


def test_there_are_suggestions_and_commands_that_are_put_together() -> None:
    assert len(SUGGESTIONS) >= 15 and len(list(calls_of_command())) >= 6


@pytest.mark.parametrize(("place", "line"), SUGGESTIONS, ids=[place for place, _ in SUGGESTIONS])
def test_a_suggested_command_can_be_pasted(place: str, line: str) -> None:
    if line.endswith("--help"):
        return
    parsed(line)
    assert not names_no_store(line), f"{place}: {line}"


@pytest.mark.parametrize(("place", "line"), list(calls_of_command()))
def test_a_command_that_is_put_together_can_be_pasted(place: str, line: str) -> None:
    assert str(parsed(line)["store"]) == UNQUOTED, place


EPILOGS = [
    line
    for file in sources()
    for message in messages(file)
    if message.text.startswith("Example: ")
    for line in suggested(message.text)
]


@pytest.mark.parametrize("line", [line for line in EPILOGS if not line.endswith("--help")])
def test_an_example_of_the_help_can_be_pasted(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    parsed(line.partition(" >")[0])


def test_a_command_that_misses_what_it_needs_would_be_found() -> None:
    for line in ("metier make", "metier serve", "metier variants export NAME", "metier doctor FOLDER", "metier resum"):
        with pytest.raises(Exception, match=r"(?i)missing|unexpected|no such|without its verb"):
            parsed(line)
    assert names_no_store("metier resume RUN") and suggested("Go on: metier resume.") == ["metier resume"]
