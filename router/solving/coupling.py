"""What an assignment costs as a whole: checkpoints, adapter slots and prompt prefixes are shared by the parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ...agents.errors import ProfileError
from ..probing.profile import Profile
from ..space import Candidate, Choices, Part
from .engine_work import engine_steps
from .serving import Serving

__all__ = [
    "LoneCost",
    "Prediction",
    "Problem",
    "Rejected",
    "ask_seconds",
    "asks_per_load",
    "make_problem",
    "predict",
    "shared",
    "step_cpu_s",
    "swap_share",
]

SMALLEST_RATIO = 1e-3
"""Least quality ratio of a candidate, so that logarithms exist where it solved nothing."""


@dataclass(frozen=True)
class Rejected:
    """A candidate that no choice may use at a part, and why."""

    part: Part
    candidate: Candidate
    why: str


@dataclass(frozen=True)
class Prediction:
    """The prediction for a choice: quality 0 to 1, and amounts a task; `memory_mib` is for all engines, None
    where others serve and it is not known.

    `latency_s` is a task's asks one after the other. `completion_s` is how much later many tasks are done for each
    task more: engines that share a thread take turns, so that all their work adds up. None where it is not known.
    """

    quality: float
    cpu_s: float
    latency_s: float
    tokens: float
    memory_mib: float | None
    swaps: float = 0.0
    completion_s: float | None = None

    @property
    def cost_of_pass(self) -> float:
        """CPU-seconds per solved task, failures counted; infinite where nothing is solved."""
        return self.cpu_s / self.quality if self.quality > 0 else math.inf


@dataclass(frozen=True)
class Problem:
    """Parts, their profiled candidates, and how they are served. `quality` is the incumbent's.

    With `coupled=False` every part pays for itself, as if nothing were shared: its own engine, the prefix hits it
    had when it was measured, no swaps. That is the control, not a way to assign.
    """

    parts: tuple[Part, ...]
    rows: Mapping[Part, Mapping[Candidate, Profile]]
    quality: float
    serving: Serving = Serving()
    coupled: bool = True
    rejected: tuple[Rejected, ...] = ()
    incumbent: Mapping[Part, Candidate] = field(default_factory=dict)
    incumbent_rows: tuple[Profile, ...] = ()

    @property
    def size(self) -> int:
        """How many assignments there are."""
        return math.prod(len(self.rows[part]) for part in self.parts)

    @property
    def memory_known(self) -> bool:
        """Whether what is served here takes memory that is known."""
        return all(row.footprint.memory_known for rows in self.rows.values() for row in rows.values())

    @cached_property
    def written_tokens(self) -> float:
        """Tokens that a task's asks write in all, with the incumbent."""
        return math.fsum(row.written_tokens for row in self.incumbent_rows)

    @cached_property
    def elsewhere_scale(self) -> float:
        """Factor on the CPU-seconds of the incumbent's asks: batches will differ from those of the probe."""
        rows = self.incumbent_rows
        measured = math.fsum(row.cpu_s for row in rows)
        if measured <= 0 or not all(row.token_cost.step_cpu_s > 0 for row in rows):
            return 1.0
        tokens = math.fsum(_token_cpu_s(row, row.prompt_tokens - row.cached_tokens) for row in rows)
        return (tokens + step_cpu_s(self, rows)) / measured

    @cached_property
    def lone(self) -> Mapping[tuple[Part, Candidate], LoneCost]:
        """What each candidate costs at each part when nothing is shared."""
        return {
            (part, candidate): _lone_cost(self, row)
            for part in self.parts
            for candidate, row in self.rows[part].items()
        }


@dataclass(frozen=True)
class LoneCost:
    """One candidate at one part, before anything is shared: every prompt token computed, no swap, no step of an engine
    whose steps are counted apart."""

    log_ratio: float
    cpu_s: float
    seconds: float
    tokens: float


