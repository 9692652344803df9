"""Simulated programs: conserved, repeatable, right where the right answer is known; and the fit that feeds them."""

from __future__ import annotations

import json
import random
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel

from metier.agents import Ask, MetierError, Reply, Role, TaskGraph, Usage
from metier.agents.errors import ProfileError
from metier.runtime import RunStore, open_session
from metier.runtime.report.ledger import AskEntry, Ledger
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.simulator import RecordedBatch, ServiceModel, ServingPlan, fit_service, read_programs, simulate
from metier.runtime.simulator.clock import Clock
from metier.runtime.simulator.placing import PLACEMENTS
from metier.runtime.simulator.recorded_programs import Program, ProgramAsk, ProgramStep, prompt_blocks
from metier.runtime.simulator.simulated_engine import EngineBounds, EngineRow, SimulatedEngine
from metier.runtime.store.records import BatchRecord
from tests.runtime.cli.test_cli_report import metier

MODEL = ServiceModel(step_s=0.02, prompt_token_s=0.0005, row_s=0.002, adapter_s=0.003, load_s=0.05, handoff_s=0.002)


def chain(*asks: ProgramAsk) -> Program:
    """A program of one ask after the other."""
    return Program(tuple(ProgramStep(str(n), (n - 1,) if n else (), ask) for n, ask in enumerate(asks)))


def ask(variant: str = "base", prompt: int = 20, output: int = 5) -> ProgramAsk:
    return ProgramAsk(variant, variant, prompt, output)


programs = st.lists(
    st.lists(
        st.builds(ask, st.sampled_from(["base", "a", "b", "c"]), st.integers(1, 60), st.integers(1, 8)),
        min_size=1,
        max_size=5,
    ).map(lambda asks: chain(*asks)),
    min_size=1,
    max_size=12,
)


def test_one_program_takes_what_adding_up_says() -> None:
    two = chain(ask(prompt=20, output=5), ask("a", prompt=10, output=3))
    outcome = simulate([two], MODEL, ServingPlan(prefetch_asks=0))
    first = 0.02 + 20 * 0.0005 + 4 * (0.02 + 0.002)
    second = 0.05 + 0.02 + 10 * 0.0005 + 0.003 + 2 * (0.02 + 0.002 + 0.003)
    assert outcome.completion_s == pytest.approx(0.002 + first + 0.002 + second)
    assert outcome.program_s == [outcome.completion_s]
    assert (outcome.loads, outcome.steps) == (1, 8)


def test_an_adapter_that_comes_next_is_fetched_while_nothing_waits_for_it() -> None:
    two = chain(ask(prompt=20, output=5), ask("a", prompt=10, output=3))
    ahead, late = (simulate([two], MODEL, ServingPlan(prefetch_asks=n)) for n in (1, 0))
    assert (ahead.prefetches, ahead.loads, late.prefetches) == (1, 1, 0)
    assert ahead.completion_s == pytest.approx(late.completion_s)  # the load is moved, and holds up the first ask


def test_a_function_takes_its_time_and_parts_of_a_fan_out_run_side_by_side() -> None:
    steps = (
        ProgramStep("read", (), None, 3.0),
        ProgramStep("solve#0", (0,), ask(output=4)),
        ProgramStep("solve#1", (0,), ask(output=4)),
        ProgramStep("join", (1, 2), ask(output=1)),
    )
    model = ServiceModel(step_s=1.0, prompt_token_s=0.0, row_s=0.0)
    assert simulate([Program(steps)], model, ServingPlan()).completion_s == 3.0 + 4.0 + 1.0


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    programs=programs,
    concurrency=st.integers(1, 6),
    replicas=st.integers(1, 3),
    placement=st.sampled_from(PLACEMENTS),
    order=st.sampled_from(["first_come", "shortest_first"]),
    adapter_slots=st.integers(1, 3),
    foresight=st.booleans(),
    max_running=st.integers(1, 4),
)
def test_every_ask_is_answered_once_and_no_token_is_lost(programs: list[Program], **options: object) -> None:
    plan = ServingPlan.model_validate(options)
    outcome = simulate(programs, MODEL, plan)
    asks = [step.ask for program in programs for step in program.steps if step.ask is not None]
    assert len(outcome.ask_s) == len(asks)
    assert len(outcome.program_s) == len(programs)
    assert outcome.prompt_tokens + outcome.cached_tokens == sum(a.prompt_tokens for a in asks)
    assert 0 <= outcome.loads - outcome.evictions <= plan.adapter_slots * plan.replicas
    assert outcome.loads >= len({a.variant for a in asks} - {"base"})
    assert max(outcome.busy_s) <= outcome.completion_s * (1 + 1e-9)
    assert min(outcome.ask_s) > 0 and max(outcome.program_s) <= outcome.completion_s * (1 + 1e-9)
    assert simulate(programs, MODEL, plan) == outcome


