"""Programs as they ran, read from a run store: which steps waited for which, and what each ask read and wrote."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ...agents.errors import ResumeError, StoreError, TaskSetError
from ..report.critical_path import under_way_s
from ..report.ledger import AskEntry, CallEntry, Ledger, read_ledger
from ..report.step_order import step_order
from ..settings.engine import EngineSettings
from ..settings.session import load_settings
from ..store.commands import command
from ..store.reading import store_for_reading
from ..store.store import RunStore

__all__ = ["Program", "ProgramAsk", "ProgramStep", "RecordedBatch", "prompt_blocks", "read_programs"]

ENDED = ("finished", "failed", "stopped")


@dataclass(frozen=True, slots=True)
class ProgramAsk:
    """What an ask read and wrote, in tokens. `variant` is `base` or a name.

    `blocks` names the beginnings of its prompt, one cache block longer each: two asks of a variant that have one in
    common share the cache up to there.
    """

    role: str
    variant: str
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ProgramStep:
    """One ask of a program, or what took `seconds` beside the engine: a function, or the calls of a reply.

    `after` are the indices of what it waits for.
    """

    path: str
    after: tuple[int, ...] = ()
    ask: ProgramAsk | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Program:
    """One run: its steps, each behind those it waits for. `own` are the blocks that no other program's prompts have."""

    steps: tuple[ProgramStep, ...]
    own: frozenset[int] = frozenset()


@dataclass(frozen=True)
class RecordedBatch:
    """One batch as it ran. `concurrency` is how many runs were under way at most, `handoff_s` what passes between an
    answer and the asks that waited for it; `left_out` runs had not ended. `ledger` has the asks' times, on so many
    `replicas`."""

    programs: tuple[Program, ...]
    concurrency: int
    completion_s: float
    handoff_s: float
    left_out: int
    settings: EngineSettings
    ledger: Ledger
    replicas: int = 1

    @property
    def asks(self) -> int:
        """How many asks its programs have."""
        return sum(step.ask is not None for program in self.programs for step in program.steps)

    @property
    def variants(self) -> dict[str, str]:
        """Role → the variant that most of its asks had."""
        seen: dict[str, Counter[str]] = defaultdict(Counter)
        for program in self.programs:
            for step in program.steps:
                if step.ask is not None:
                    seen[step.ask.role][step.ask.variant] += 1
        return {role: counts.most_common(1)[0][0] for role, counts in seen.items()}


def read_programs(path: Path, batch: str | None = None) -> RecordedBatch:
    """The runs of a batch (its id or its label; the newest where none is named) that have ended.

    Raises: ResumeError when there is no store or no such batch; StoreError for a file that is no store of this version,
    or whose batch is half-written; TaskSetError when nothing was asked, or on several engines that took turns.
    """
    if not path.exists():
        record = f"metier run WORKFLOW.py --tasks test:24 --store {shlex.quote(str(path))}"
        raise ResumeError(f"no run store {path}", expected="the --store of a run", remedy=f"Record one: {record}")
    with store_for_reading(path) as store, store.decoding():
        known = store.batches()
        if not known:
            raise TaskSetError(f"{path} holds no batch", expected="a store that runs were recorded in")
        labelled = {record.label: record.id for record in known}
        ledger = read_ledger(store, known[-1].id if batch is None else labelled.get(batch, batch))
        texts = _prompts(store, ledger)
    return recorded_batch(ledger, texts)


def recorded_batch(ledger: Ledger, texts: Mapping[tuple[str, str, int], str]) -> RecordedBatch:
    """As `read_programs`, from a batch that was read; `texts` has the prompt of every (run, path, attempt)."""
    name, shape = ledger.batch.id, ledger.shape
    if shape is None:
        raise StoreError(
            f"batch {name} does not say which step waits for which",
            expected="one recorded since workflows are kept with their batches",
            remedy="Record it again with this version.",
        )
    ended = {run.id: run for run in ledger.runs if run.state in ENDED and run.started_at and run.finished_at}
    asks = [ask for ask in ledger.asks if ask.run in ended and not ask.lost]
    if ledger.asks and not ended:
        raise StoreError(
            f"batch {name} is half-written: none of its runs has ended",
            expected="runs that finished, failed or were stopped",
            remedy=f"Finish it: {command('resume', name, store=ledger.store)}",
        )
    if not asks:
        raise TaskSetError(f"batch {name} holds no asks", expected="runs that asked an engine something")
    # Servers count no steps for us, and work side by side; so do ranks of one engine.
    counted = [engine.partition("@")[0] for engine, total in ledger.totals.items() if total.get("steps")]
    in_process = {engine.partition("/")[0] for engine in counted}
    if len(in_process) > 1:
        raise TaskSetError(
            f"batch {name} ran on {len(in_process)} engines that take turns: {', '.join(sorted(in_process))}",
            expected="one engine, or replicas of it: a model of several is not made",
            remedy="Simulate a batch whose variants are adapters on one checkpoint.",
        )
    settings = _engine_settings(ledger)
    chars_per_token = sum(len(texts[a.run, a.path, a.attempt]) for a in asks) / sum(a.prompt_tokens for a in asks)
    by_run: dict[str, list[AskEntry]] = defaultdict(list)
    for ask in asks:
        by_run[ask.run].append(ask)
    calls: dict[str, dict[str, list[CallEntry]]] = defaultdict(lambda: defaultdict(list))
    for call in ledger.calls:
        calls[call.run][call.path].append(call)
    programs, waits = [], list[float]()
    for run, entries in by_run.items():
        functions = {s.path: s.finished_at - s.started_at for s in ledger.steps if s.run == run and not s.role}
        order = step_order(shape.body, {*functions, *(entry.path for entry in entries)})
        steps, gaps = _steps(entries, functions, calls[run], order, ended[run].started_at or 0.0)
        waits += gaps
        programs.append(
            [_with_ask(step, e, texts, settings.block_tokens, chars_per_token) if e else step for step, e in steps]
        )
    owners = Counter(block for steps in programs for block in {b for s in steps if s.ask for b in s.ask.blocks})
    return RecordedBatch(
        programs=tuple(
            Program(tuple(steps), frozenset(b for s in steps if s.ask for b in s.ask.blocks if owners[b] == 1))
            for steps in programs
        ),
        concurrency=_most_at_once([(run.started_at or 0.0, run.finished_at or 0.0) for run in ended.values()]),
        completion_s=max(r.finished_at or 0.0 for r in ended.values()) - min(r.started_at or 0 for r in ended.values()),
        handoff_s=max(median(waits), 0.0),
        left_out=len(ledger.runs) - len(ended),
        settings=settings,
        ledger=ledger,
        replicas=len({ask.engine for ask in asks}),
    )


