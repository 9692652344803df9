"""`metier serve` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import anyio
import typer

from ...agents.errors import ServerError, SettingsError
from ...agents.graphs.workflow_file import WorkflowFile, load_workflow
from ...router.assignment import Assignment, load_assignment
from ...specializers.shelf.bundled_model import DEFAULT_BASE
from ..backends import DEFAULT_ENGINE, SCRIPTED
from ..console import say
from ..events import STARTUP, in_words
from ..opening import open_session
from ..settings.session import load_settings
from ..store.commands import command
from .options import (
    DEFAULT_STORE,
    AssignmentFile,
    Base,
    Engine,
    Sets,
    SettingsFile,
    Shelf,
    Store,
    absolute,
    checked,
    comma_separated,
    names_option,
    overrides,
)
from .run import RunOptions

__all__ = ["add_serve_command"]

DEFAULT_PORT = 8000
EXAMPLE = "metier serve examples/solve_and_check.py --assignment examples/assignment.yaml --shelf examples/variants"


def add_serve_command(app: typer.Typer) -> None:
    """Add `serve` to the command line."""
    app.command(epilog=f"Example: `{EXAMPLE}`")(serve)


def serve(
    workflows: Annotated[list[str], typer.Argument(help="file.py, or file.py:name of its TaskGraph; one or more.")],
    assignment: AssignmentFile = None,
    shelf: Shelf = None,
    variants: Annotated[list[str] | None, names_option("Variants to serve beside the assignment's.")] = None,
    base: Base = DEFAULT_BASE,
    engine: Engine = DEFAULT_ENGINE,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = DEFAULT_PORT,
    store: Store = DEFAULT_STORE,
    settings: SettingsFile = None,
    set: Sets = None,
) -> None:
    """Serve workflows, roles and variants behind OpenAI's protocol, with a page that shows what runs.

    METIER_API_KEY, where it is set, is asked of every client.
    """
    options = checked(
        RunOptions,
        workflow="",
        assignment=None
        if assignment is None
        else load_assignment(assignment).model_dump(mode="json", exclude_defaults=True),
        base=base,
        shelf=[str(folder) for folder in shelf or ()],
        engine=engine,
        settings=None if settings is None else str(settings),
        overrides=overrides(set),
    )
    files = [load_workflow(reference) for reference in workflows]
    references = {file.graph.name: absolute(reference) for file, reference in zip(files, workflows, strict=True)}
    if len(references) < len(files):
        raise SettingsError("two workflows of one name", expected="graphs with different names")
    if engine == SCRIPTED and len({file.path.resolve() for file in files}) > 1:
        # One backend answers for all, and a file's script knows the roles of its own graphs only.
        raise SettingsError(
            "workflows of several files on the scripted engine",
            expected="those of one file",
            remedy="Start a server for each file, or serve them on another engine.",
        )
    try:
        from ..server.serving import loop_options
    except ModuleNotFoundError as error:
        raise ServerError(
            f"`metier serve` needs {error.name}, which is not installed",
            expected="the packages that come with the engine",
            remedy="Install metier[cpu], or fastapi, uvicorn[standard] and prometheus_client.",
        ) from error
    names = comma_separated(variants)
    anyio.run(_serve, options, files, references, names, host, port, store, backend_options=loop_options())


async def _serve(
    options: RunOptions,
    files: list[WorkflowFile],
    references: dict[str, str],
    variants: tuple[str, ...],
    host: str,
    port: int,
    store: Path,
) -> None:
    from ..server.app import make_app
    from ..server.served_models import ServedWorkflow
    from ..server.serving import api_key, listen_on
    from ..server.serving import serve as run_server

    settings = load_settings(Path(options.settings) if options.settings else None, options.overrides)
    key = api_key(host)
    roles = {role for file in files for role in file.graph.roles()}
    assignment = Assignment.model_validate(options.assignment or {})
    assignment.check_roles(roles)
    with listen_on(host, port) as listening:
        say("starting …")
        async with open_session(
            base=options.base,
            assignment=assignment,
            engine=options.engine,
            shelf=options.shelf,
            store=store,
            settings=settings,
            variants=variants,
            other_roles=roles,
            scripted=files[0].scripted,
            on_event=lambda event: say(in_words(event)) if event.kind in STARTUP else None,
        ) as session:

            def run_options(served: ServedWorkflow) -> dict[str, Any]:
                return options.model_copy(update={"workflow": served.reference}).model_dump(mode="json")

            await session.start_engines()
            app = make_app(
                session,
                [ServedWorkflow(file.graph, references[file.graph.name]) for file in files],
                variants=variants,
                key=key,
                run_options=run_options,
            )
            shown = f"[{host}]" if ":" in host else host
            say(f"serving http://{shown}:{listening.getsockname()[1]}/v1")
            await run_server(app, listening, settings.server)
    say(f"stopped; runs that were under way go on with: {command('resume', store=str(store))}")
