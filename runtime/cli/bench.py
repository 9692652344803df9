"""The verb of the command line that puts load on an engine or a server and measures every request."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import anyio
import typer

from ...agents.errors import SettingsError
from ...specializers.shelf.bundled_model import DEFAULT_BASE
from ..backends import DEFAULT_ENGINE
from ..output_files import can_be_written
from .options import Base, Engine, Sets, SettingsFile, Shelf, checked, comma_separated, names_option, overrides

__all__ = ["add_bench_command"]


def add_bench_command(app: typer.Typer) -> None:
    """Add `bench` to the command line."""
    app.command(
        epilog="Example: `metier bench runs/runs.db --concurrency 1,4,16 --cache cold,warm --out bench.jsonl`, or "
        "`metier bench --synthetic 64 --rate 2,4 --engine http://127.0.0.1:8000`"
    )(bench)


def bench(
    trace: Annotated[
        str | None, typer.Argument(help="Run store (.db) or traffic file (.jsonl) whose asks are replayed.")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Which batch of the store; the newest by default.")] = None,
    synthetic: Annotated[int | None, typer.Option(min=1, help="Instead: so many made-up requests.")] = None,
    input_words: Annotated[str, typer.Option(help="Made-up prompts: least-most words of their own.")] = "16-64",
    shared_words: Annotated[int, typer.Option(min=0, help="Made-up prompts: words they share with others.")] = 32,
    output_tokens: Annotated[str, typer.Option(help="Made-up requests: least-most tokens of an answer.")] = "16-48",
    variants: Annotated[
        list[str] | None, names_option("Made-up requests: who takes turns; the base by default.")
    ] = None,
    concurrency: Annotated[
        str, typer.Option(help="Closed loop: so many conversations at a time; comma-separated for a sweep.")
    ] = "",
    rate: Annotated[str, typer.Option(help="Poisson arrivals instead: conversations a second; a sweep too.")] = "",
    cache: Annotated[
        str, typer.Option(help="as-is, cold (nothing cached), warm (asked once before); several are a sweep.")
    ] = "as-is",
    requests: Annotated[int | None, typer.Option(min=1, help="Conversations of each level; all by default.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer to an ask of a traffic file.")] = 64,
    base: Base = DEFAULT_BASE,
    shelf: Shelf = None,
    engine: Engine = DEFAULT_ENGINE,
    seed: Annotated[int, typer.Option(help="Seed of made-up requests and of arrivals.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="JSONL of every request, with AIPerf's field names.", callback=can_be_written)
    ] = None,
    settings: SettingsFile = None,
    set: Sets = None,
) -> None:
    """Replay a trace, or made-up requests, against an engine or a server; time to first token, pauses, throughput, CPU.

    Stopped with Ctrl-C it writes and shows what it has.
    """
    from ..bench.command import BenchOptions, run_bench
    from ..bench.load import LoadLevel
    from ..bench.workload import SyntheticMix

    loads: list[dict[str, Any]] = [{"concurrency": value} for value in comma_separated([concurrency])]
    loads += [{"rate_per_s": value} for value in comma_separated([rate])]
    levels = [
        checked(LoadLevel, cache=state, **load)
        for state in comma_separated([cache])
        for load in loads or [{"concurrency": 4}]
    ]
    made_up = synthetic and checked(
        SyntheticMix,
        requests=synthetic,
        shared_words=shared_words,
        input_words=_range(input_words, "--input-words"),
        output_tokens=_range(output_tokens, "--output-tokens"),
        variants=comma_separated(variants) or ("base",),
        seed=seed,
    )
    options = checked(
        BenchOptions,
        trace=trace,
        batch=batch,
        mix=made_up,
        levels=tuple(levels),
        requests=requests,
        max_tokens=max_tokens,
        base=base,
        engine=engine,
        shelf=tuple(str(folder) for folder in shelf or ()),
        seed=seed,
        settings=None if settings is None else str(settings),
        overrides=overrides(set),
    )
    anyio.run(run_bench, options, out)


def _range(text: str, option: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    try:
        low, high = int(least), int(most or least)
    except ValueError as error:
        raise SettingsError(f"{option} {text!r} cannot be read", expected="least-most, such as 16-64") from error
    if not 0 < low <= high:
        raise SettingsError(f"{option} {text!r} is no range", expected="least-most, both above 0")
    return low, high
