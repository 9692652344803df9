"""The full report's content: sections of tables, figures and notes, before it is a page or Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ...agents.errors import ProfileError
from ...router.probing.profile import read_profiles
from ...specializers.methods.thinking.curves import Saturation, ThinkingPoint
from ...specializers.shelf.variant import Variant
from ..store.store import RunStore
from . import tables
from .comparison import Comparison, compare
from .costs import Cost, WorkflowFigures, by_role, percentile, workflow_figures
from .figures import FrontPoint
from .ledger import Ledger, read_ledger
from .tables import NOTHING, Table, count, number
from .thinking_figures import thinking_of

__all__ = ["BatchPart", "Document", "Probed", "Thought", "Tile", "read_document", "role_costs"]


@dataclass(frozen=True)
class Tile:
    """One figure to begin with: its name, its value, and what it is to be seen against."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class BatchPart:
    """One batch: what was read of it, its figures, and its tables by title; those without data are not there."""

    name: str
    ledger: Ledger
    figures: WorkflowFigures
    tables: tuple[tuple[str, str, Table], ...]
    notes: tuple[str, ...]
    state: str


@dataclass(frozen=True)
class Probed:
    """What `metier probe` and `metier assign` left in a folder."""

    profiles: Table
    front: tuple[FrontPoint, ...] = ()
    measured: tuple[FrontPoint, ...] = ()


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
    """A whole report."""

    title: str
    subtitle: str
    tiles: tuple[Tile, ...]
    summary: Table
    comparisons: tuple[tuple[Comparison, Table], ...]
    parts: tuple[BatchPart, ...]
    probed: Probed | None = None
    thought: tuple[Thought, ...] = ()
    reading: tuple[str, ...] = field(default=())


def read_document(
    store: RunStore, batches: Sequence[str], probe: Path | None = None, curves: Sequence[Variant] = ()
) -> Document:
    """Read everything the report of these batches says; the first one is the baseline of comparisons.

    `probe` is a folder of `metier probe`, whose profiles and front are shown too, and `curves` are variants that
    method `thinking` made.
    Raises: ResumeError for a batch that is not there, ProfileError for a folder that is no probe's, VariantError for a
    variant without thinking curves.
    """
    ledgers = [read_ledger(store, batch) for batch in dict.fromkeys(batches)]
    names = _names(ledgers)
    figures = {name: workflow_figures(ledger) for name, ledger in zip(names, ledgers, strict=True)}
    parts = tuple(_part(name, ledger, figures[name]) for name, ledger in zip(names, ledgers, strict=True))
    comparisons = []
    for name, ledger in zip(names[1:], ledgers[1:], strict=True):
        found = compare(ledgers[0], ledger, (names[0], name))
        if found.pairs:
            comparisons.append((found, tables.comparison_table(found)))
    graphs = list(dict.fromkeys(ledger.batch.graph for ledger in ledgers))
    return Document(
        title=", ".join(graphs),
        subtitle=", ".join(ledger.batch.id for ledger in ledgers),
        tiles=_tiles(parts[0] if len(parts) == 1 else parts[-1], parts[0] if len(parts) > 1 else None),
        summary=tables.batch_table(figures),
        comparisons=tuple(comparisons),
        parts=parts,
        probed=None if probe is None else _probed(probe),
        thought=tuple(Thought.of(variant) for variant in curves),
        reading=_READING,
    )


def _names(ledgers: Sequence[Ledger]) -> list[str]:
    """A short name for each batch: its label, with a number where several have the same."""
    labels = [ledger.batch.label for ledger in ledgers]
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: at + 1].count(label)})"
        for at, label in enumerate(labels)
    ]


