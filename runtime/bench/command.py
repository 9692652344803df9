"""What `metier bench` does: applies the levels of load in turn, writes a line for each request, and prints a table."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TextIO

import anyio
from pydantic import Field

from ...agents.backend import Backend, OnText
from ...agents.errors import MetierError, SettingsError
from ...agents.frozen_model import FrozenModel
from ...agents.messages import Ask, Reply
from ...specializers.shelf.bundled_model import DEFAULT_BASE
from ..backends import DEFAULT_ENGINE, SCRIPTED, EngineName
from ..console import StepBar, say, show
from ..opening import open_session
from ..output_files import writing
from ..runs.session import Session
from ..settings.session import load_settings
from ..store.reading import store_for_reading
from .load import LoadLevel, apply_load
from .records import RequestRecord
from .summary import summary_table
from .workload import Conversation, SyntheticMix, from_store, from_traffic, synthetic, variants_of

__all__ = ["BenchOptions", "measure", "read_workload", "run_bench"]


class BenchOptions(FrozenModel):
    """What a benchmark does: one workload, levels of load, and the engine that answers."""

    trace: str | None = None
    """Workload from a run store (.db) or a traffic file (.jsonl)."""

    batch: str | None = None
    """Batch of the run store. None is the newest."""

    mix: SyntheticMix | None = None
    """Workload made up from common words, instead of a trace."""

    levels: tuple[LoadLevel, ...] = Field(min_length=1)
    """Levels of load, one after the other."""

    requests: int | None = Field(default=None, ge=1)
    """Conversations of each level. A longer trace is cut, a shorter one asked again from its start. None is the trace
    as it is."""

    max_tokens: int = Field(default=64, ge=1)
    """Most answer tokens of a request of a traffic file."""

    base: str = DEFAULT_BASE
    """Base model."""

    engine: EngineName = DEFAULT_ENGINE
    """Which engine answers: its name, or a server's URL."""

    shelf: tuple[str, ...] = ()
    """Folders of variants beside the user's own shelf."""

    seed: int = 0
    """Seed of arrivals."""

    settings: str | None = None
    """Settings file."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Single settings over that file, by name."""


def read_workload(options: BenchOptions) -> list[Conversation]:
    """The conversations to ask; raises SettingsError, and what the workload's source raises when it cannot be read."""
    if (options.trace is None) == (options.mix is None):
        raise SettingsError("neither or both of a trace and a synthetic mix", expected="one", remedy="Try --synthetic.")
    if options.mix is not None:
        conversations = synthetic(options.mix)
    else:
        path = Path(options.trace or "")
        if not path.is_file():
            raise SettingsError(f"no trace {path}", expected="a run store (.db) or a traffic file (.jsonl)")
        if path.suffix == ".jsonl":
            conversations = from_traffic(path, options.max_tokens)
        else:
            with store_for_reading(path) as store:
                batches = store.batches()
                if not batches:
                    raise SettingsError(f"no batch in {path}", expected="a store with runs")
                conversations = from_store(store, options.batch or batches[-1].id)
    wanted = options.requests or len(conversations)
    return [conversations[at % len(conversations)] for at in range(wanted)]


async def measure(
    backend: Backend, conversations: Sequence[Conversation], options: BenchOptions, out: Path | None
) -> dict[str, list[RequestRecord]]:
    """Apply every level of load in turn; level → its records, each written to `out` as soon as its request has ended.

    When it is cancelled, it still writes what was measured, prints the table and says which levels are missing.
    """
    levels: dict[str, list[RequestRecord]] = {}
    turns = sum(len(one.asks) for one in conversations)
    finished: list[str] = []
    stopped = False
    file: TextIO | None = None
    if out is not None:
        with writing(out):
            file = out.open("w", encoding="utf-8")
    try:
        for level in options.levels:
            records = levels.setdefault(str(level), [])
            total = turns * (2 if level.cache == "warm" else 1)
            with StepBar(str(level), "requests") as bar:

                def note(
                    record: RequestRecord,
                    records: list[RequestRecord] = records,
                    bar: StepBar = bar,
                    total: int = total,
                ) -> None:
                    records.append(record)
                    bar.show(len(records), total)
                    if file is not None and out is not None:
                        with writing(out):
                            file.write(record.model_dump_json() + "\n")
                            file.flush()

                await apply_load(backend, conversations, level, note, options.seed)
            finished.append(str(level))
    except anyio.get_cancelled_exc_class():
        stopped = True
        raise
    finally:
        if file is not None:
            file.close()
            say(f"wrote {sum(map(len, levels.values()))} requests to {out}")
        show(summary_table(levels))
        if stopped:
            say(_what_is_missing(options, levels, finished, out))
    return levels


async def run_bench(options: BenchOptions, out: Path | None) -> None:
    """Measure, and fail when no request was answered; see `metier bench --help`."""
    if options.engine == SCRIPTED:
        raise SettingsError(
            "--engine scripted answers for a workflow file, and a benchmark has none",
            expected="an engine with a model",
            remedy="Leave --engine out, or name the URL of a server.",
        )
    conversations = read_workload(options)
    async with _opened_backend(options, conversations) as backend:
        levels = await measure(backend, conversations, options, out)
    failed = [record.error for records in levels.values() for record in records if record.error is not None]
    if failed:
        asked = sum(map(len, levels.values()))
        say(f"{len(failed)} of {asked} requests failed; the first: {failed[0].message}")
        if len(failed) == asked:
            raise MetierError(f"no request was answered: {failed[0].type}: {failed[0].message}")


class _Asking:
    """A session's asks outside runs, as a backend."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def reply(self, ask: Ask, *, on_text: OnText | None = None) -> Reply:
        """See `Backend.reply`."""
        return await self._session.ask(ask, on_text=on_text)


@asynccontextmanager
async def _opened_backend(options: BenchOptions, conversations: Sequence[Conversation]) -> AsyncGenerator[Backend]:
    settings = load_settings(Path(options.settings) if options.settings else None, options.overrides)
    async with open_session(
        base=options.base,
        engine=options.engine,
        shelf=options.shelf,
        store=":memory:",
        settings=settings,
        variants=variants_of(conversations),
    ) as session:
        await session.start_engines()  # before the first request is timed
        yield _Asking(session)


def _what_is_missing(
    options: BenchOptions, levels: dict[str, list[RequestRecord]], finished: list[str], out: Path | None
) -> str:
    """The message after a stop: which levels are complete, and how to measure the others."""
    missing = [
        f"{level} ({sum(not record.metadata.was_cancelled for record in levels.get(str(level), []))} requests ended)"
        for level in options.levels
        if str(level) not in finished
    ]
    kept = "in this table only" if out is None else f"in {out}"
    other = "" if out is None else ", and another --out, since this one would be written anew"
    return (
        f"Stopped. Whole, {kept}: {'; '.join(finished) or 'no level'}. Missing: {'; '.join(missing)}.\n"
        f"To go on: the same command with the missing levels alone (--concurrency, --rate, --cache){other}."
    )
