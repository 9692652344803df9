"""What a report says: sections of tables, figures and notes, before it is a page, Markdown or a terminal's text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from ...specializers.methods.thinking.curves import Saturation, ThinkingPoint
from ...specializers.shelf.variant import Variant
from ..meters.percentiles import percentile
from ..settings.report import ReportSettings
from ..store.store import RunStore
from . import tables
from .comparison import Comparison, compare
from .costs import Cost, WorkflowFigures, by_role, workflow_figures
from .ledger import Ledger, read_ledger
from .probed import Probed, read_probed
from .shown_run import ShownRun, in_order_of_need, shown_run
from .table import NOTHING, Table, count, number, percent
from .thinking_figures import thinking_of

__all__ = ["BatchSection", "Document", "Thought", "Tile", "read_document", "role_costs"]


@dataclass(frozen=True)
class Tile:
    """One figure to begin with: its name, its value, and what it is to be seen against; `verdict` says whether it is
    better or worse than the baseline's, "" where that is not known."""

    name: str
    value: str
    note: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class BatchSection:
    """One batch: what was read of it, its figures, and its tables as (title, note, table); those without data are not
    there. `energy` says what the machine drew, or why that is not known; `runs` are those that are shown in detail."""

    name: str
    ledger: Ledger
    figures: WorkflowFigures
    tables: tuple[tuple[str, str, Table], ...]
    notes: tuple[str, ...]
    energy: str
    state: str
    runs: tuple[ShownRun, ...] = ()


@dataclass(frozen=True)
class Thought:
    """What method `thinking` put on a variant's card: accuracy against budgets, measured and fitted."""

    variant: str
    role: str
    points: tuple[ThinkingPoint, ...]
    curves: Mapping[str, Saturation]

    @classmethod
    def of(cls, variant: Variant) -> Self:
        """Read it from the card; raises VariantError when there is none."""
        points, curves = thinking_of(variant)
        return cls(variant.name, str(variant.card["role"]), tuple(points), curves)

    @property
    def table(self) -> Table:
        """A row for every pair of variant and budget."""
        heads = ("variant", "budget, tokens", "asks", "score", "95 % interval", "tokens thought", "CPU-ms an ask")
        rows = [
            (
                p.variant, count(p.budget_tokens), count(p.asks), f"{p.quality:.3f}",
                f"{p.interval[0]:.2f} to {p.interval[1]:.2f}", number(p.used_tokens), number(p.cpu_ms),
            )
            for p in self.points
        ]  # fmt: skip
        return Table(heads, tuple(rows))


@dataclass(frozen=True)
class Document:
    """A whole report; `texts` says whether what was asked and answered is in it."""

    title: str
    subtitle: str
    tiles: tuple[Tile, ...]
    summary: Table
    comparisons: tuple[tuple[Comparison, Table], ...]
    parts: tuple[BatchSection, ...]
    probed: Probed | None = None
    thought: tuple[Thought, ...] = ()
    texts: bool = True

    def all_tables(self) -> Iterator[Table]:
        """Every table of the report."""
        yield self.summary
        yield from (table for _, table in self.comparisons)
        yield from (table for part in self.parts for _, _, table in part.tables)


def read_document(
    store: RunStore,
    batches: Sequence[str],
    probe: Path | None = None,
    curves: Sequence[Variant] = (),
    runs: ReportSettings | None = None,
) -> Document:
    """Read everything the report of these batches says; the first one is the baseline of comparisons.

    `probe` is a folder of `metier probe`, whose profiles and front are shown too, and `curves` are variants that
    method `thinking` made. `runs` says which runs are read in detail; without it none is.
    Raises: ResumeError for a batch that is not there, ProfileError for a folder that is no probe's, VariantError for a
    variant without thinking curves.
    """
    ledgers = [read_ledger(store, batch) for batch in dict.fromkeys(batches)]
    names = _names(ledgers)
    figures = {name: workflow_figures(ledger) for name, ledger in zip(names, ledgers, strict=True)}
    parts = tuple(
        replace(_part(name, ledger, figures[name]), runs=() if runs is None else _in_detail(store, ledger, runs))
        for name, ledger in zip(names, ledgers, strict=True)
    )
    comparisons = []
    for name, ledger in zip(names[1:], ledgers[1:], strict=True):
        found = compare(ledgers[0], ledger, (names[0], name))
        if found.pairs:
            comparisons.append((found, tables.comparison_table(found)))
    last_compared = bool(comparisons) and comparisons[-1][0].other == names[-1]
    graphs = list(dict.fromkeys(ledger.batch.graph for ledger in ledgers))
    return Document(
        title=", ".join(graphs),
        subtitle=", ".join(ledger.batch.id for ledger in ledgers),
        tiles=_tiles(parts[-1], parts[0] if len(parts) > 1 else None, comparisons[-1][0] if last_compared else None),
        summary=tables.batch_table(figures),
        comparisons=tuple(comparisons),
        parts=parts,
        probed=None if probe is None else read_probed(probe),
        thought=tuple(Thought.of(variant) for variant in curves),
        texts=runs is None or runs.texts,
    )


def _in_detail(store: RunStore, ledger: Ledger, settings: ReportSettings) -> tuple[ShownRun, ...]:
    """The runs of a batch that are shown in detail, those that failed or were not solved first."""
    return tuple(shown_run(store, run.id, settings) for run in in_order_of_need(ledger.runs)[: settings.most_runs])


