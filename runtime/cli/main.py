"""The command line: thin verbs over sessions, recipes and reports."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import typer

from ...agents.errors import SettingsError
from ...specializers.shelf.bundled_model import DEFAULT_BASE
from ..backends import DEFAULT_ENGINE
from ..console import say
from ..output_files import can_be_written, can_hold_files, new_folder, writing
from ..settings.session import load_settings
from .assign import add_router_commands
from .bench import add_bench_command
from .chat import add_chat_command
from .ending import end_with
from .new import add_new_command
from .options import (
    Base,
    Engine,
    OtherBase,
    Sets,
    SettingsFile,
    Shelf,
    Store,
    Workflow,
    open_shelf,
    overrides,
)
from .report import add_report_command
from .resume import add_resume_commands
from .run import add_run_command
from .serve import add_serve_command
from .show import add_show_command
from .simulate import add_simulate_command
from .store import add_store_commands

__all__ = ["main"]

DEMO_REPORT = Path("demo-report.md")

app = typer.Typer(
    help="Run a team of specialised agents on one open-weights model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


add_new_command(app)
add_run_command(app)
add_resume_commands(app)
add_chat_command(app)
add_show_command(app)
add_report_command(app)
add_bench_command(app)
add_simulate_command(app)


@app.command(epilog="Example: `metier demo --tasks 24`")
def demo(
    tasks: Annotated[int, typer.Option(min=1, help="How many puzzles.")] = 24,
    skip_base: Annotated[bool, typer.Option(help="Do not run the bare base beside it.")] = False,
    engine: Engine = DEFAULT_ENGINE,
    store: Store = Path("runs/demo.db"),
    report: Annotated[Path, typer.Option(help="Where the report goes.", callback=can_be_written)] = Path(
        "demo-report.md"
    ),
    set: Sets = None,
) -> None:
    """Solve fresh puzzles with three roles on three variants of one small model, and on the bare base beside it."""
    from .demo import run_demo

    anyio.run(run_demo, tasks, skip_base, engine, store, report, load_settings(None, overrides(set)))


@app.command(epilog="Example: `metier make examples/recipes/solver.yaml`")
def make(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    base: Base = DEFAULT_BASE,
    shelf: Shelf = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Where checkpoints of unfinished training are kept.", callback=can_hold_files),
    ] = None,
    settings: SettingsFile = None,
    set: Sets = None,
) -> None:
    """Make a variant from a recipe; run it again after a crash and it goes on where it stopped.

    It goes onto your own shelf: the setting `shelf` (`--set shelf=DIR`, or METIER_SHELF). Parents may lie on others.
    """
    from .make import make_variant

    make_variant(recipe, base, load_settings(settings, overrides(set)), shelf or [], work_dir)


variants_app = typer.Typer(rich_markup_mode="markdown")
app.add_typer(variants_app, name="variants")


@variants_app.callback(
    invoke_without_command=True,
    epilog="Example: `metier variants --shelf examples/variants`, or `metier variants add --help`",
)
def variants(
    context: typer.Context,
    shelf: Shelf = None,
    set: Sets = None,
    verify: Annotated[bool, typer.Option(help="Check every file against its hash.")] = False,
) -> None:
    """List the variants on the shelf: lineage, size, and what was measured; or add one, or export one."""
    if context.invoked_subcommand is None:
        from .make import list_variants

        list_variants(open_shelf(shelf, set), verify)
    elif shelf or set or verify:
        verb = context.invoked_subcommand
        raise SettingsError(f"options before {verb!r}", expected=f"`metier variants {verb} … --shelf …`")


@variants_app.command("add", epilog="Example: `metier variants add downloads/vera-adapter --name solver-vera`")
def variants_add(
    folder: Annotated[Path, typer.Argument(help="Adapter folder in the peft layout, or a variant's folder.")],
    name: Annotated[str, typer.Option(help="Its name on the shelf.")],
    base: Base = DEFAULT_BASE,
    set: Sets = None,
    max_rank: Annotated[int, typer.Option(min=1, max=512, help="Highest rank a converted adapter may get.")] = 64,
    accept_error: Annotated[
        float, typer.Option(min=0.0, help="Loss to accept, as a share of what the adapter changes in the logits.")
    ] = 0.0,
) -> None:
    """Check an adapter from elsewhere and put it on your own shelf.

    LoRA and T-REX are taken as they are. Kinds that peft can express as LoRA (vera, vblora, miss, tinylora, delora,
    unilora, psoft, loha, …) are converted at the smallest exact rank; what a lower rank loses is measured on the
    base, and refused unless accepted. Other kinds are refused with the reason.
    """
    from .exchange import add_variant

    add_variant(folder, name, base, open_shelf(None, set), max_rank, accept_error)


@variants_app.command("merge", epilog="Example: `metier variants merge downloads/dora-adapter --name solver-dora`")
def variants_merge(
    folder: Annotated[Path, typer.Argument(help="Adapter folder in the peft layout.")],
    name: Annotated[str, typer.Option(help="Its name on the shelf.")],
    base: Base = DEFAULT_BASE,
    set: Sets = None,
) -> None:
    """Make a checkpoint of its own of an adapter that engines cannot load beside the base.

    DoRA, whole trained modules, trained tokens and embeddings, biases, PiSSA, OLoRA and LoftQ (on the base they were
    made on), and kinds that multiply weights (IA3, OFT, BOFT, HRA, …). The merged model is compared with the unmerged
    one before it is written. Such a variant needs an engine of its own.
    """
    from .exchange import merge_variant

    merge_variant(folder, name, base, open_shelf(None, set))


@variants_app.command(
    "export",
    epilog="Example: `metier variants export solver shipped/solver`, or `metier variants export mixed-trex shipped/trex"
    " --as lora --recipe examples/recipes/trex.yaml --shelf examples/variants`",
)
def variants_export(
    name: Annotated[str, typer.Argument(help="Name or content id of a variant.")],
    out: Annotated[Path, typer.Argument(help="New folder to write.", callback=new_folder)],
    as_kind: Annotated[
        Literal["lora"] | None,
        typer.Option("--as", help="Freeze a T-REX adapter's gate: one LoRA per cluster of tasks."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="With --as: recipe whose rows set and measure the gates.")] = None,
    traffic: Annotated[Path | None, typer.Option(help="With --as: traffic file, instead of a recipe.")] = None,
    base: Base = DEFAULT_BASE,
    shelf: Shelf = None,
    set: Sets = None,
) -> None:
    """Copy a variant out of the shelf, to ship it; or export T-REX as LoRA, for engines without the plugin."""
    from .exchange import export_variant

    export_variant(name, out, as_kind, base, open_shelf(shelf, set), recipe, traffic)


@variants_app.command("push", epilog="Example: `metier variants push solver ann/solver`")
def variants_push(
    name: Annotated[str, typer.Argument(help="Name or content id of a variant.")],
    repo: Annotated[str, typer.Argument(help="Repository OWNER/NAME of the hub; made if it is not there.")],
    public: Annotated[bool, typer.Option(help="A repository that is made is public.")] = False,
    shelf: Shelf = None,
    set: Sets = None,
) -> None:
    """Send a variant to a repository of Hugging Face's hub: its record and files, and nothing else."""
    from .exchange import push_to_hub

    push_to_hub(name, repo, open_shelf(shelf, set), public)