def make_problem(
    profiles: Sequence[Profile],
    parts: Sequence[Part],
    *,
    serving: Serving | None = None,
    candidates: Sequence[Candidate] | None = None,
    coupled: bool = True,
) -> Problem:
    """The problem that profiles pose; candidates that were dropped or cannot be served are left out, with the reason.

    Raises: ProfileError when a part, or a pair of part and one of `candidates`, has no profile, when nothing is left
    for a part, or when the incumbent solved nothing.
    """
    serving = serving or Serving()
    rows: dict[Part, dict[Candidate, Profile]] = {part: {} for part in parts}
    rejected: list[Rejected] = []
    incumbent = _incumbent(profiles, parts)
    never_asked = {part for part in parts if all(p.asks == 0 for p in profiles if p.part == part)}
    for profile in profiles:
        part, candidate = profile.part, profile.candidate
        if part not in rows:
            continue
        if candidates is not None and candidate not in candidates:
            rejected.append(Rejected(part, candidate, "not among the candidates asked for"))
        elif profile.dropped:
            rejected.append(Rejected(part, candidate, f"dropped by the probe: {profile.dropped}"))
        elif profile.footprint.adapter_rank > serving.slot_rank:
            why = f"its rank {profile.footprint.adapter_rank} does not fit slots of slot_rank={serving.slot_rank}"
            rejected.append(Rejected(part, candidate, why))
        elif part in never_asked and candidate != incumbent.get(part, candidate):
            rejected.append(Rejected(part, candidate, "no run of the probe reached this part: the incumbent keeps it"))
        else:
            rows[part][candidate] = profile
    _check_pairs(profiles, parts, candidates, rows, rejected)
    measured = [p for p in profiles if incumbent.get(p.part) == p.candidate] or list(profiles)
    widest = max(measured, key=lambda p: p.n)
    quality = widest.quality - widest.gain
    if quality <= 0:
        raise ProfileError(
            "the incumbent of these profiles solved nothing",
            expected="one that solves something: what replacing one part is worth cannot be told otherwise",
            remedy="Probe again without --incumbent, or with a better one.",
        )
    own = tuple(p for p in profiles if incumbent.get(p.part) == p.candidate)
    return Problem(tuple(parts), rows, quality, serving, coupled, tuple(rejected), incumbent, own)


def predict(problem: Problem, choices: Choices) -> Prediction:
    """The prediction for a choice.

    Quality is the incumbent's, times the ratio that replacing each part alone has shown: parts that work one after the
    other multiply. Interactions beyond that are not predicted; the check on held-out tasks measures them.
    """
    lone = [problem.lone[part, choices[part]] for part in problem.parts]
    rows = [problem.rows[part][choices[part]] for part in problem.parts]
    quality = min(problem.quality * math.exp(math.fsum(cost.log_ratio for cost in lone)), 1.0)
    cpu_s = math.fsum(cost.cpu_s for cost in lone)
    latency_s = math.fsum(cost.seconds for cost in lone)
    tokens = math.fsum(cost.tokens for cost in lone)
    swaps = 0.0
    if problem.coupled:
        for row in rows:
            saved = max([row.shared_tokens.get("", 0.0), *(shared(row, other) for other in rows)])
            cpu_s -= saved * row.token_cost.prefill_cpu_s
            latency_s -= saved * row.token_cost.prefill_s
        waits, swaps = _swaps(problem, rows)
        cpu_s += swaps * problem.serving.swap_cpu_s
        latency_s += waits * problem.serving.swap_s
        cpu_s += step_cpu_s(problem, rows)
    busy = problem.serving.busy_s_per_cpu_s
    return Prediction(
        quality,
        max(cpu_s, 0.0),
        max(latency_s, 0.0),
        max(tokens, 0.0),
        _memory(problem, rows),
        swaps,
        None if busy is None else max(cpu_s, 0.0) * busy,
    )


def ask_seconds(problem: Problem, choices: Choices) -> dict[str, float]:
    """How many seconds an ask of each role takes under a choice, as it was measured; roles never asked are left out."""
    asks: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for part in problem.parts:
        row = problem.rows[part][choices[part]]
        asks[part.role] = asks.get(part.role, 0.0) + row.asks
        seconds[part.role] = seconds.get(part.role, 0.0) + row.seconds
    return {role: seconds[role] / count for role, count in asks.items() if count > 0 and seconds[role] > 0}


def shared(row: Profile, other: Profile) -> float:
    """Prompt tokens a task that a part finds in the prefix cache because another part has the same variant; else 0."""
    if row.footprint.prefix_key != other.footprint.prefix_key:
        return 0.0
    return min(row.shared_tokens.get(str(other.part), 0.0), row.prompt_tokens)


def step_cpu_s(problem: Problem, rows: Sequence[Profile]) -> float:
    """What the steps of all engines cost a task beyond their tokens; every engine that is used pays for its own."""
    written: dict[str, float] = {}
    price: dict[str, float] = {}
    for row in rows:
        written[row.footprint.checkpoint] = written.get(row.footprint.checkpoint, 0.0) + row.written_tokens
        price[row.footprint.checkpoint] = row.token_cost.step_cpu_s
    return math.fsum(
        price[checkpoint] * engine_steps(own, problem.written_tokens, problem.serving.running)
        for checkpoint, own in written.items()
    )


