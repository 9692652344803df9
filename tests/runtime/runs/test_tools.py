"""Roles with tools: calls are made, recorded, bounded and told to the model, and a resumed run repeats none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from metier.agents import (
    AnswerError,
    Ask,
    GraphError,
    LimitError,
    Role,
    ScriptedBackend,
    TaskGraph,
    ToolCall,
    ToolCalls,
    tool,
)
from metier.runtime import RunLimits, open_session
from metier.runtime.report.critical_path import critical_path_s, under_way_s
from metier.runtime.report.ledger import read_ledger
from metier.runtime.settings.session import load_settings
from metier.runtime.simulator.recorded_programs import recorded_batch
from tests.agents.workflow import Answer, Puzzle

pytestmark = pytest.mark.anyio


class Puzzles(BaseModel):
    puzzles: list[Puzzle]


def calls(*made: tuple[str, dict[str, Any]]) -> ToolCalls:
    return ToolCalls(tool_calls=tuple(ToolCall(name=name, arguments=arguments) for name, arguments in made))


def graph_of(*tools: Any, gives: Any = Answer, retries: int = 1, **of_role: Any) -> TaskGraph:
    graph = TaskGraph("solve", takes=Puzzle, gives=gives)
    role = Role("solver", takes=Puzzle, gives=gives, instructions="Solve.", tools=tools, **of_role)
    graph.step(role, retries=retries)
    return graph


def told(backend: ScriptedBackend) -> str:
    return backend.asks[-1].messages[-1].content


def add(one: int, other: int) -> int:
    """Adds."""
    return one + other


async def add_later(one: int, other: int) -> int:
    """Adds, in a while."""
    await anyio.lowlevel.checkpoint()
    return one + other


async def solve(backend: ScriptedBackend, graph: TaskGraph, **of_tools: Any) -> Any:
    settings = load_settings(overrides={f"tools.{name}": value for name, value in of_tools.items()})
    async with open_session(backend=backend, store=":memory:", settings=settings) as session:
        return await session.run(graph, Puzzle(text="x"))


async def test_calls_are_made_and_told_until_the_answer_comes() -> None:
    first = calls(("add", {"one": 1, "other": 2}), ("add_later", {"one": 3, "other": 4}))
    backend = ScriptedBackend({"solver": [first, calls(("add", {"one": 3, "other": 7})), Answer(value=10)]})
    async with open_session(backend=backend, store=":memory:") as session:
        assert await session.run(graph_of(add, add_later), Puzzle(text="x")) == Answer(value=10)
        rows = session.store.query("SELECT path, role, tool, state, output, error FROM steps ORDER BY path")
        assert [tuple(row) for row in rows] == [
            ("solver", "solver", "", "done", '{"value":10}', None),
            ("solver/tool[1]", "", "add", "done", '"3"', None),
            ("solver/tool[2]", "", "add_later", "done", '"7"', None),
            ("solver/tool[3]", "", "add", "done", '"10"', None),
        ]
        assert [row.role for row in session.store.traffic()] == ["solver"] * 3
    one, two, three = (ask.messages for ask in backend.asks)
    assert two[: len(one)] == one and three[: len(two)] == two, "messages are only appended"
    assert [m.content for m in three[len(one) :]] == [
        first.model_dump_json(),
        "Results:\n1. add: 3\n2. add_later: 7",
        calls(("add", {"one": 3, "other": 7})).model_dump_json(),
        "Results:\n1. add: 10",
    ]
    assert [ask.attempt for ask in backend.asks] == [0, 1, 2]


async def test_calls_of_one_reply_are_made_at_once() -> None:
    waiting = anyio.Event()

    async def first() -> str:
        await waiting.wait()
        return "after second"

    async def second() -> str:
        waiting.set()
        return "done"

    backend = ScriptedBackend({"solver": [calls(("first", {}), ("second", {})), Answer(value=1)]})
    await solve(backend, graph_of(first, second))
    assert told(backend) == "Results:\n1. first: after second\n2. second: done"


async def test_a_tool_that_is_not_async_does_not_hold_the_loop() -> None:
    import threading

    threads = []

    def where() -> None:
        threads.append(threading.current_thread())

    await solve(ScriptedBackend({"solver": [calls(("where", {})), Answer(value=1)]}), graph_of(where))
    assert threads != [threading.current_thread()]


def fails() -> str:
    raise LookupError("no such row")


def floods() -> str:
    return "x" * 10_000_000


def half_a_pair() -> str:
    return "a\ud800b"


def unwritable() -> Any:
    return object()


def never() -> None:
    raise AssertionError("not called")


async def sleeps() -> str:
    await anyio.sleep_forever()
    return ""


@pytest.mark.parametrize(
    "function, arguments, result",
    [
        (fails, {}, "error: LookupError: no such row"),
        (add, {"one": 1}, "error: arguments do not fit: other: Field required"),
        (add, {"one": 1, "other": 2, "third": 3}, "error: arguments do not fit: third: Extra inputs are not permitted"),
        (floods, {}, "x" * 200 + "… (the first 200 of 10000000 characters)"),
        (half_a_pair, {}, "a\\ud800b"),
        (unwritable, {}, "error: PydanticSerializationError: Unable to serialize unknown type: <class 'object'>"),
        (tool(sleeps, timeout_s=0.01), {}, "error: no result within 0.01 s"),
    ],
)
async def test_what_goes_wrong_is_the_result(function: Any, arguments: dict[str, Any], result: str) -> None:
    name = getattr(function, "name", None) or function.__name__
    backend = ScriptedBackend({"solver": [calls((name, arguments)), Answer(value=1)]})
    assert await solve(backend, graph_of(function), max_result_characters=200) == Answer(value=1)
    assert told(backend) == f"Results:\n1. {name}: {result}"


async def test_a_tool_that_is_not_there_is_named() -> None:
    backend = ScriptedBackend({"solver": [calls(("subtract", {})), Answer(value=1)]})
    await solve(backend, graph_of(add, add_later))
    assert told(backend) == "Results:\n1. subtract: error: no tool 'subtract'; there are add, add_later"


async def test_a_call_that_hangs_in_a_thread_is_given_up() -> None:
    """Its thread is lost until it returns; with none left, later calls time out as well, and runs go on."""
    import threading

    release = threading.Event()

    def hangs() -> str:
        release.wait()
        return ""

    hanging = tool(hangs, timeout_s=0.05)
    backend = ScriptedBackend({"solver": [calls(("hangs", {}), ("hangs", {})), Answer(value=1)]})
    try:
        assert await solve(backend, graph_of(hanging), threads=1) == Answer(value=1)
    finally:
        release.set()
    assert (
        told(backend) == "Results:\n1. hangs: error: no result within 0.05 s\n2. hangs: error: no result within 0.05 s"
    )


async def test_a_role_calls_no_more_than_it_may() -> None:
    made: list[int] = []

    def note(number: int) -> int:
        made.append(number)
        return number

    def always(ask: Ask) -> Any:
        if "No calls are left" in ask.messages[-1].content:
            assert ask.answer_schema == Answer.model_json_schema()
            return Answer(value=len(made))
        assert ask.answer_schema is not None and "anyOf" in ask.answer_schema
        return calls(*(("note", {"number": at}) for at in (1, 2)))

    backend = ScriptedBackend({"solver": always})
    assert await solve(backend, graph_of(note, max_calls=3)) == Answer(value=3)
    assert len(made) == 3 and "2. note: error: not called, at most 3 calls are made" in told(backend)


async def test_a_model_without_grammar_that_calls_on_is_stopped() -> None:
    backend = ScriptedBackend(default=lambda ask: calls(("add", {"one": 1, "other": 2})))
    with pytest.raises(AnswerError, match="is no Answer"):
        await solve(backend, graph_of(add, max_calls=2, retries=0))
    assert len(backend.asks) == 4, "two with calls, one without and its correction"


async def test_free_text_is_answered_as_a_json_string() -> None:
    backend = ScriptedBackend({"solver": [calls(("add", {"one": 1, "other": 2})), '"it is \\"3\\""']})
    assert await solve(backend, graph_of(add, gives=str)) == 'it is "3"'


async def test_a_reply_that_fits_nothing_is_corrected_and_the_calls_go_on() -> None:
    backend = ScriptedBackend({"solver": ["what?", calls(("add", {"one": 1, "other": 2})), "what?", Answer(value=3)]})
    assert await solve(backend, graph_of(add)) == Answer(value=3)
    assert [len(ask.messages) for ask in backend.asks] == [2, 4, 6, 8]


async def test_limits_and_time_outs_count_calls_too() -> None:
    on_and_on = ScriptedBackend(default=lambda ask: calls(("add", {"one": 1, "other": 2})))
    async with open_session(backend=on_and_on, store=":memory:") as session:
        with pytest.raises(LimitError, match="max_tokens=300"):
            await session.run(graph_of(add, max_calls=100), Puzzle(text="x"), limits=RunLimits(max_tokens=300))


async def test_two_tools_of_one_name_from_a_server_are_refused_at_the_run(tmp_path: Path) -> None:
    from tests.runtime.tools.server import server

    with pytest.raises(GraphError, match="two tools named 'upper'"):
        await solve(ScriptedBackend(), graph_of(tool(add, name="upper"), server(tmp_path)))


async def test_items_of_a_map_call_apart() -> None:
    def split(all: Puzzles) -> list[Puzzle]:
        return all.puzzles

    def total(answers: list[Answer]) -> Answer:
        return Answer(value=sum(answer.value for answer in answers))

    def by_turn(ask: Ask) -> Any:
        result = ask.messages[-1].content
        return Answer(value=int(result[-1])) if result.startswith("Results") else calls(("add", {"one": 1, "other": 2}))

    graph = TaskGraph("many", takes=Puzzles, gives=Answer)
    role = Role("solver", takes=Puzzle, gives=Answer, tools=[add])
    graph.step(total, after=graph.map(role, over=graph.step(split)))
    async with open_session(backend=ScriptedBackend({"solver": by_turn}), store=":memory:") as session:
        assert await session.run(graph, Puzzles(puzzles=[Puzzle(text="a"), Puzzle(text="b")])) == Answer(value=6)
        assert session.batch is not None
        paths = session.store.finished_steps(session.store.runs(session.batch)[0].id)
        assert {"solver#0/tool[1]", "solver#1/tool[1]"} <= paths.keys()


# --- what is seen of it -------------------------------------------------------------------------------------------


async def test_report_and_events_show_calls() -> None:
    events: list[Any] = []
    backend = ScriptedBackend(
        {"solver": [calls(("add", {"one": 1, "other": 2}), ("fails", {})), calls(("fails", {})), Answer(value=3)]}
    )
    async with open_session(backend=backend, store=":memory:", on_event=events.append) as session:
        await session.run(graph_of(add, fails), Puzzle(text="x"))
        report = session.report()
    tools = [line for line in report.splitlines() if line.startswith(("| add |", "| fails |"))]
    assert [line.split(" | ")[:4] for line in tools] == [["| fails", "2", "2", "0"], ["| add", "1", "0", "0"]]
    assert "needed round 2" not in report
    seen = [(e.kind, e.step_path, e.data["tool"], "error" in e.data) for e in events if "tool" in e.data]
    assert ("step_started", "solver/tool[1]", "add", False) in seen
    assert ("step_finished", "solver/tool[3]", "fails", True) in seen


async def test_critical_path_and_programs_have_the_time_of_calls() -> None:
    """Calls made at once count once; a simulated run waits for them between its asks."""
    import time

    def nap(seconds: float) -> str:
        time.sleep(seconds)
        return "rested"

    first = calls(("nap", {"seconds": 0.05}), ("nap", {"seconds": 0.05}))
    backend = ScriptedBackend({"solver": [first, Answer(value=1)]})
    async with open_session(backend=backend, store=":memory:") as session:
        await session.run(graph_of(nap), Puzzle(text="x"))
        assert session.batch is not None
        ledger = read_ledger(session.store, session.batch)
        (path_s,) = critical_path_s(ledger).values()
        texts = {(ask.run, ask.path, ask.attempt): "x" * 100 for ask in ledger.asks}
        (program,) = recorded_batch(ledger, texts).programs
    assert path_s == pytest.approx(under_way_s(ledger.calls)) and path_s < sum(call.seconds for call in ledger.calls)
    asked, called, again = program.steps
    assert called.ask is None and called.seconds == pytest.approx(path_s)
    assert called.after == (0,) and again.after == (1,) and asked.ask is not None and again.ask is not None
