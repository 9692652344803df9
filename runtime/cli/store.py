"""The verbs of the command line that look after a run store: check it, and save what can be read of a damaged one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..console import say
from ..output_files import can_be_written

__all__ = ["add_store_commands"]

StoreFile = Annotated[Path, typer.Argument(help="SQLite file of runs.")]

store_app = typer.Typer(
    help="Look after a run store.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    epilog="Example: `metier store check runs/runs.db`",
)


def add_store_commands(app: typer.Typer) -> None:
    """Add `store check` and `store recover` to the command line."""
    app.add_typer(store_app, name="store")


@store_app.command("check", epilog="Example: `metier store check runs/runs.db`")
def check(store: StoreFile) -> None:
    """Say what of a store is damaged; the file is only read. Ends with 1 when anything is."""
    from ..store.recovery import check_store

    findings = check_store(store)
    for finding in findings:
        say(finding, style="red")
    if findings:
        say(f"Save what can be read: metier store recover {shlex.quote(str(store))} --out NEW.db")
        raise typer.Exit(1)
    say(f"{store} is whole")


@store_app.command("recover", epilog="Example: `metier store recover runs/runs.db --out runs/saved.db`")
def recover(
    store: StoreFile,
    out: Annotated[Path, typer.Option(help="New file to write; must not be there yet.", callback=can_be_written)],
) -> None:
    """Write every run, step and ask that can be read into a new store; the damaged file stays as it is."""
    from ..store.recovery import recover_store

    counts = recover_store(store, out)
    say(f"wrote {out}: " + ", ".join(f"{count} {table}" for table, count in counts.items() if count))