def swap_share(adapters: int, slots: int) -> float:
    """Share of asks that find their adapter not resident, when `adapters` take turns on `slots`.

    Runs in all stages at once ask for each adapter equally often, and any `slots` of them are there: 1 - slots /
    adapters. Foresight does better; a probe with as many adapters says how much.
    """
    return 0.0 if adapters <= slots else 1.0 - slots / adapters


def asks_per_load(adapters: int, running: int) -> float:
    """How many asks share a load: those of `running` runs that wait for the same one of `adapters`."""
    return max(running / adapters, 1.0)


def _swaps(problem: Problem, rows: Sequence[Profile]) -> tuple[float, float]:
    """Asks of a task that wait for an adapter, and loads of a task."""
    adapters: dict[str, set[str]] = {}
    asks: dict[str, float] = {}
    for row in rows:
        if row.footprint.adapter:
            adapters.setdefault(row.footprint.checkpoint, set()).add(row.footprint.adapter)
            asks[row.footprint.checkpoint] = asks.get(row.footprint.checkpoint, 0.0) + row.asks
    serving = problem.serving
    waits = {name: asks[name] * swap_share(len(ids), serving.adapter_slots) for name, ids in adapters.items()}
    loads = (wait / asks_per_load(len(adapters[name]), serving.running) for name, wait in waits.items())
    return math.fsum(waits.values()), math.fsum(loads)


def _memory(problem: Problem, rows: Sequence[Profile]) -> float | None:
    if not all(row.footprint.memory_known for row in rows):
        return None
    each_mib = problem.serving.kv_cache_mib + problem.serving.engine_mib
    if not problem.coupled:
        return problem.serving.process_mib + math.fsum(
            row.footprint.checkpoint_mib + each_mib + (row.footprint.slot_mib if row.footprint.adapter else 0.0)
            for row in rows
        )
    # All variants of a checkpoint have the same footprint of it.
    engines = {row.footprint.checkpoint: row.footprint.checkpoint_mib + each_mib for row in rows}
    slots = {row.footprint.checkpoint: row.footprint.slot_mib for row in rows if row.footprint.adapter}
    return math.fsum([problem.serving.process_mib, *engines.values(), *slots.values()])


def _lone_cost(problem: Problem, row: Profile) -> LoneCost:
    before = row.quality - row.gain
    ratio = row.quality / before if before > 0 else 1.0
    cpu_s, seconds = row.cpu_s, row.seconds
    if problem.coupled:
        seconds += row.cached_tokens * row.token_cost.prefill_s
    if problem.coupled and row.token_cost.step_cpu_s > 0:
        cpu_s = _token_cpu_s(row, row.prompt_tokens)
    elif problem.coupled:
        cpu_s += row.cached_tokens * row.token_cost.prefill_cpu_s - row.swaps * problem.serving.swap_cpu_s
    scale = problem.elsewhere_scale if problem.coupled else 1.0
    return LoneCost(
        math.log(max(ratio, SMALLEST_RATIO)),
        max(cpu_s, 0.0) + row.elsewhere_cpu_s * scale,
        seconds + row.elsewhere_seconds,
        row.tokens + row.elsewhere_tokens,
    )


def _token_cpu_s(row: Profile, computed_tokens: float) -> float:
    """A part's tokens without the steps they were in."""
    return computed_tokens * row.token_cost.prefill_cpu_s + row.written_tokens * row.token_cost.decode_cpu_s


def _check_pairs(
    profiles: Sequence[Profile],
    parts: Sequence[Part],
    candidates: Sequence[Candidate] | None,
    rows: Mapping[Part, Mapping[Candidate, Profile]],
    rejected: Sequence[Rejected],
) -> None:
    for part in parts:
        measured = {profile.candidate for profile in profiles if profile.part == part}
        missing = [str(candidate) for candidate in candidates or () if candidate not in measured]
        if missing or not measured:
            raise ProfileError(
                f"no profile of {', '.join(missing) or 'any candidate'} at {part}",
                expected="one of every candidate at every part",
                remedy="Probe with these variants, and rounds split as they are here.",
            )
        if not rows[part]:
            why = "; ".join(f"{r.candidate}: {r.why}" for r in rejected if r.part == part)
            raise ProfileError(f"no candidate is left for {part} ({why})", expected="one that can be served")


def _incumbent(profiles: Sequence[Profile], parts: Sequence[Part]) -> dict[Part, Candidate]:
    """The incumbent's candidate for each part, read from its text in the rows."""
    text = profiles[0].incumbent if profiles else ""
    named = dict(item.split("=", 1) for item in text.split(", ") if "=" in item)
    found = {part: Candidate.read(named[str(part)]) for part in parts if str(part) in named}
    return found if len(found) == len(parts) else {}
