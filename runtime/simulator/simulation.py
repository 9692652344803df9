"""Programs through replicas on a simulated clock: the driver that keeps so many of them under way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...router.placement.placement import PlacedAsk, ReplicaState
from ...router.priority import PrioritySettings, order_key_s
from ..report.ledger import BASE
from ..slots.announced_uses import AnnouncedUses
from ..slots.slot_table import SlotTable
from .clock import Clock
from .placing import costs_of, make_chooser
from .recorded_programs import Program, ProgramAsk
from .service_model import ServiceModel
from .serving_plan import ServingPlan
from .simulated_engine import EngineBounds, EngineRow, SimulatedEngine
from .simulated_replica import SimulatedReplica

__all__ = ["SimulationResult", "simulate"]


@dataclass
class SimulationResult:
    """What a simulation came to; seconds and tokens. `ask_s` from asked to answered, `program_s` from start to end."""

    completion_s: float = 0.0
    ask_s: list[float] = field(default_factory=list)
    program_s: list[float] = field(default_factory=list)
    loads: int = 0
    evictions: int = 0
    prefetches: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    busy_s: list[float] = field(default_factory=list)
    events: int = 0

    @property
    def loads_per_ask(self) -> float:
        """Adapter loads for each ask."""
        return self.loads / max(len(self.ask_s), 1)

    @property
    def busy(self) -> float:
        """Share of the time in which a replica was stepping, on average."""
        return sum(self.busy_s) / max(len(self.busy_s) * self.completion_s, 1e-12)


def simulate(programs: Sequence[Program], model: ServiceModel, plan: ServingPlan) -> SimulationResult:
    """Run programs through replicas, `plan.concurrency` at a time, in the order given; the same in, the same out.

    `plan.programs` more than there are repeats them: what a repeated program shares with others is shared again, what
    was its own is its own again. Seconds a run takes grow with asks and events, not with steps.
    """
    return _Driver(programs, model, plan).run()


@dataclass(eq=False)
class _Run:
    """One program under way. `waits_for` counts, for each step, those before it that are not done."""

    number: int
    program: Program
    copy: int
    began_s: float
    waits_for: list[int]
    followers: list[list[int]]
    remaining_asks: list[int]
    open_steps: int
    under_way: dict[int, dict[str, int]] = field(default_factory=dict)
    told: int | None = None
    attained_tokens: int = 0
    conversations: set[tuple[int, str]] = field(default_factory=set)


class _Driver:
    def __init__(self, programs: Sequence[Program], model: ServiceModel, plan: ServingPlan) -> None:
        self._programs = programs
        self._model = model
        self._plan = plan
        self._clock = Clock()
        self._outcome = SimulationResult()
        self._count = plan.programs or len(programs)
        self._started = 0
        self._driver_free_s = 0.0
        self._priority = PrioritySettings(order=plan.order)
        self._shapes: dict[int, tuple[list[list[int]], list[int]]] = {}
        asks = [step.ask for program in programs for step in program.steps if step.ask is not None]
        written: dict[str, list[int]] = defaultdict(list)
        for ask in asks:
            written[ask.role].append(ask.output_tokens)
        # What the driver expects an ask to write: it cannot know what it will.
        self._expected = {role: round(sum(tokens) / len(tokens)) for role, tokens in written.items()}
        self._states: list[ReplicaState] = []
        self._adapters: list[Counter[str]] = [Counter() for _ in range(plan.replicas)]
        self._cached: list[dict[str, int]] = [{} for _ in range(plan.replicas)]
        self._replicas = [self._make_replica(number) for number in range(plan.replicas)]
        mean = sum(ask.output_tokens for ask in asks) / max(len(asks), 1)
        running = plan.concurrency / plan.replicas
        costs = costs_of(model, max_running=plan.max_running, running=running, output_tokens=mean)
        self._choose = make_chooser(plan.placement, self._states, costs)

    def run(self) -> SimulationResult:
        for _ in range(min(self._plan.concurrency, self._count)):
            self._start_next()
        self._clock.run()
        outcome = self._outcome
        for replica in self._replicas:
            outcome.loads += replica.loads
            outcome.evictions += replica.evictions
            outcome.prefetches += replica.prefetches
            outcome.steps += replica.engine.steps
            outcome.prompt_tokens += replica.engine.prompt_tokens
            outcome.cached_tokens += replica.engine.cached_tokens
            outcome.busy_s.append(replica.engine.busy_s)
        outcome.events = self._clock.events
        return outcome

    def _make_replica(self, number: int) -> SimulatedReplica:
        plan = self._plan
        announced = AnnouncedUses() if plan.foresight else None
        table = SlotTable(
            plan.adapter_slots,
            pass_limit=plan.pass_asks,
            announced=announced,
            pin_asks=plan.pin_asks,
            prefetch_asks=plan.prefetch_asks,
            sure_asks=plan.foresight_asks,
        )
        bounds = EngineBounds(plan.max_running, plan.max_batch_tokens, plan.block_tokens, plan.kv_tokens)
        in_flight = self._adapters[number]
        self._states.append(ReplicaState(f"{number:05d}", plan.adapter_slots, in_flight, 0, self._cached[number]))
        return SimulatedReplica(
            self._clock,
            SimulatedEngine(self._clock, self._model, bounds),
            table,
            load_s=self._model.load_s,
            evict_s=self._model.evict_s,
            announced=announced,
            on_evicted=lambda adapter: _forget_idle(in_flight, adapter),
        )

    # --- programs -----------------------------------------------------------------------------------------

    def _start_next(self) -> None:
        number = self._started
        if number >= self._count:
            return
        self._started += 1
        which = number % len(self._programs)
        program = self._programs[which]
        if which not in self._shapes:
            self._shapes[which] = _shape(program)
        followers, remaining = self._shapes[which]
        waits_for = [len(step.after) for step in program.steps]
        run = _Run(
            number, program, number // len(self._programs), self._clock.now_s, waits_for, followers, remaining,
            len(program.steps),
        )  # fmt: skip
        for index in [index for index, count in enumerate(waits_for) if not count]:
            self._begin(run, index)

    def _begin(self, run: _Run, index: int) -> None:
        step = run.program.steps[index]
        if step.ask is None:
            self._clock.after(step.seconds, lambda: self._end(run, index))
            return
        start_s = max(self._driver_free_s, self._clock.now_s) + self._plan.driver_ask_s
        self._driver_free_s = start_s
        self._clock.after(start_s - self._clock.now_s + self._model.handoff_s, lambda: self._ask(run, index))

    def _end(self, run: _Run, index: int) -> None:
        run.open_steps -= 1
        for follower in run.followers[index]:
            run.waits_for[follower] -= 1
            if not run.waits_for[follower]:
                self._begin(run, follower)
        if not run.open_steps:
            self._outcome.program_s.append(self._clock.now_s - run.began_s)
            self._outcome.completion_s = self._clock.now_s
            for number, conversation in run.conversations:
                self._cached[number].pop(conversation, None)
            self._announce(run, None)
            self._start_next()

    # --- asks ---------------------------------------------------------------------------------------------

    def _ask(self, run: _Run, index: int) -> None:
        ask = run.program.steps[index].ask
        assert ask is not None
        adapter = self._adapter_of(ask)
        expected = self._expected[ask.role]
        conversation = f"{run.number} {adapter}"
        placed = PlacedAsk(adapter, conversation, ask.prompt_tokens, expected, run.remaining_asks[index] * 1.0)
        number = self._choose(placed) if self._plan.replicas > 1 else 0
        state, replica = self._states[number], self._replicas[number]
        cached = self._cached[number]
        tokens = ask.prompt_tokens - min(cached.get(conversation, 0), ask.prompt_tokens) + expected
        state.outstanding_tokens += tokens
        cached[conversation] = ask.prompt_tokens
        run.conversations.add((number, conversation))
        if adapter is not None:
            self._adapters[number][adapter] += 1
        asked_s = self._clock.now_s

        def done(row: EngineRow) -> None:
            state.outstanding_tokens -= tokens
            if adapter is not None:
                self._adapters[number][adapter] -= 1
            run.attained_tokens += row.prompt_tokens - row.cached_tokens + row.output_tokens
            run.under_way.pop(index, None)
            self._outcome.ask_s.append(self._clock.now_s - asked_s)
            self._end(run, index)  # what follows says itself what comes after it

        row = EngineRow(
            ask.prompt_tokens, ask.output_tokens, adapter, done, _blocks(run, ask), self._order_key(run, index)
        )
        run.under_way[index] = self._upcoming(run, index)
        self._announce(run, number)
        replica.ask(row)

    def _adapter_of(self, ask: ProgramAsk) -> str | None:
        variant = self._plan.variants.get(ask.role, ask.variant)
        return None if variant == BASE else variant

    def _order_key(self, run: _Run, index: int) -> float:
        """Smallest first: the moment it comes, or what serves by shortest remaining path, in seconds of asks."""
        if self._plan.order == "first_come":
            return 0.0  # of equals the first that came
        attained_s = run.attained_tokens / max(sum(self._expected.values()) / max(len(self._expected), 1), 1.0)
        return order_key_s(run.began_s, float(run.remaining_asks[index]), attained_s, self._priority)

    def _upcoming(self, run: _Run, index: int) -> dict[str, int]:
        """Adapter → asks until this run may use it, from a step on; then those that the next run begins with."""
        found: dict[str, int] = {}
        frontier, distance, seen = [index], 0, {index}
        while frontier and distance <= self._plan.foresight_asks:
            following = []
            for at in frontier:
                ask = run.program.steps[at].ask
                adapter = None if ask is None else self._adapter_of(ask)
                if adapter is not None:
                    found.setdefault(adapter, distance)
                for follower in run.followers[at]:
                    if follower not in seen:
                        seen.add(follower)
                        following.append(follower)
            frontier, distance = following, distance + 1
        if self._started < self._count:
            for step in self._programs[self._started % len(self._programs)].steps:
                if step.ask is not None and not step.after and (adapter := self._adapter_of(step.ask)) is not None:
                    found.setdefault(adapter, distance)
        return found

    def _announce(self, run: _Run, number: int | None) -> None:
        """Say what a run may use next where it asks now, and take back what was said elsewhere."""
        if not self._plan.foresight:
            return
        uses: dict[str, int] = {}
        for upcoming in run.under_way.values():
            for adapter, distance in upcoming.items():
                uses[adapter] = min(distance, uses.get(adapter, distance))
        for told in {run.told, number} - {None}:
            assert told is not None
            replica = self._replicas[told]
            assert replica.announced is not None
            replica.announced.announce(str(run.number), uses if told == number else {})
            replica.announcements_changed()
        run.told = number


def _forget_idle(in_flight: Counter[str], adapter: str) -> None:
    """An adapter has left a replica; who waits for it there will have it loaded again."""
    if not in_flight[adapter]:
        del in_flight[adapter]


def _blocks(run: _Run, ask: ProgramAsk) -> tuple[object, ...]:
    own = run.program.own
    return tuple((run.copy, block) if run.copy and block in own else block for block in ask.blocks)


def _shape(program: Program) -> tuple[list[list[int]], list[int]]:
    """Who follows each step, and how many asks the longest chain from it has, its own included."""
    followers: list[list[int]] = [[] for _ in program.steps]
    for index, step in enumerate(program.steps):
        for before in step.after:
            followers[before].append(index)
    remaining = [0] * len(program.steps)
    for index in reversed(range(len(program.steps))):  # those that follow come later
        longest = max((remaining[after] for after in followers[index]), default=0)
        remaining[index] = longest + (program.steps[index].ask is not None)
    return followers, remaining
