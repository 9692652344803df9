"""What README and docs say exists: links, anchors, files, modules, commands; the README stays short."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from metier.runtime.cli.main import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
README_BYTES, README_LINES = 8 * 1024, 130
FOLDERS = "agents|specializers|router|runtime|tests|examples|benchmarks|docs|scripts"
# The log is history: it names files and flags of its day.
PAGES = sorted(
    page for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if not re.fullmatch(r"\d{4}-\d{2}", page.stem)
)
CHANGELOG = ROOT / "CHANGELOG.md"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def links(page: Path) -> list[str]:
    """Targets of links and pictures, written inline or below the text."""
    text = prose(page)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.M)


@cache
def anchors(page: Path) -> frozenset[str]:
    """Names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#{1,6} (.*)$", prose(page), re.M)
    words = (re.sub(r"\]\([^)]*\)", "", heading).lower() for heading in headings)
    return frozenset(re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in words)


def commands(page: Path) -> Iterator[str]:
    """Lines of indented or console blocks, continued lines joined, and commands quoted in the text."""
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"^(?: {4,}|\$ )(\S.*)$", text.replace("\\\n", " "), re.M)
    quoted = re.findall(r"`((?:metier|python|make|scripts/) ?[^`]*)`", prose(page))
    yield from (command for command in [*shown, *quoted] if "…" not in command.split("#")[0])


def commands_in_code() -> Iterator[tuple[Path, str]]:
    """`metier` commands in docstrings and comments of programs and recipes that people start."""
    for file in sorted([*(ROOT / "examples").rglob("*"), *(ROOT / "benchmarks").rglob("*.py")]):
        if file.suffix in (".py", ".yaml"):
            text = file.read_text(encoding="utf-8")
            text = re.sub(r"\\\\?\n(# )? *", " ", text)  # continued lines, in a string with or without r
            yield from ((file, command) for command in re.findall(r"^(?:# ?)? *(metier [a-z]+ .*)$", text, re.M))


def module_exists(dotted: str) -> bool:
    """Whether `metier.a.b` is a module, or a name in the longest module before it."""
    names = dotted.split(".")[1:]
    for end in range(len(names), 0, -1):
        place = ROOT.joinpath(*names[:end])
        if place.is_dir() or place.with_suffix(".py").is_file():
            break
    else:
        return False
    here = import_module(".".join(["metier", *names[:end]])) if end < len(names) else None
    for name in names[end:]:
        if not hasattr(here, name):
            return False
        here = getattr(here, name)
    return True


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} does not exist"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@each_page
def test_every_path_in_code_quotes_exists(page: Path) -> None:
    quoted = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)(?::\w+)?`", prose(page))
    assert [path for path in quoted if not (ROOT / path).exists()] == []


@each_page
def test_every_module_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page == CHANGELOG:  # its tables say what was and what is: the last cell is
        text = "\n".join(line.rstrip("| ").rpartition("|")[2] for line in text.splitlines() if line.startswith("|"))
    quoted = re.findall(r"`(metier(?:\.\w+)+)`", text)
    for module, names in re.findall(r"^ *from (metier(?:\.\w+)+) import (.+)$", text, re.M):
        quoted += [f"{module}.{name.strip()}" for name in names.strip("()").split(",") if name.strip()]
    assert [name for name in quoted if not module_exists(name)] == []


@each_page
def test_every_command_named_is_one(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for command in commands(page):
        try:
            words = shlex.split(command, comments=True)
        except ValueError:
            words = []
        if words[:1] == ["make"]:
            assert set(word for word in words[1:] if word.isalpha()) <= set(targets), command
        elif words[:1] == ["metier"]:
            check_options(words[1:], command)
        files = [word.split(":")[0] for word in words if re.match(r"(examples|benchmarks|scripts)/", word)]
        assert [file for file in files if not (ROOT / file).exists()] == [], command


def test_every_command_in_programs_and_recipes_is_one() -> None:
    found = 0
    for file, command in commands_in_code():
        if "…" not in command and "make each" not in command:
            words = shlex.split(command, comments=True)
            check_options(words[1:], f"{file.name}: {command}")
            found += 1
    assert found > 10


def test_the_drawing_has_the_layers_that_are_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    drawn = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    for contract in project["tool"]["importlinter"]["contracts"]:
        room = contract.get("containers", [""])[0].removeprefix("metier.")
        if room in ("specializers", "router", "runtime"):
            part = drawn.partition(f"\n{room}/")[2].partition("▼")[0].splitlines()[1:]
            layers = [line.strip("│ ").split() for line in part if line.strip("│ ")]
            assert layers == [sorted(layer.split(" | ")) for layer in contract["layers"]]


def test_every_folder_has_its_line() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [ROOT / room for room in ("agents", "specializers", "router", "runtime")]
    folders = {file.parent for room in rooms for file in room.rglob("__init__.py")}
    folders -= {folder for folder in folders if folder.parent.name == "methods"}  # a method's own: one line for all
    named = {str(folder.relative_to(ROOT)) for folder in folders}
    assert sorted(folder for folder in named if f"`{folder}/`" not in page) == []


@cache
def command_line() -> Any:
    """The verbs, as click commands."""
    return typer.main.get_command(app)


def check_options(words: list[str], command: str) -> None:
    """A command line names verbs and options that there are."""
    here = command_line()
    while words and words[0] in getattr(here, "commands", {}):
        here, words = here.commands[words[0]], words[1:]
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    if hasattr(here, "commands"):
        assert not words or words[0].startswith("-"), f"{command}: no such verb"
    known = {option for parameter in here.params for option in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help"}
    names = [after for option, after in zip(words, words[1:], strict=False) if option == "--variants"]
    assert not any("/" in name for name in names), f"{command}: --variants takes names, --shelf folders"
    assert given <= known, f"{command}: {', '.join(sorted(given - known))}"


def test_every_page_is_in_the_index() -> None:
    docs = ROOT / "docs"
    linked = {(docs / link.partition("#")[0]).resolve() for link in links(docs / "README.md")}
    linked |= {(docs / "log" / link.partition("#")[0]).resolve() for link in links(docs / "log" / "README.md")}
    missing = [page for page in docs.rglob("*.md") if page.resolve() not in linked and page != docs / "README.md"]
    assert missing == []


def test_the_readme_stays_short() -> None:
    text = README.read_bytes()
    assert len(text) <= README_BYTES
    assert text.count(b"\n") <= README_LINES


def test_every_claim_of_the_log_is_indexed() -> None:
    """Each entry of a month has a line in the index."""
    log = ROOT / "docs" / "log"
    linked = {link for link in links(log / "README.md") if "#" in link}
    for month in log.glob("????-??.md"):
        entries = re.findall(r"^### (.*)$", month.read_text(encoding="utf-8"), re.M)
        wanted = {re.sub(r"[^\w\- ]", "", entry.lower()).replace(" ", "-") for entry in entries}
        assert sorted(entry for entry in wanted if f"{month.name}#{entry}" not in linked) == []
