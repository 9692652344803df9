"""Runs that climb: after a verifier's no, a reply that does not parse, an unsure answer; and after a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

from metier.agents import AnswerError, Ask, Message, Reply, Role, ScriptedBackend, StepError, TaskGraph
from metier.agents.errors import UnknownVariantError
from metier.router import Assignment, PrioritySettings, Router
from metier.runtime import Event, RunStore, Session, Settings, open_session
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.engines.thinking_asks import ReplyReader
from metier.runtime.runs.run_priority import RemainingPath
from tests.agents.workflow import Answer, Plan, Puzzle, Verdict, planner, solve_and_check, solver, splitter

pytestmark = pytest.mark.anyio


@pytest.fixture
def store() -> Iterator[RunStore]:
    with RunStore(":memory:") as store:
        yield store


def ladder(*causes: str, **more: Any) -> Assignment:
    levels = [{"thinking": 64}, {"thinking": 128}, {"variant": "large", "thinking": 256}]
    return Assignment.model_validate({"roles": {"solver": {"ladder": levels, "climb_on": causes, **more}}})


def levels(backend: ScriptedBackend) -> list[tuple[str | None, int]]:
    return [(a.variant, a.thinking.max_tokens) for a in backend.asks if a.role == "solver" and a.thinking]


def scripted(right_from: int = 9, plan: Callable[[Ask], Plan] = lambda ask: Plan(expression="1+2")) -> ScriptedBackend:
    return ScriptedBackend(
        {
            "planner": plan,
            "solver": lambda ask: Answer(value=ask.round),
            "critic": lambda ask: Verdict(correct=f"# answer\n{right_from}" in ask.messages[1].content),
        }
    )


async def test_a_no_climbs_in_the_next_round_and_says_why(store: RunStore) -> None:
    backend, events = scripted(), list[Event]()
    async with open_session(
        backend=backend, store=store, assignment=ladder("rejected", max_climbs=1), on_event=events.append
    ) as session:
        await session.run(solve_and_check()[0], Puzzle(text="x"))
    assert levels(backend) == [(None, 64), (None, 128), (None, 128)]
    reasons = [r["reason"] for r in store.query("SELECT reason FROM asks WHERE role = 'solver' ORDER BY asked_at")]
    assert reasons[1:] == [
        "round 2: critic said no, level 1 → 2: thinking 64 → 128",
        "round 3: critic said no, stays on level 2: max_climbs is 1",
    ]
    told = [e.data for e in events if e.kind == "ask_finished" and e.role == "solver"]
    assert [(d.get("climbs", 0), d["reason"]) for d in told[1:]] == [(1, reason) for reason in reasons[1:]]


async def test_a_loop_without_a_verifier_never_says_no(store: RunStore) -> None:
    graph = TaskGraph("twice", takes=Puzzle, gives=Answer)
    with graph.loop("again", max_rounds=2):
        plan = graph.step(planner)
        solve = graph.step(solver, after=plan)
    graph.returns(solve)
    backend = scripted()
    async with open_session(backend=backend, store=store, assignment=ladder("rejected")) as session:
        await session.run(graph, Puzzle(text="x"))
    assert levels(backend) == [(None, 64), (None, 64)]


async def test_a_try_that_does_not_parse_climbs_within_the_tries(store: RunStore) -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    graph.step(solver, after=graph.step(planner), retries=3)
    backend = ScriptedBackend({"planner": [Plan(expression="1")], "solver": lambda ask: "no JSON"})
    async with open_session(backend=backend, store=store, assignment=ladder("unparsed")) as session:
        with pytest.raises(AnswerError):
            await session.run(graph, Puzzle(text="x"))
    # The correction ask stays on its level; the last level is the bound.
    small, middle, large = (None, 64), (None, 128), ("large", 256)
    assert levels(backend) == [small, small, middle, middle, large, large, large, large]


class Unsure(ScriptedBackend):
    """Says how probable its answers were, the solver's as given."""

    def __init__(self, logprobs: list[float | None]) -> None:
        super().__init__({"planner": lambda ask: Plan(expression="1"), "solver": lambda ask: Answer(value=1)})
        self.logprobs = logprobs

    async def reply(self, ask: Ask, *, on_text: Callable[[str], None] | None = None) -> Reply:
        reply = await super().reply(ask, on_text=on_text)
        if not ask.confidence:
            return reply
        return reply.model_copy(update={"mean_logprob": self.logprobs.pop(0)})


@pytest.mark.parametrize(
    ("logprobs", "expected"),
    [
        ([-0.5], [(None, 64)]),
        ([None], [(None, 64)]),
        ([-0.6, -0.1], [(None, 64), (None, 128)]),
        ([-0.6, -2.0], [(None, 64), (None, 128), ("large", 256)]),  # the last level's answer counts, however unsure
    ],
)
async def test_an_unsure_answer_is_asked_again_one_level_up(
    store: RunStore, logprobs: list[float | None], expected: list[tuple[str | None, int]]
) -> None:
    graph = TaskGraph("g", takes=Puzzle, gives=Answer)
    graph.step(solver, after=graph.step(planner))
    backend = Unsure(list(logprobs))
    async with open_session(backend=backend, store=store, assignment=ladder("unsure", min_logprob=-0.5)) as session:
        assert await session.run(graph, Puzzle(text="x")) == Answer(value=1)
    assert levels(backend) == expected
    assert not backend.logprobs