@hypothesis_settings(max_examples=60, deadline=None)
@given(programs=programs)
def test_one_at_a_time_the_longest_idle_rule_never_loads_more_with_more_slots(programs: list[Program]) -> None:
    """The stack property of LRU: what fewer slots hold, more slots hold too."""
    loads = [
        simulate(programs, MODEL, ServingPlan(concurrency=1, foresight=False, adapter_slots=slots)).loads
        for slots in (1, 2, 3)
    ]
    assert loads == sorted(loads, reverse=True)
    used = [s.ask.variant for p in programs for s in p.steps if s.ask is not None and s.ask.variant != "base"]
    assert loads[0] == sum(one != before for one, before in zip(used, [None, *used], strict=False))
    assert loads[2] == len(set(used))


def test_two_replicas_halve_the_time_of_programs_that_fill_one() -> None:
    many = [chain(ask(output=40), ask(output=40)) for _ in range(64)]
    one, two = (simulate(many, MODEL, ServingPlan(concurrency=32, replicas=n, placement="round-robin")) for n in (1, 2))
    assert two.completion_s == pytest.approx(one.completion_s / 2, rel=0.02)


def test_repeated_programs_share_again_only_what_they_shared() -> None:
    shared, own = ProgramAsk("base", "base", 100, 4, (1, 2)), ProgramAsk("base", "base", 100, 4, (1, 3))
    recorded = [
        Program((ProgramStep("x", (), shared),), frozenset({2})),
        Program((ProgramStep("x", (), own),), frozenset({3})),
    ]
    outcome = simulate(recorded, MODEL, ServingPlan(concurrency=1, programs=6))
    assert outcome.cached_tokens == 5 * 32
    assert simulate(recorded * 3, MODEL, ServingPlan(concurrency=1)).cached_tokens == 32 + 4 * 64


def test_shortest_first_lets_the_short_program_pass() -> None:
    long, short = chain(*[ask(output=20)] * 6), chain(ask(output=20))
    plans = [ServingPlan(concurrency=4, max_running=1, order=order) for order in ("first_come", "shortest_first")]  # type: ignore[arg-type]
    first, shortest = (simulate([long, long, long, short], MODEL, plan) for plan in plans)
    assert min(shortest.program_s) < min(first.program_s)
    assert shortest.completion_s == pytest.approx(first.completion_s, rel=0.01)  # but for the last hand-over