def _names(ledgers: Sequence[Ledger]) -> list[str]:
    """A short name for each batch: its label, with a number where several have the same."""
    labels = [ledger.batch.label for ledger in ledgers]
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: at + 1].count(label)})"
        for at, label in enumerate(labels)
    ]


def _part(name: str, ledger: Ledger, figures: WorkflowFigures) -> BatchSection:
    made: list[tuple[str, str, Table | None]] = [
        ("Roles", "", tables.role_table(ledger)),
        ("Rounds", "", tables.round_table(ledger)),
        ("Steps", "", tables.step_table(ledger)),
        ("Tools", "", tables.tool_table(ledger)),
        ("Assignment", "What was chosen for each role, and why.", tables.assignment_table(ledger)),
        ("Engines", "What the engines counted themselves.", tables.accounting_table(ledger, figures.total)),
        ("Runs that failed", "", tables.failure_table(ledger)),
    ]
    notes = []
    open_runs = {state: n for state, n in figures.states.items() if state != "finished"}
    if open_runs:
        left = ", ".join(f"{n} {state}" for state, n in open_runs.items())
        notes.append(f"Not every run has ended well: {left}. What follows counts what they had used.")
    if ledger.questions:
        notes.append(f"{ledger.questions} questions wait for a person.")
    if ledger.restarts:
        notes.append(f"Engines were restarted {ledger.restarts} times; what the dead ones were at is counted as lost.")
    computes: dict[str, list[str]] = {}
    for engine, totals in sorted(ledger.totals.items()):
        if "computes" in totals:  # batches of earlier versions lack it
            computes.setdefault(str(totals["computes"]), []).append(engine)
    for how, engines in computes.items():
        notes.append(f"{'Engine' if len(engines) == 1 else 'Each of the engines'} {', '.join(engines)} {how}.")
    if not ledger.asks:
        notes.append("Nothing was asked.")
    shown = tuple((title, note, table) for title, note, table in made if table is not None)
    state = "finished" if not open_runs else "broken off" if open_runs.keys() & {"running", "waiting"} else "incomplete"
    return BatchSection(name, ledger, figures, shown, tuple(notes), _energy(ledger), state)


def _energy(ledger: Ledger) -> str:
    drawn = ledger.energy
    if drawn is None:
        return "Energy is not shown: this machine did not let its counters be read (RAPL, /sys/class/powercap)."
    return (
        f"The machine drew {number(drawn.joules)} J ({number(drawn.joules / max(drawn.seconds, 1e-9))} W) while it "
        f"ran, all programs together, by {', '.join(drawn.zones)}."
    )


_COMPARED = {"tasks solved": "score", "run p50": "completion", "CPU-s": "CPU time", "tokens": "tokens"}
"""Tile, or what a tile's solved task cost → the figure by which two batches are compared over the same tasks."""


def _tiles(part: BatchSection, baseline: BatchSection | None, found: Comparison | None) -> tuple[Tile, ...]:
    """The figures one looks for first; with several batches the last one's, against the baseline's."""
    verdicts = {} if found is None else {one.name: one.verdict for one in found.differences}
    tiles = []
    for tile in _plain_tiles(part, baseline):
        of = _COMPARED.get(tile.name.removesuffix(" per solved task"), "")
        tiles.append(replace(tile, verdict=verdicts.get(of, "")))
    return tuple(tiles)


def _plain_tiles(part: BatchSection, baseline: BatchSection | None) -> tuple[Tile, ...]:
    f, base = part.figures, None if baseline is None else baseline.figures

    def against(value: str) -> str:
        return "" if baseline is None else f"against {value}"

    tiles = []
    if f.scored:
        solved = f"{base.solved} of {base.scored}" if base else ""
        share = f"{100 * f.solved / f.scored:.0f} %"
        tiles.append(Tile("tasks solved", f"{f.solved} of {f.scored}", against(solved) or share))
    else:
        tiles.append(Tile("runs", count(f.runs), against(count(base.runs) if base else "")))
    if f.completion_s:
        p50, p95 = (percentile(f.completion_s, q) for q in (0.5, 0.95))
        other = number(percentile(base.completion_s, 0.5)) + " s" if base and base.completion_s else NOTHING
        tiles.append(Tile("run p50", f"{number(p50)} s", against(other) or f"p95 {number(p95)} s"))
    if f.over_bound:
        tiles.append(
            Tile("of the critical path", f"{percentile(f.over_bound, 0.5):.2f}×", "median run; 1× is no waiting")
        )
    if f.cost_of_pass:
        for name in ("CPU-s", "tokens", "J"):
            if name in f.cost_of_pass:
                value = f.cost_of_pass[name]
                other = number(base.cost_of_pass[name]) if base and base.cost_of_pass.get(name) is not None else NOTHING
                tiles.append(Tile(f"{name} per solved task", "∞" if value is None else number(value), against(other)))
    else:
        tiles.append(Tile("CPU-s", number(f.total.cpu_s), against(number(base.total.cpu_s) if base else "")))
    cached, prompt = f.total.cached_tokens, f.total.prompt_tokens
    if prompt:
        tiles.append(Tile("prompt tokens cached", percent(cached, prompt), f"of {count(prompt)}"))
    return tuple(tiles)


def role_costs(part: BatchSection) -> dict[str, Cost]:
    """Role and variant → cost, under the names a figure shows."""
    costs = by_role(part.ledger)
    several = len({role for role, _ in costs}) < len(costs)
    return {f"{role} · {variant}" if several else role: cost for (role, variant), cost in costs.items()}
