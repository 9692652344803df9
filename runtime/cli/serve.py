"""`metier serve` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import anyio
import typer
from rich.console import Console

from ...agents.errors import ServerError, SettingsError
from ...agents.workflow_file import WorkflowFile, load_workflow
from ...router.assignment import Assignment, load_assignment
from ..opening import open_session
from ..settings.session import load_settings
from .options import overrides
from .run import RunOptions

__all__ = ["add_serve_command"]

DEFAULT_PORT = 8000
EXAMPLE = "metier serve examples/solve_and_check.py --assignment examples/assignment.yaml --variants examples/variants"

out = Console(stderr=True)


def add_serve_command(app: typer.Typer) -> None:
    """Add `serve` to the command line."""
    app.command(epilog=f"Example: `{EXAMPLE}`")(serve)


def serve(
    workflows: Annotated[list[str], typer.Argument(help="file.py, or file.py:name of its TaskGraph; one or more.")],
    assignment: Annotated[Path | None, typer.Option(help="Which variant plays which role (YAML).")] = None,
    variants: Annotated[
        list[Path] | None, typer.Option(help="Folder of variants beside the shelf; may be repeated.")
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="Variant to serve by name beside the assignment's; may be repeated.")
    ] = None,
    base: Annotated[str, typer.Option("--base", help="smollm2-135m, a folder, or a Hugging Face id.")] = "smollm2-135m",
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            "--on",
            help="embedded, supervised, scripted (the file's fake), URL[,URL…] of other servers, fleet, or ray.",
        ),
    ] = "embedded",
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = DEFAULT_PORT,
    store: Annotated[Path, typer.Option("--store", help="SQLite file of runs.")] = Path("runs/runs.db"),
    settings: Annotated[Path | None, typer.Option(help="Settings file (YAML).")] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, such as server.requests_inside=16; may be repeated.")
    ] = None,
) -> None:
    """Serve workflows, roles and variants behind OpenAI's protocol, with a page that shows what runs.

    METIER_API_KEY, where it is set, is asked of every client.
    """
    options = RunOptions(
        workflow="",
        assignment=None
        if assignment is None
        else load_assignment(assignment).model_dump(mode="json", exclude_defaults=True),
        base=base,
        variants=[str(folder.resolve()) for folder in variants or []],
        engine=_engine(engine),
        settings=None if settings is None else str(settings.resolve()),
        overrides=overrides(set),
    )
    files = [load_workflow(reference) for reference in workflows]
    references = {
        file.graph.name: f"{file.path}:{reference.partition(':')[2]}".rstrip(":")
        for file, reference in zip(files, workflows, strict=True)
    }
    if len(references) < len(files):
        raise SettingsError("two workflows of one name", expected="graphs with different names")
    try:
        from ..server.serving import loop_options
    except ModuleNotFoundError as error:
        raise ServerError(
            f"`metier serve` needs {error.name}, which is not installed",
            expected="the packages that come with the engine",
            remedy="Install metier[cpu], or fastapi, uvicorn and prometheus_client.",
        ) from error
    anyio.run(_serve, options, files, references, also or [], host, port, store, backend_options=loop_options())


async def _serve(
    options: RunOptions,
    files: list[WorkflowFile],
    references: dict[str, str],
    also: list[str],
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
        out.print("starting …", markup=False)
        async with open_session(
            base=options.base,
            assignment=assignment,
            backend=files[0].scripted() if options.engine == "scripted" else None,
            engine="embedded" if options.engine == "scripted" else options.engine,
            variants=options.variants,
            store=store,
            settings=settings,
            also=also,
            other_roles=roles,
        ) as session:

            def run_options(served: ServedWorkflow) -> dict[str, Any]:
                return options.model_copy(update={"workflow": served.reference}).model_dump(mode="json")

            app = make_app(
                session,
                [ServedWorkflow(file.graph, references[file.graph.name]) for file in files],
                variants=also,
                key=key,
                run_options=run_options,
            )
            shown = f"[{host}]" if ":" in host else host
            out.print(f"serving http://{shown}:{listening.getsockname()[1]}/v1", markup=False, soft_wrap=True)
            await run_server(app, listening, settings.server)
    out.print("stopped; runs that were under way go on with `metier resume`", markup=False)


def _engine(given: str) -> Any:
    if given not in ("embedded", "supervised", "scripted", "fleet", "ray") and not given.startswith(
        ("http://", "https://")
    ):
        raise SettingsError(f"--engine {given!r}", expected="embedded, supervised, scripted, fleet, ray, or a URL")
    return given