def test_blocks_of_prompts_are_shared_as_far_as_their_texts_are() -> None:
    def blocks(text: str) -> tuple[int, ...]:
        return prompt_blocks(text, len(text) // 4, 32, 4.0)

    long, other = "a" * 400 + "b" * 400, "a" * 400 + "c" * 400
    assert len(blocks(long)) == 6  # 200 tokens are 6 blocks and a bit
    assert blocks(long)[:3] == blocks(other)[:3] and blocks(long)[3] != blocks(other)[3]
    assert prompt_blocks("a" * 256, 64, 32, 4.0) == blocks("a" * 256)  # the last token's block is computed anyway
    assert len(blocks("a" * 256)) == 1


# --- the fit ------------------------------------------------------------------------------------------------


def served(model: ServiceModel, seed: int, count: int = 120) -> RecordedBatch:
    """A batch as the store would have it after being served by an engine of this model."""
    clock, draw, asks = Clock(), random.Random(seed), list[AskEntry]()
    engine = SimulatedEngine(clock, model, EngineBounds(max_running=8))
    now = 0.0
    for number in range(count):
        now += draw.expovariate(4.0)
        adapter = draw.choice([None, "a", "b"])

        def submit(number: int = number, adapter: str | None = adapter) -> None:
            asked_s = clock.now_s

            def done(row: EngineRow) -> None:
                times = (row.scheduled_at_s - asked_s, row.first_token_at_s - row.scheduled_at_s)
                decode_s = clock.now_s - row.first_token_at_s
                entry = AskEntry(
                    f"run{number}", "x", 0, "solver", adapter or "base", row.prompt_tokens, 0, 0, row.output_tokens,
                    times[0], 0.0, times[1], decode_s, 0.0, 0, 0.0, asked_s, clock.now_s, "base",
                )  # fmt: skip
                asks.append(entry)

            engine.submit(EngineRow(draw.randint(10, 200), draw.randint(2, 30), adapter, done))

        clock.after(now, submit)
    clock.run()
    programs = tuple(chain(ask()) for _ in asks)
    record = BatchRecord("b", "b", "g", "f", "", {}, 0.0)
    ledger = Ledger(":memory:", record, None, (), (), tuple(asks), (), (), 0, {}, None, 0)
    return RecordedBatch(programs, 8, clock.now_s, 0.003, 0, EngineSettings(), ledger)


def test_the_fit_finds_the_costs_that_made_the_times() -> None:
    made = ServiceModel(step_s=0.03, prompt_token_s=0.0005, row_s=0.0015, adapter_s=0.004)
    fitted = fit_service([served(made, seed=1), served(made, seed=2)])
    assert fitted.step_s == pytest.approx(made.step_s, rel=0.02)
    assert fitted.prompt_token_s == pytest.approx(made.prompt_token_s, rel=0.02)
    assert fitted.row_s == pytest.approx(made.row_s, rel=0.05)
    assert fitted.adapter_s == pytest.approx(made.adapter_s, rel=0.05)
    assert 1 <= fitted.fewest_rows < 3 < fitted.most_rows <= 8
    assert fitted.misfit < 0.01
    assert fitted.handoff_s == 0.003


def test_too_few_asks_and_asks_all_served_alike_are_refused() -> None:
    made = ServiceModel(step_s=0.03, prompt_token_s=0.0005, row_s=0.0015)
    with pytest.raises(ProfileError, match="19 asks are too few"):
        fit_service([served(made, seed=1, count=19)])
    batch = served(made, seed=1, count=1)
    alike = tuple(batch.ledger.asks) * 30
    batch = RecordedBatch(batch.programs * 30, 8, 1.0, 0.0, 0, EngineSettings(), batch.ledger)
    object.__setattr__(batch.ledger, "asks", tuple(_at(entry, 100.0 * n) for n, entry in enumerate(alike)))
    with pytest.raises(ProfileError, match="served alike"):
        fit_service([batch])


def _at(entry: AskEntry, later_s: float) -> AskEntry:
    values = {name: getattr(entry, name) for name in AskEntry.__slots__}
    return AskEntry(**{**values, "asked_at": entry.asked_at + later_s})


# --- from a store -------------------------------------------------------------------------------------------


class Brief(BaseModel):
    text: str


class Plan(BaseModel):
    parts: list[str]


class Answer(BaseModel):
    value: int


planner = Role("planner", takes=Brief, gives=Plan)
worker = Role("worker", takes={"part": str}, gives=str)
solver = Role("solver", takes={"brief": Brief, "drafts": list[str]}, gives=Answer)


def count(drafts: list[str]) -> list[str]:
    return [draft.upper() for draft in drafts]


graph = TaskGraph("fan", takes=Brief, gives=Answer)
planned = graph.step(planner)
drafted = graph.map(worker, over=planned.field("parts"))
counted = graph.step(count, inputs={"drafts": drafted})
with graph.loop("attempt", max_rounds=2, after=counted):
    solved = graph.step(solver, inputs={"drafts": counted})
graph.returns(solved)


class TimedBackend:
    """Answers at once, and says it took what a small engine takes; the second round's answer needs a correction."""

    async def reply(self, ask: Ask, *, on_text: object = None) -> Reply:
        words = sum(len(message.content.split()) for message in ask.messages)
        text = {"planner": '{"parts": ["a", "b"]}', "worker": "done", "solver": '{"value": 1}'}[ask.role]
        if ask.round == 2 and ask.attempt == 0:
            text = "no JSON"
        output = 4 + words % 7
        usage = Usage(
            prompt_tokens=words, answer_tokens=output, prefill_s=0.02 + words * 0.001, decode_s=0.03 * (output - 1)
        )
        return Reply(text=text, usage=usage, variant=ask.variant, engine="fake")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run store with one batch of eight runs."""
    import anyio

    path = tmp_path_factory.mktemp("simulated") / "runs.db"

    async def record() -> None:
        with RunStore(path) as runs:
            async with open_session(backend=TimedBackend(), store=runs) as session:  # type: ignore[arg-type]
                briefs = [Brief(text="word " * n) for n in range(8)]
                results = await session.map(graph, briefs, concurrency=4, label="eight")
                assert all(result.error is None for result in results)

    anyio.run(record)
    return path


def test_programs_are_read_with_what_waits_for_what(store: Path) -> None:
    batch = read_programs(store, "eight")
    assert (len(batch.programs), batch.asks, batch.concurrency, batch.left_out) == (8, 8 * 6, 4, 0)
    assert batch.variants == {"planner": "base", "worker": "base", "solver": "base"}
    steps = batch.programs[0].steps
    waits = {f"{step.path}/{n}": [steps[i].path for i in step.after] for n, step in enumerate(steps)}
    assert list(waits.items()) == [
        ("planner/0", []),
        ("worker#0/1", ["planner"]),
        ("worker#1/2", ["planner"]),
        ("count/3", ["worker#0", "worker#1"]),
        ("attempt[1]/solver/4", ["count"]),
        ("attempt[2]/solver/5", ["attempt[1]/solver"]),
        ("attempt[2]/solver/6", ["attempt[2]/solver"]),  # the correction
    ]
    assert steps[3].ask is None and steps[3].seconds >= 0


def test_asks_that_several_servers_answered_are_read_as_replicas(store: Path, tmp_path: Path) -> None:
    assert read_programs(store).replicas == 1
    two = _changed(store, tmp_path / "two.db", "UPDATE asks SET engine = 'http://b base' WHERE rowid % 2")
    assert read_programs(two).replicas == 2


def test_ranks_of_one_engine_are_replicas(store: Path, tmp_path: Path) -> None:
    rows = (f"INSERT INTO engine_totals SELECT id, 'base/{n}@1', '{{\"steps\": 9}}' FROM batches" for n in (0, 1))
    two = _changed(store, tmp_path / "two.db", *rows, "UPDATE asks SET engine = 'base/' || (rowid % 2)")
    assert read_programs(two).replicas == 2


def test_the_command_predicts_and_validates(store: Path) -> None:
    drawn = metier("simulate", str(store), "--concurrency", "1,8", "--replicas", "1,2", "--assign", "worker=fast")
    assert "completion s" in drawn and "median misfit" in drawn and drawn.count("\n") >= 6
    predicted = json.loads(metier("simulate", str(store), "--programs", "80", "--json"))
    (plan,) = predicted["plans"]
    assert plan["asks"] == 480 and plan["concurrency"] == 4 and plan["completion_s"] > 0
    assert predicted["model"]["fitted_asks"] == 48
    again = json.loads(metier("simulate", str(store), "--programs", "80", "--json"))
    assert again == predicted


def test_a_batch_is_compared_with_its_prediction(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    other.write_bytes(store.read_bytes())
    with sqlite3.connect(other) as db:
        db.execute("UPDATE batches SET id = 'other', label = 'twice'")
        db.execute("UPDATE runs SET batch = 'other'")
    drawn = metier("simulate", str(store), "--validate", str(other))
    assert "twice" in drawn and "largest error" in drawn
    (row,) = json.loads(metier("simulate", str(store), "--validate", str(other), "--json"))["validations"]
    assert row["own_programs_s"] == pytest.approx(row["fitted_programs_s"])
    with pytest.raises(MetierError, match="no batch to compare with"):
        metier("simulate", str(store), "--validate", str(store))


def _changed(store: Path, path: Path, *statements: str) -> Path:
    path.write_bytes(store.read_bytes())
    with sqlite3.connect(path) as db:
        for statement in statements:
            db.execute(statement)
    return path


@pytest.mark.parametrize(
    ("statements", "words", "says"),
    [
        (["DELETE FROM asks"], "", "holds no asks"),
        (["DELETE FROM runs", "DELETE FROM batches"], "", "holds no batch"),
        (["UPDATE runs SET state = 'running', finished_at = NULL"], "", "is half-written"),
        (["UPDATE batches SET shape = ''"], "", "does not say which step waits for which"),
        (["PRAGMA user_version = 99"], "", "has schema 99"),
        (["DELETE FROM asks WHERE path != 'planner'"], "", "8 asks are too few"),
        (["UPDATE asks SET messages = '[{'"], "", "cannot be read"),
        (
            ["INSERT INTO engine_totals SELECT id, 'one@1', '{\"steps\": 9}' FROM batches",
             "INSERT INTO engine_totals SELECT id, 'two@1', '{\"steps\": 9}' FROM batches"],
            "", "ran on 2 engines that take turns: one, two",
        ),
        ([], "--batch nobody", "no batch 'nobody'"),
        ([], "--concurrency 0", "concurrency '0'"),
        ([], "--placement best", "placement 'best'"),
        ([], "--assign critic=base", "no role critic"),
        ([], "--assign critic", "--assign 'critic' cannot be read"),
        ([], "--validate x.db --slots 2", "--validate compares batches as they were served"),
        ([], "--validate none.db", "no run store none.db"),
    ],
)  # fmt: skip
def test_mistakes_are_named(store: Path, tmp_path: Path, statements: list[str], words: str, says: str) -> None:
    changed = _changed(store, tmp_path / "runs.db", *statements)
    with pytest.raises(MetierError) as caught:
        metier("simulate", str(changed), *words.split())
    assert says in str(caught.value)


def test_a_store_that_is_none_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(MetierError, match="no run store"):
        metier("simulate", str(tmp_path / "runs.db"))
    (tmp_path / "text.db").write_text("these are no runs, and never were any, whatever the name of the file says")
    with pytest.raises(MetierError, match="cannot be opened"):
        metier("simulate", str(tmp_path / "text.db"))
    assert [path.name for path in tmp_path.iterdir()] == ["text.db"]


def test_help_has_an_example() -> None:
    assert "Example: metier simulate" in metier("simulate", "--help")