def _part(name: str, ledger: Ledger, figures: WorkflowFigures) -> BatchPart:
    made: list[tuple[str, str, Table | None]] = [
        ("Roles", "", tables.role_table(ledger)),
        ("Rounds", "", tables.round_table(ledger)),
        ("Steps", "", tables.step_table(ledger)),
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
    if not ledger.asks:
        notes.append("Nothing was asked.")
    if ledger.energy is not None:
        energy = ledger.energy
        notes.append(
            f"The machine drew {number(energy.joules)} J ({number(energy.joules / max(energy.seconds, 1e-9))} W) while "
            f"it ran, all programs together, by {', '.join(energy.zones)}."
        )
    else:
        notes.append("Energy is not shown: this machine did not let its counters be read (RAPL, /sys/class/powercap).")
    shown = tuple((title, note, table) for title, note, table in made if table is not None)
    state = "finished" if not open_runs else "broken off" if open_runs.keys() & {"running", "waiting"} else "incomplete"
    return BatchPart(name, ledger, figures, shown, tuple(notes), state)


def _tiles(part: BatchPart, baseline: BatchPart | None) -> tuple[Tile, ...]:
    """The figures one looks for first; with several batches the last one's, against the baseline's."""
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
        tiles.append(Tile("prompt tokens cached", tables.percent(cached, prompt), f"of {count(prompt)}"))
    return tuple(tiles)


def _probed(folder: Path) -> Probed:
    profiles = read_profiles(folder / "profiles.jsonl")
    rows = []
    for p in profiles:
        low, high = p.gain_interval
        measured_at = (str(p.part), str(p.candidate), count(p.n))
        quality = (f"{p.quality:.3f}", f"{p.gain:+.3f}", f"{low:+.2f} to {high:+.2f}")
        rows.append((*measured_at, *quality, number(p.cpu_s), number(p.seconds), number(p.tokens), p.dropped))
    heads = ("part", "variant", "tasks", "quality", "gain", "95 % interval", "CPU-s", "s", "tokens", "dropped")
    front, measured = _front(folder / "front.json")
    return Probed(Table(heads, tuple(rows), 2), front, measured)


def _front(path: Path) -> tuple[tuple[FrontPoint, ...], tuple[FrontPoint, ...]]:
    """The front `metier assign` predicted and what it measured; nothing where it has not run."""
    if not path.exists():
        return (), ()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        front = tuple(FrontPoint(point["cpu_s"], point["quality"]) for point in data["front"])
        lines = [(line["name"], line["measured"]) for line in data["table"] if line["measured"]]
        measured = tuple(
            FrontPoint(m["cpu_s"], m["quality"], name, (m["quality_interval"][0], m["quality_interval"][1]))
            for name, m in lines
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(
            f"{path} cannot be read: {error!r}",
            expected="what `metier assign` writes",
            remedy="Run `metier assign` again, or remove the file.",
        ) from error
    return front, measured


def role_costs(part: BatchPart) -> dict[str, Cost]:
    """Role and variant → cost, under the names a figure shows."""
    costs = by_role(part.ledger)
    several = len({role for role, _ in costs}) < len(costs)
    return {f"{role} · {variant}" if several else role: cost for (role, variant), cost in costs.items()}


_READING = (
    "Everything here is read from the run store; nothing was measured again.",
    "computed: prompt tokens the engine had to compute; cached: those its prefix cache had. prompt is their sum.",
    "corrected: replies that did not fit their type and were asked again; lost: asks without a reply (cancelled, timed "
    "out, engine died). What both have used is in the sums.",
    "queue: seconds until an engine began with an ask, of it slot: waiting for another adapter to leave; swap: waiting "
    "for an adapter to load. Seconds add up over asks that run side by side, so they exceed the wall time.",
    "CPU-s: the engine's process CPU seconds, each step's split over the asks in it; a swap's go to the ask that "
    "caused it.",
    "solved: share of the runs a row took part in that were solved.",
    "per solved (cost-of-pass): what all attempts have used, failures counted, over the number of tasks solved.",
    "bound: a run's critical path, the longest chain of its steps with what each took in the engine and no waiting.",
    "95 % interval: percentile bootstrap of the mean difference over tasks that both batches ran.",
)