async def test_a_resumed_run_takes_the_same_levels(store: RunStore) -> None:
    whole = scripted(right_from=4)
    graph = solve_and_check(max_rounds=4)[0]
    async with open_session(backend=whole, store=store, assignment=ladder("rejected")) as session:
        await session.run(graph, Puzzle(text="x"))

    def fail_in_round_three(ask: Ask) -> Plan:
        if ask.round == 3:
            raise StepError("the machine goes off")
        return Plan(expression="1+2")

    first = scripted(right_from=4, plan=fail_in_round_three)
    async with open_session(backend=first, store=store, assignment=ladder("rejected")) as session:
        with pytest.raises(StepError):
            await session.run(graph, Puzzle(text="x"))
        batch = session.batch
    assert batch is not None
    rest = scripted(right_from=4)
    async with open_session(backend=rest, store=store, assignment=ladder("rejected")) as session:
        assert await session.resume(graph, store.runs(batch)[0].id) == Answer(value=4)
    assert levels(first) + levels(rest) == levels(whole) == [(None, 64), (None, 128), ("large", 256), ("large", 256)]


async def test_a_ladder_to_an_unknown_variant_is_refused_before_anything_runs(tiny_base: Any, tmp_path: Any) -> None:
    settings = Settings(shelf=tmp_path / "shelf")
    with pytest.raises(UnknownVariantError, match="large"):
        async with open_session(
            base=tiny_base, assignment=ladder("rejected"), settings=settings, store=RunStore(":memory:")
        ):
            raise AssertionError("opened")


def test_the_remaining_path_is_the_longest_chain() -> None:
    graph = solve_and_check(max_rounds=3)[0].build()
    path = RemainingPath(graph, {"planner": 1.0, "solver": 10.0, "critic": 100.0}.__getitem__)
    assert path.at("attempt[1]/planner") == 333.0
    assert path.at("attempt[2]/solver") == 110.0 + 111.0
    assert path.at("attempt[3]/critic") == 100.0
    outer = TaskGraph("outer", takes=Puzzle, gives=Answer)
    parts = outer.step(splitter)
    answers = outer.map(solver, over=parts.field("items"))
    outer.step(Role("last", takes={"all": list[Answer]}, gives=Answer), after=answers)
    wide = RemainingPath(outer.build(), lambda role: 1.0)
    assert [wide.at(p) for p in ("splitter", "solver#7", "last")] == [3.0, 2.0, 1.0]


async def test_asks_carry_the_priority_of_their_run(store: RunStore) -> None:
    graph = solve_and_check(max_rounds=2)[0].build()
    asked: dict[str, list[int]] = {}
    for order in ("shortest_first", "first_come"):
        settings = Settings(priority=PrioritySettings(order=order, attained_weight=0.0))  # type: ignore[arg-type]
        backend = scripted()
        await Session(backend, Router(), store, settings).run(graph, Puzzle(text="x"))
        asked[order] = [ask.priority for ask in backend.asks]
    began_ms = asked["shortest_first"][0] - 6000
    assert asked["shortest_first"] == [began_ms + 1000 * left for left in (6, 5, 4, 3, 2, 1)]
    assert asked["first_come"] == [0] * 6


@pytest.mark.engine
async def test_the_engine_takes_up_the_smallest_priority_first(tiny_engine: InProcessEngine) -> None:
    """Eight asks fill the engine (max_running), one of them short: those behind them go through its place in turn."""
    ended: list[int] = []

    async def one(number: int, priority: int, tokens: int) -> None:
        messages = (Message(role="user", content=f"Say {number}."),)
        ask = Ask(
            run_id="r", step_path=str(number), role="x", messages=messages, max_tokens=tokens, priority=priority,
            confidence=True,
        )  # fmt: skip
        reply = await tiny_engine.generate(EngineRequest(ask))
        assert reply.mean_logprob is not None
        assert reply.mean_logprob < 0
        ended.append(priority)

    async with anyio.create_task_group() as tasks:
        for number in range(8):
            tasks.start_soon(one, number, 0, 60 if number else 12)
        for number, priority in enumerate((30, 20, 10), start=8):
            tasks.start_soon(one, number, priority, 4)
    assert [priority for priority in ended if priority] == [10, 20, 30]


def test_the_mean_is_over_the_answer_alone() -> None:
    reader = ReplyReader()
    assert reader.mean_logprob is None
    for piece, total in (("a", -1.0), ("b", -3.0)):
        reader.read(piece, [1])
        reader.note_logprob(total)
    assert reader.mean_logprob == -1.5
    silent = ReplyReader()
    silent.read("a", [1])
    silent.note_logprob(None)
    assert silent.mean_logprob is None
