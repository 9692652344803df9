"""Write docs/cli.md from the commands themselves: python scripts/write_cli_page.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import typer

from metier.runtime.cli.main import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"

INTRODUCTION = """\
# The command line

Written by `scripts/write_cli_page.py` from the commands themselves; `--help` after each says the same.

In every verb `--shelf` names folders of variants beside your own shelf, `--variants` names variants, `--engine` says
what answers, and `--set` changes one of the [settings](settings.md). Answers and tables go to stdout, progress and
notes to stderr. The exit status is 0 when all went well, 1 when a run,
an engine or a training failed, 2 for what is yours to mend (an option, a setting, a file, a workflow, a recipe, an
assignment, a variant, a full disk), 3 when a run waits for a person, 130 after Ctrl-C and 143 after SIGTERM. An error
is one line that says what to do; after a signal one line says what is kept and how to go on.
"""

FIELDS = ("option", "takes", "default", "what it is")


def cli_page() -> str:
    """The whole page."""
    commands = dict(_commands(typer.main.get_command(app), "metier"))
    index = [f"| [`{name}`](#{_anchor(name)}) | {_first_line(command)} |" for name, command in commands.items()]
    table = "\n".join(["| command | what it does |", "|---|---|", *index])
    return "\n\n".join([INTRODUCTION.strip(), table, *(_section(*item) for item in commands.items())]) + "\n"


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command that can be typed, in the order of `--help`; a group that does something by itself is one."""
    for verb, below in getattr(command, "commands", {}).items():
        yield f"{name} {verb}", below
        yield from _commands(below, f"{name} {verb}")


def _section(name: str, command: Any) -> str:
    parts = [f"## {name}", _prose(command.help)]
    parts.append("\n".join(f"    {example}" for example in examples(command)))
    rows = [_row(parameter) for parameter in command.params if "--help" not in parameter.opts]
    if rows:
        head = f"| {' | '.join(FIELDS)} |\n|{'---|' * len(FIELDS)}"
        parts.append("\n".join([head, *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join(parts)


def examples(command: Any) -> list[str]:
    """The commands of an epilog."""
    return re.findall(r"`([^`]+)`", command.epilog or "")


def _row(parameter: Any) -> tuple[str, str, str, str]:
    argument = "--" not in parameter.opts[0]
    names = [parameter.name.upper()] if argument else [*parameter.opts, *parameter.secondary_opts]
    annotation = parameter.type_descriptor.annotation
    return (
        ", ".join(f"`{name}`" for name in names),
        _takes(annotation),
        _default(parameter),
        _cell(parameter.help or ""),
    )


def _takes(annotation: Any) -> str:
    """What is written after an option: nothing after a switch."""
    if get_origin(annotation) is list:
        return f"{_takes(get_args(annotation)[0])}, several"
    if get_origin(annotation) is Literal:
        return _cell(" or ".join(f"`{choice}`" for choice in get_args(annotation)))
    if get_args(annotation):
        return " or ".join(_takes(one) for one in get_args(annotation) if one is not NoneType)
    return {str: "text", int: "integer", float: "number", Path: "path", bool: ""}[annotation]


def _default(parameter: Any) -> str:
    default = parameter.default
    if parameter.required:
        return "required"
    if isinstance(default, bool):
        names = parameter.opts if default else parameter.secondary_opts
        return f"`{names[0]}`" if names else ""
    return "" if default in (None, "") else f"`{default}`"


def _prose(text: str | None) -> str:
    """Paragraphs of a docstring, each on one line."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


def _first_line(command: Any) -> str:
    return _cell(_prose(command.help).split("\n\n")[0])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _anchor(name: str) -> str:
    return name.replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(cli_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
