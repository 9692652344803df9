"""A plain session: `with open_session(…)`, its methods wait, and it is refused where it would hold a loop up."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from metier.agents import Ask, Role, RunInterrupted, ScriptedBackend, SessionError, TaskGraph
from metier.agents.errors import GraphError, SettingsError
from metier.runtime import SyncSession, open_session, run
from metier.runtime.events import Event


class Puzzle(BaseModel):
    text: str


class Answer(BaseModel):
    value: int


graph = TaskGraph("solve", takes=Puzzle, gives=Answer)
graph.step(Role("solver", takes=Puzzle, gives=Answer, instructions="{{ puzzle.text }}"))


def opened(reply: Callable[[Ask], Any] = lambda ask: Answer(value=4), **more: Any) -> Any:
    return open_session(backend=ScriptedBackend(default=reply), store=":memory:", **more)


def test_it_runs_maps_streams_reports_and_asks() -> None:
    with opened() as session:
        assert isinstance(session, SyncSession)
        assert session.run(graph, Puzzle(text="2 + 2")) == Answer(value=4)
        results = session.map(graph, [Puzzle(text=str(n)) for n in range(3)], concurrency=2)
        assert [result.output for result in results] == [Answer(value=4)] * 3
        with session.stream(graph, Puzzle(text="2 + 2")) as events:
            kinds = [event.kind for event in events]
        assert kinds[0] == "run_started" and kinds[-1] == "run_finished" and "text" in kinds
        assert "solver" in session.report() and session.batch and session.assignment.roles == {}
        prepared = session.prepare(graph, Puzzle(text="2 + 2"))
        assert session.resume(graph, prepared) == Answer(value=4)


def test_run_opens_and_closes_a_session_of_its_own(tmp_path: Path) -> None:
    seen: list[Event] = []
    backend = ScriptedBackend({"solver": [{"value": 4}]})
    output = run(graph, Puzzle(text="2 + 2"), backend=backend, store=tmp_path / "runs.db", on_event=seen.append)
    assert output == Answer(value=4) and seen[-1].kind == "run_finished"
    assert not [one for one in threading.enumerate() if one.name == "metier session"]


def test_errors_come_as_they_are_and_leave_the_session_usable() -> None:
    answers = iter(["no number", "no number", "no number", "no number", Answer(value=4)])
    asking = TaskGraph("approve", takes=Puzzle, gives=Answer)
    asking.ask_person("approve", takes=Puzzle, gives=Answer, question="Which?")
    with opened(lambda ask: next(answers)) as session:
        with pytest.raises(RunInterrupted, match="approve"):
            session.run(asking, Puzzle(text="2 + 2"))
        with pytest.raises(Exception, match="solver"):
            session.run(graph, Puzzle(text="2 + 2"))
        with pytest.raises(ZeroDivisionError), session.stream(graph, Puzzle(text="2 + 2")):
            raise ZeroDivisionError
    with pytest.raises(GraphError):
        run(TaskGraph("empty", takes=Puzzle, gives=Answer), Puzzle(text="2 + 2"))
    with pytest.raises(SettingsError), open_session(engine="steam"):
        raise AssertionError


def test_it_holds_conversations() -> None:
    helper = Role("helper", takes={"message": str}, gives=str, instructions="Answer the message.")
    backend = ScriptedBackend({"helper": lambda ask: f"that was message {len(ask.messages) // 2}"})
    with open_session(backend=backend, store=":memory:") as session:
        with session.chat(helper) as chat:
            assert [chat.say("Hello."), chat.say("And now?")] == ["that was message 1", "that was message 2"]
            assert [turn.said for turn in chat.turns] == ["Hello.", "And now?"] and chat.unfinished is None
        with session.chat(helper, resume=chat.id) as again:
            assert again.say("Still there?") == "that was message 3"


OF_THE_LOOP = {"emit", "route", "store", "take_answers"}
"""What a plain session has not: parts that the server is made of, and the store, which is used on the loop alone."""


def test_it_has_what_a_session_has() -> None:
    with opened() as session:
        inside = {name for name in dir(session._inside) if not name.startswith("_")}
        assert inside - {name for name in dir(session) if not name.startswith("_")} == OF_THE_LOOP
        heard: list[str] = []
        session.start_engines()
        session.listen(lambda event: heard.append(event.kind))
        session.run(graph, Puzzle(text="2 + 2"))
        assert heard[-1] == "run_finished" and session.engine_totals() == {}


def test_threads_share_it() -> None:
    together = threading.Barrier(4, timeout=30)

    def one(session: SyncSession) -> Any:
        together.wait()
        return session.run(graph, Puzzle(text="2 + 2"))

    with opened() as session, ThreadPoolExecutor(4) as threads:
        assert [*threads.map(one, [session] * 4)] == [Answer(value=4)] * 4


def test_a_function_step_may_use_it() -> None:
    outer = TaskGraph("outer", takes=Puzzle, gives=Answer)

    def ask_inner(puzzle: Puzzle) -> Answer:
        answer = session.run(graph, puzzle)
        assert isinstance(answer, Answer)
        return answer

    outer.step(ask_inner)
    with opened() as session:
        assert session.run(outer, Puzzle(text="2 + 2")) == Answer(value=4)


class Held:
    """A script that waits at its first ask for ever, and says that it began and that it was stopped."""

    def __init__(self) -> None:
        self.began, self.stopped = threading.Event(), threading.Event()

    async def __call__(self, ask: Ask) -> Answer:
        if not self.began.is_set():
            self.began.set()
            try:
                await anyio.sleep_forever()
            finally:
                self.stopped.set()
        return Answer(value=4)


@contextmanager
def ctrl_c_when(began: threading.Event) -> Iterator[None]:
    """Press Ctrl-C once something has begun, and see that the block ends by it."""
    main = threading.get_ident()

    def press() -> None:
        began.wait(30)
        signal.pthread_kill(main, signal.SIGINT)

    presses = threading.Thread(target=press)
    presses.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    presses.join()


def test_ctrl_c_stops_the_run_and_leaves_the_session() -> None:
    held = Held()
    with opened(held) as session:
        with ctrl_c_when(held.began):
            session.run(graph, Puzzle(text="2 + 2"))
        assert held.stopped.is_set()
        assert session.run(graph, Puzzle(text="2 + 2")) == Answer(value=4)


def test_ctrl_c_stops_a_session_that_is_opening() -> None:
    held = Held()

    @asynccontextmanager
    async def waits() -> AsyncIterator[Any]:
        await held(Ask(run_id="", step_path="", role="", messages=()))
        yield None

    with ctrl_c_when(held.began), SyncSession(waits()):
        raise AssertionError
    assert held.stopped.is_set()


def test_closing_it_ends_what_other_threads_wait_for() -> None:
    held = Held()
    errors: list[BaseException] = []

    def work(session: SyncSession) -> None:
        try:
            session.run(graph, Puzzle(text="2 + 2"))
        except BaseException as error:
            errors.append(error)

    with opened(held) as session:
        other = threading.Thread(target=work, args=(session,))
        other.start()
        assert held.began.wait(30)
    other.join(30)
    assert held.stopped.is_set() and isinstance(errors[0], SessionError) and "was closed" in str(errors[0])
    with pytest.raises(SessionError, match="the session is closed"):
        session.run(graph, Puzzle(text="2 + 2"))


def test_one_opening_opens_once_and_is_no_session() -> None:
    opening = opened()
    with pytest.raises(SessionError, match="no `run` before the session is open.*with open_session"):
        opening.run(graph, Puzzle(text="2 + 2"))
    with opening:
        with pytest.raises(SessionError, match="opened before"):
            opening.__enter__()


def test_it_can_be_started_without_a_block() -> None:
    session = opened().start()
    assert session.run(graph, Puzzle(text="2 + 2")) == Answer(value=4)
    session.close()
    session.close()
    with pytest.raises(SessionError, match="the session is closed"):
        session.report()


def test_one_that_was_not_closed_is_closed_at_the_end() -> None:
    code = (
        "from metier.agents import ScriptedBackend\nfrom metier.runtime import open_session\n"
        "class Backend(ScriptedBackend): ...\n"
        "session = open_session(backend=Backend(), store=':memory:').start()\n"
        "import atexit; atexit.register(print, 'ended')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


@pytest.mark.anyio
async def test_inside_a_loop_it_is_refused() -> None:
    with pytest.raises(SessionError, match="async with open_session"), opened():
        raise AssertionError
    with pytest.raises(SessionError, match="async with open_session"):
        run(graph, Puzzle(text="2 + 2"), backend=ScriptedBackend(), store=":memory:")
    session = await anyio.to_thread.run_sync(opened().__enter__)
    try:
        with pytest.raises(SessionError, match="hold up the event loop"):
            session.run(graph, Puzzle(text="2 + 2"))
        answer = await anyio.to_thread.run_sync(session.run, graph, Puzzle(text="2 + 2"))
        assert answer == Answer(value=4)
    finally:
        await anyio.to_thread.run_sync(session.__exit__, None, None, None)


@pytest.mark.anyio
async def test_the_opening_that_was_refused_can_be_entered_as_it_should_be() -> None:
    opening = opened()
    with pytest.raises(SessionError, match="async with"), opening:
        raise AssertionError
    async with opening as session:
        assert await session.run(graph, Puzzle(text="2 + 2")) == Answer(value=4)
    with pytest.raises(SessionError, match="opened before"):
        async with opening:
            raise AssertionError