@variants_app.command("pull", epilog="Example: `metier variants pull ann/solver --name solver-ann`")
def variants_pull(
    repo: Annotated[str, typer.Argument(help="Repository OWNER/NAME of the hub.")],
    name: Annotated[str | None, typer.Option(help="Its name on the shelf, instead of its own.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    max_gib: Annotated[float, typer.Option(min=0.0, help="Most to fetch, in GiB.")] = 20.0,
    base: Base = DEFAULT_BASE,
    set: Sets = None,
) -> None:
    """Fetch a variant, or an adapter in the peft layout, from Hugging Face's hub, and put it on your own shelf.

    It is checked whole like one that is added. Only records and safetensors are fetched, nothing that could be run.
    """
    from .exchange import pull_from_hub

    pull_from_hub(repo, name, base, open_shelf(None, set), revision, max_gib)


@variants_app.command("draw", epilog="Example: `metier variants draw ledger-accountant-thinking curves.svg`")
def variants_draw(
    name: Annotated[str, typer.Argument(help="Name or content id of a variant that method `thinking` made.")],
    out: Annotated[Path, typer.Argument(help="SVG file to write.", callback=can_be_written)],
    shelf: Shelf = None,
    set: Sets = None,
) -> None:
    """Draw a variant's curves: accuracy against thinking, and what each accuracy costs."""
    from .make import draw_variant

    draw_variant(name, out, open_shelf(shelf, set))


add_router_commands(app)
add_serve_command(app)
add_store_commands(app)


@app.command(epilog="Example: `metier doctor`, or `metier doctor --measure`")
def doctor(
    measure: Annotated[
        bool,
        typer.Option(
            help="Try number types and thread counts on the base first; what is fastest is used from then on."
        ),
    ] = False,
    base: OtherBase = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine can do, which parts of the vLLM plugin are active, and what a --base takes."""
    from .doctor import examine
    from .measure import measure_speed

    if measure:
        measure_speed(base or DEFAULT_BASE)
    if not examine(base, as_json=json):
        raise typer.Exit(1)


@app.command(epilog="Example: `metier graph examples/solve_and_check.py --out picture.png`")
def graph(
    workflow: Workflow,
    out: Annotated[
        Path | None,
        typer.Option(help="Draw it here: PNG where Graphviz is, else Mermaid text.", callback=can_be_written),
    ] = None,
) -> None:
    """Draw a workflow: Mermaid text on the terminal, or a picture.

    Also says which roles' replies are held to their type by the grammar of guidance, because xgrammar's cannot.
    """
    from ...agents.graphs.grammars import reply_grammar
    from ...agents.graphs.pictures import to_mermaid, write_picture
    from ...agents.graphs.workflow_file import load_workflow

    built = load_workflow(workflow).graph
    if out is None:
        sys.stdout.write(to_mermaid(built))
    else:
        with writing(out):
            written = write_picture(built, out)
        say(f"wrote {written}")
    for name, role in built.roles().items():
        if reply_grammar(role) == "guidance":
            say(f"role {name!r}: guidance holds its replies to their type, which xgrammar cannot")


def main() -> None:
    """Entry point: errors on purpose are one line, signals stop cleanly, anything else is a traceback."""
    command: Callable[..., Any] = typer.main.get_command(app)
    end_with(lambda: command(prog_name="metier"))
