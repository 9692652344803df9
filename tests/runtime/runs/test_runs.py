"""Runs of workflows on the scripted backend: order, loops, fan-out, failures, limits, streams, on both loops."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest

from metier.agents import (
    AnswerError,
    Ask,
    EngineDeadError,
    GraphError,
    LoopLimitError,
    ScriptedBackend,
    StepError,
    StepTimeoutError,
    Task,
    TaskGraph,
    TaskSet,
)
from metier.router import Assignment, RoleAssignment
from metier.runtime import RunStore, open_session
from tests.agents.workflow import (
    Answer,
    Parts,
    Plan,
    Puzzle,
    Verdict,
    critic,
    planner,
    second_time_right,
    solve_and_check,
    solver,
    splitter,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def store() -> Iterator[RunStore]:
    with RunStore(":memory:") as store:
        yield store


async def test_the_critics_reason_reaches_the_next_round(store: RunStore) -> None:
    backend = second_time_right()
    async with open_session(backend=backend, store=store) as session:
        assert await session.run(solve_and_check()[0], Puzzle(text="x")) == Answer(value=3)
    assert [ask.step_path for ask in backend.asks] == [
        f"attempt[{n}]/{role}" for n in (1, 2) for role in ("planner", "solver", "critic")
    ]
    assert "it is 3" in backend.asks[3].messages[1].content
    assert "verdict" not in backend.asks[0].messages[1].content


async def test_a_loop_that_never_ends_is_bounded(store: RunStore) -> None:
    never = ScriptedBackend(
        {"planner": lambda a: Plan(expression="1"), "solver": lambda a: Answer(value=1)},
        default=lambda a: Verdict(correct=False),
    )
    async with open_session(backend=never, store=store) as session:
        assert await session.run(solve_and_check(max_rounds=2)[0], Puzzle(text="x")) == Answer(value=1)
        assert len(never.asks) == 6
        with pytest.raises(LoopLimitError, match="'attempt' was not satisfied after 2 rounds"):
            await session.run(solve_and_check(max_rounds=2, on_limit="fail")[0], Puzzle(text="x"))


async def test_fan_out_runs_side_by_side_and_joins_in_order(store: RunStore) -> None:
    """All items are asked before any is answered: they run at the same time."""
    everyone = anyio.Event()
    waiting = 0

    async def solve(ask: Ask) -> Answer:
        nonlocal waiting
        waiting += 1
        if waiting == 3:
            everyone.set()
        await everyone.wait()
        return Answer(value=int(ask.step_path.rpartition("#")[2]))

    def total(answers: list[Answer]) -> Answer:
        return Answer(value=sum(10**i * a.value for i, a in enumerate(answers)))

    graph = TaskGraph("sum", takes=Puzzle, gives=Answer)
    parts = graph.step(splitter)
    answers = graph.map(solver, over=parts.field("items"))
    graph.step(total, after=answers)
    plans = Parts(items=[Plan(expression=str(i)) for i in range(3)])
    backend = ScriptedBackend({"splitter": [plans], "solver": solve})
    async with open_session(backend=backend, store=store) as session:
        assert await session.run(graph, Puzzle(text="x")) == Answer(value=210)


async def test_conditions_skip_steps_and_what_needs_them(store: RunStore) -> None:
    def zero(plan: Plan) -> Answer:
        return Answer(value=0)

    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    plan = graph.step(planner)
    solve = graph.step(solver, after=plan, when=lambda s: s[plan].expression)
    check = graph.step(critic, after=solve)
    other = graph.step(zero, after=plan, when=lambda s: not s[plan].expression)
    graph.returns(solve, other)
    for expression, answer, asked in (("1", 1, 3), ("", 0, 1)):
        backend = ScriptedBackend(
            {"planner": [Plan(expression=expression)], "solver": [Answer(value=1)], "critic": [Verdict(correct=True)]}
        )
        async with open_session(backend=backend, store=store) as session:
            assert await session.run(graph, Puzzle(text="x")) == Answer(value=answer)
        assert len(backend.asks) == asked
    assert check.name == "critic"


async def test_sub_graphs_have_paths_of_their_own(store: RunStore) -> None:
    inner, _ = solve_and_check()
    graph = TaskGraph("outer", takes=Puzzle, gives=Verdict)
    graph.step(critic, after=graph.step(inner))
    backend = second_time_right()
    async with open_session(backend=backend, store=store) as session:
        assert (await session.run(graph, Puzzle(text="x"))).correct
    assert backend.asks[0].step_path == "solve-and-check/attempt[1]/planner"
    assert backend.asks[-1].step_path == "critic"


async def test_a_misfit_earns_one_correction(store: RunStore) -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    graph.step(planner, retries=0)
    good = ScriptedBackend({"planner": ["junk", Plan(expression="1")]})
    bad = ScriptedBackend({"planner": lambda ask: "junk"})
    async with open_session(backend=good, store=store) as session:
        assert await session.run(graph, Puzzle(text="x")) == Plan(expression="1")
        assert "That does not fit" in good.asks[1].messages[-1].content
        assert [ask.attempt for ask in good.asks] == [0, 1]
    async with open_session(backend=bad, store=store) as session:
        with pytest.raises(AnswerError, match="reply 'junk' is no Plan"):
            await session.run(graph, Puzzle(text="x"))
    assert len(bad.asks) == 2


async def test_a_reply_that_never_parses_is_retried_within_bounds(store: RunStore) -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    graph.step(planner, retries=2)
    bad = ScriptedBackend({"planner": lambda ask: "junk"})
    async with open_session(backend=bad, store=store) as session:
        with pytest.raises(AnswerError):
            await session.run(graph, Puzzle(text="x"))
    assert [ask.attempt for ask in bad.asks] == list(range(6))


async def test_a_dead_engine_is_retried(store: RunStore) -> None:
    calls = 0

    def dies_once(ask: Ask) -> Plan:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise EngineDeadError("gone")
        return Plan(expression="1")

    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    graph.step(planner)
    async with open_session(backend=ScriptedBackend({"planner": dies_once}), store=store) as session:
        assert await session.run(graph, Puzzle(text="x")) == Plan(expression="1")


async def test_time_outs_are_named(store: RunStore) -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    graph.step(planner, timeout_s=0.01, retries=1)

    async def forever(ask: Ask) -> str:
        await anyio.sleep_forever()
        raise AssertionError

    backend = ScriptedBackend({"planner": forever})
    async with open_session(backend=backend, store=store) as session:
        with pytest.raises(StepTimeoutError, match="'planner' took longer than timeout_s=0.01, 2 times"):
            await session.run(graph, Puzzle(text="x"))
    assert len(backend.asks) == 2


async def test_a_failure_cancels_siblings(store: RunStore) -> None:
    cancelled = anyio.Event()
    parked = anyio.Event()

    async def park(ask: Ask) -> str:
        parked.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    async def fails(puzzle: Puzzle) -> Answer:
        await parked.wait()
        raise ValueError("no luck")

    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    graph.step(planner)
    graph.step(fails, retries=0)
    async with open_session(backend=ScriptedBackend({"planner": park}), store=store) as session:
        with pytest.raises(StepError, match="'fails' raised ValueError: no luck"):
            await session.run(graph, Puzzle(text="x"))
        assert cancelled.is_set()
        assert session.batch is not None
        assert [run.state for run in store.runs(session.batch)] == ["failed"]


async def test_one_failed_run_leaves_the_others(store: RunStore) -> None:
    def solve(ask: Ask) -> object:
        return "junk" if "bad" in ask.messages[1].content else Plan(expression="1")

    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    graph.step(planner)
    async with open_session(backend=ScriptedBackend({"planner": solve}), store=store) as session:
        results = await session.map(graph, [Puzzle(text=t) for t in ("a", "bad", "c")], concurrency=2)
    assert [r.output is None for r in results] == [False, True, False]
    assert isinstance(results[1].error, AnswerError)


async def test_task_sets_are_scored(store: RunStore) -> None:
    tasks = TaskSet(
        "t", "test", tuple(Task(str(i), Puzzle(text=str(i)), key=i % 2) for i in range(4)), lambda t, o: float(t.key)
    )
    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    graph.step(planner)
    async with open_session(backend=ScriptedBackend(default=lambda a: Plan(expression="1")), store=store) as session:
        results = await session.map(graph, tasks)
        assert [r.score for r in results] == [0, 1, 0, 1]
        assert "2 of 4" in session.report()
        rows = list(store.traffic())
        assert sorted(row.score or 0 for row in rows) == [0, 0, 1, 1]
        assert rows[0].role == "planner" and rows[0].reply == '{"expression":"1"}'


async def test_streams_carry_text_and_end(store: RunStore) -> None:
    async with open_session(backend=second_time_right(), store=store) as session:
        async with session.stream(solve_and_check()[0], Puzzle(text="x")) as events:
            seen = [event async for event in events]
    kinds = [event.kind for event in seen]
    assert kinds[0] == "run_started" and kinds[-1] == "run_finished"
    assert kinds.count("step_finished") == 6
    written = [e.data["text"] for e in seen if e.kind == "text" and e.step_path == "attempt[2]/solver"]
    assert "".join(written) == '{"value":3}'


async def test_leaving_a_stream_cancels_the_run(store: RunStore) -> None:
    cancelled = anyio.Event()

    async def forever(ask: Ask) -> str:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    async with open_session(backend=ScriptedBackend(default=forever), store=store) as session:
        async with session.stream(solve_and_check()[0], Puzzle(text="x")) as events:
            async for event in events:
                if event.kind == "step_started":
                    break
        assert cancelled.is_set()


async def test_rounds_may_have_variants_of_their_own(store: RunStore) -> None:
    backend = second_time_right()
    assignment = Assignment(roles={"solver": RoleAssignment(variant="small", rounds={2: "large"})})
    async with open_session(backend=backend, store=store, assignment=assignment) as session:
        await session.run(solve_and_check()[0], Puzzle(text="x"))
    assert [ask.variant for ask in backend.asks if ask.role == "solver"] == ["small", "large"]
    reasons = [row["reason"] for row in store.query("SELECT reason FROM asks WHERE role = 'solver' ORDER BY path")]
    assert reasons == ["assigned to 'solver'", "assigned to 'solver' in round 2"]


async def test_a_function_that_gives_something_else_is_named(store: RunStore) -> None:
    def wrong(puzzle: Puzzle) -> Answer:
        return "four"  # type: ignore[return-value]

    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    graph.step(wrong, retries=0)
    async with open_session(backend=ScriptedBackend(), store=store) as session:
        with pytest.raises(StepError, match="step 'wrong' gave 'four'"):
            await session.run(graph, Puzzle(text="x"))


async def test_a_condition_that_reads_too_early_is_named(store: RunStore) -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Plan)
    other = TaskGraph("g", takes=Puzzle, gives=Answer)
    later = other.step(planner, name="later")
    graph.step(planner, when=lambda s: s[later].expression)
    async with open_session(backend=ScriptedBackend(), store=store) as session:
        with pytest.raises(GraphError, match="reads step 'later', which has not run yet"):
            await session.run(graph, Puzzle(text="x"))
