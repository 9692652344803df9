"""Options that several verbs take, each declared once, and how what was typed is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError

from ...agents.errors import ResumeError, SettingsError
from ...agents.text_files import MOST_SEED, UnreadableTextError, parse_json, shown
from ...specializers.shelf.shelf import Shelf as VariantShelf
from ..backends import engine_help
from ..output_files import can_be_written
from ..settings.session import load_settings, setting_value
from ..store.reading import store_for_reading
from ..store.store import RunStore

__all__ = [
    "DEFAULT_STORE",
    "AnswersAsJson",
    "AnswersFile",
    "AsJson",
    "AssignmentFile",
    "Base",
    "Concurrency",
    "Engine",
    "MaxSeconds",
    "MaxTokens",
    "OtherBase",
    "OtherEngine",
    "ReportFile",
    "Seed",
    "Sets",
    "SettingsFile",
    "Shelf",
    "Store",
    "Tasks",
    "TrafficFile",
    "Workflow",
    "absolute",
    "checked",
    "comma_separated",
    "names_option",
    "open_shelf",
    "open_store",
    "overrides",
    "read_json",
    "stored_runs",
]

DEFAULT_STORE = Path("runs/runs.db")

Workflow = Annotated[str, typer.Argument(help="file.py, or file.py:name of its TaskGraph.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="split:size[:seed] of the file's tasks, such as test:24.")]
AssignmentFile = Annotated[
    Path | None, typer.Option("--assignment", help="Which variant plays which role (YAML).", resolve_path=True)
]
_BASE = typer.Option("--base", help="Base model: smollm2-135m, a folder, or a Hugging Face id.")
Base = Annotated[str, _BASE]
OtherBase = Annotated[str | None, _BASE]
Shelf = Annotated[
    list[Path] | None,
    typer.Option("--shelf", help="Folder of variants beside your own shelf; may be repeated.", resolve_path=True),
]
_ENGINE = typer.Option("--engine", help=engine_help())
Engine = Annotated[str, _ENGINE]
OtherEngine = Annotated[str | None, _ENGINE]
Concurrency = Annotated[int | None, typer.Option("--concurrency", help="Runs at a time.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=MOST_SEED, help="Seed of sampling.")]
Store = Annotated[Path, typer.Option("--store", help="SQLite file of runs.")]
ReportFile = Annotated[
    Path | None, typer.Option("--report", help="Write the report here as Markdown.", callback=can_be_written)
]
TrafficFile = Annotated[
    Path | None,
    typer.Option("--export-traffic", help="Write what was asked and answered as JSONL.", callback=can_be_written),
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Stop a run that has used this many tokens.")]
MaxSeconds = Annotated[float | None, typer.Option("--max-seconds", help="Stop a run after this many seconds.")]
SettingsFile = Annotated[Path | None, typer.Option("--settings", help="Settings file (YAML).", resolve_path=True)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="A setting, such as engine.kv_cache_mib=1024; may be repeated.")
]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AnswersAsJson = Annotated[
    bool, typer.Option("--json", help="Print the answer as JSON and nothing else; of tasks, a line for each.")
]
AnswersFile = Annotated[
    Path | None,
    typer.Option(
        "--output", help="Write the answer here as JSON, instead of to stdout; of tasks, a line for each.",
        callback=can_be_written,
    ),
]  # fmt: skip


def names_option(what: str) -> Any:
    """The option `--variants`, which names variants in every verb; `what` says what they are named for."""
    return typer.Option("--variants", help=f"{what} Names, comma-separated; may be repeated.")


def comma_separated(given: Sequence[str] | None) -> tuple[str, ...]:
    """What repeated or comma-separated options name, each once, in order."""
    names = (name.strip() for text in given or () for name in text.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


def overrides(pairs: list[str] | None) -> dict[str, Any]:
    """Settings of `--set name=value`; raises SettingsError for what is none."""
    values = {}
    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not sign:
            raise SettingsError(f"--set {shown(pair)}", expected="name=value, such as engine.kv_cache_mib=1024")
        values[name] = setting_value(f"--set {name}", value)
    return values


def open_shelf(folders: Sequence[Path] | None, pairs: list[str] | None) -> VariantShelf:
    """The user's own shelf, as settings and `--set` say where it is, and the folders of `--shelf` beside it."""
    return VariantShelf(load_settings(None, overrides(pairs)).shelf, also=folders or ())


def checked(kind: type[BaseModel], *, options: Mapping[str, str] | None = None, **values: Any) -> Any:
    """A model made of options; `options` says which option a field is where the names differ.

    Raises: SettingsError naming the option that is out of range.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        option = (options or {}).get(field, f"--{field.replace('_', '-')}")
        raise SettingsError(f"{option} {shown(first['input'])}: {first['msg']}", remedy="Correct the value.") from error


def read_json(text: str, option: str) -> Any:
    """What an option holds as JSON; raises SettingsError when it is none."""
    try:
        return parse_json(text)
    except UnreadableTextError as error:
        problem = f"{option} {shown(text)} cannot be read: {error}"
        raise SettingsError(problem, expected="JSON", remedy="Quote it for the shell.") from error


def open_store(store: Path) -> RunStore:
    """A store that is there; raises ResumeError when it is not."""
    _check_there(store)
    return RunStore(store)


def stored_runs(store: Path) -> AbstractContextManager[RunStore]:
    """A store that is only read, from wherever it lies; raises ResumeError when it is not there."""
    _check_there(store)
    return store_for_reading(store)


def _check_there(store: Path) -> None:
    if not store.exists():
        raise ResumeError(f"no run store {store}", expected="the --store of the run", remedy="Name it with --store.")


def absolute(reference: str) -> str:
    """A workflow reference that means the same from any folder."""
    file, colon, name = reference.partition(":")
    return f"{Path(file).resolve()}{colon}{name}"