def prompt_blocks(text: str, prompt_tokens: int, block_tokens: int, chars_per_token: float) -> tuple[int, ...]:
    """Names of a prompt's beginnings, one cache block longer each.

    The store has texts and counts of tokens; where a block ends in the text follows from the characters that a token
    of this batch has on average. The last token of a prompt is always computed, so the block it is in never counts.
    """
    length = block_tokens * chars_per_token
    digest, blocks, done = hashlib.blake2b(digest_size=8), [], 0
    for number in range(1, min(int(len(text) / length), (prompt_tokens - 1) // block_tokens) + 1):
        end = int(number * length)
        digest.update(text[done:end].encode())
        blocks.append(int.from_bytes(digest.copy().digest(), "big"))
        done = end
    return tuple(blocks)


def _steps(
    entries: list[AskEntry],
    functions: Mapping[str, float],
    calls: Mapping[str, list[CallEntry]],
    order: Mapping[str, frozenset[str]],
    started_at: float,
) -> tuple[list[tuple[ProgramStep, AskEntry | None]], list[float]]:
    """A run's steps, each behind those it waits for, and what passed between an answer and who waited for it."""
    tries: dict[str, list[AskEntry]] = defaultdict(list)
    for entry in entries:
        tries[entry.path].append(entry)
    last: dict[str, int] = {}
    ended_at: dict[str, float] = {}
    steps: list[tuple[ProgramStep, AskEntry | None]] = []
    gaps = []
    for path, before in order.items():  # as `step_order` found them: those before come first
        after = tuple(sorted(last[name] for name in before))
        ready_at = max((ended_at[name] for name in before), default=started_at)
        if path in functions:
            steps.append((ProgramStep(path, after, seconds=functions[path]), None))
            ended_at[path] = ready_at + functions[path]
        for entry in sorted(tries[path], key=lambda one: one.attempt):
            called_s = under_way_s(call for call in calls.get(path, ()) if ready_at <= call.started_at < entry.asked_at)
            if called_s:
                steps.append((ProgramStep(path, after, seconds=called_s), None))
                after, ready_at = (len(steps) - 1,), ready_at + called_s
            known = entry.queue_s + entry.swap_s + entry.service_s
            gaps.append(entry.answered_at - ready_at - known)
            steps.append((ProgramStep(path, after), entry))
            after, ready_at = (len(steps) - 1,), entry.answered_at
            ended_at[path] = ready_at
        last[path] = len(steps) - 1
    return steps, gaps


def _with_ask(
    step: ProgramStep,
    entry: AskEntry,
    texts: Mapping[tuple[str, str, int], str],
    block_tokens: int,
    chars_per_token: float,
) -> ProgramStep:
    text = texts[entry.run, entry.path, entry.attempt]
    ask = ProgramAsk(
        entry.role,
        entry.variant,
        max(entry.prompt_tokens, 1),
        max(entry.thinking_tokens + entry.answer_tokens, 1),
        prompt_blocks(text, entry.prompt_tokens, block_tokens, chars_per_token),
    )
    return ProgramStep(step.path, step.after, ask)


def _prompts(store: RunStore, ledger: Ledger) -> dict[tuple[str, str, int], str]:
    rows = store.query(
        "SELECT run, path, attempt, messages FROM asks JOIN runs ON runs.id = asks.run WHERE runs.batch = ?",
        ledger.batch.id,
    )
    return {
        (row["run"], row["path"], row["attempt"]): "\n".join(f"{m['role']}\n{m['content']}" for m in messages)
        for row in rows
        if (messages := json.loads(row["messages"])) is not None
    }


def _engine_settings(ledger: Ledger) -> EngineSettings:
    """What its engine was started with, as far as the batch says; the defaults where it was started from Python."""
    options = ledger.batch.options
    file = options.get("settings")
    return load_settings(Path(file) if file and Path(file).exists() else None, options.get("overrides") or {}).engine


def _most_at_once(spans: list[tuple[float, float]]) -> int:
    under_way = most = 0
    for _, change in sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans]):
        under_way += change
        most = max(most, under_way)
    return max(most, 1)
