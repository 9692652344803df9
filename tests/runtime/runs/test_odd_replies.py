"""Whatever a reply, a backend, a function, a condition or a scorer does is an error of that run, and of no other."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from metier.agents import (
    AnswerError,
    Ask,
    AskRejectedError,
    EngineError,
    MetierError,
    Reply,
    Role,
    RunError,
    ScriptedBackend,
    StepError,
    Task,
    TaskGraph,
    TaskSet,
    Usage,
)
from metier.agents.errors import GraphError, TaskSetError
from metier.runtime import RunResult, RunStore, Session, open_session

pytestmark = pytest.mark.anyio


class In(BaseModel):
    number: int


class Out(BaseModel):
    why: str
    share: float = 0.0
    inner: list[Out] = []


FINE = '{"why": "fine"}'
graph = TaskGraph("odd", takes=In, gives=Out)
graph.step(Role("critic", takes=In, gives=Out))
INPUTS = [In(number=at) for at in range(5)]


class Odd:
    """A backend that does one odd thing for input 2, until it is mended."""

    def __init__(self, odd: Callable[[], Any]) -> None:
        self._odd = odd
        self.mended = False

    async def reply(self, ask: Ask, *, on_text: Any = None) -> Reply:
        if "\n2\n" in ask.messages[1].content and not self.mended:
            said: Reply = self._odd()
            return said
        return Reply(text=FINE)


def raises(error: BaseException) -> Callable[[], Any]:
    def odd() -> Any:
        raise error

    return odd


def deep() -> Any:
    return deep()


ODD: dict[str, tuple[Callable[[], Any], type[MetierError], str]] = {
    "TypeError": (raises(TypeError("'NoneType' is no list")), EngineError, "raised TypeError: 'NoneType'"),
    "ValueError": (raises(ValueError("\ud83d")), EngineError, "raised ValueError"),
    "TimeoutError": (raises(TimeoutError()), EngineError, "raised TimeoutError"),
    "group": (raises(ExceptionGroup("g", [OSError("gone")])), EngineError, "raised OSError: gone"),
    "own in a group": (raises(ExceptionGroup("g", [AskRejectedError("no")])), AskRejectedError, "no"),
    "RecursionError": (deep, EngineError, "raised RecursionError"),
    "None": (lambda: None, EngineError, "the backend gave None; expected a Reply"),
    "text": (lambda: FINE, EngineError, "expected a Reply"),
    "count": (lambda: Reply(text=FINE, usage=Usage(prompt_tokens=2**63)), EngineError, "counts prompt_tokens=9"),
    "NaN": (lambda: Reply(text=FINE, usage=Usage(queue_s=math.nan)), EngineError, "counts queue_s=nan"),
    "huge": (lambda: Reply(text=FINE, usage=Usage(swaps=10**400)), EngineError, "counts swaps=1000"),
    "half a pair": (lambda: Reply(text="\ud83d", thinking="\udc00"), AnswerError, "half of a surrogate pair"),
    "half a pair, escaped": (lambda: Reply(text=r'{"why": "\ud83d"}'), AnswerError, "is no Out"),
    "digits": (lambda: Reply(text='{"share": ' + "1" * 4301 + "}"), AnswerError, "is no Out"),
    "braces": (lambda: Reply(text='{"inner":[' * 2000), AnswerError, "is no Out"),
    "cut off": (
        lambda: Reply(text='{"why":"a","inner":[{"why":"b"},{"wh', finish_reason="length"), AnswerError, "cut off",
    ),
    "cut off after an example": (
        lambda: Reply(text='Such as {"why": "x"}. Mine: {', finish_reason="length"), AnswerError, "cut off",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
async def test_an_odd_reply_ends_one_run_and_a_resume_asks_again(what: str) -> None:
    odd, kind, why = ODD[what]
    backend = Odd(odd)
    with RunStore(":memory:") as store:
        async with open_session(backend=backend, store=store) as session:
            results = await session.map(graph, INPUTS)
            assert [type(result.error) for result in results if result.error] == [kind]
            failed = results[2]
            assert why in str(failed.error)
            run = store.run(failed.run_id)
            assert run.state == "failed" and run.error
            (step,) = store.query("SELECT state, error FROM steps WHERE run = ?", run.id)
            assert step["state"] == "failed" and step["error"]
            assert [one.state for one in store.runs(run.batch)].count("finished") == 4
            with pytest.raises(kind):
                await session.resume(graph, run.id)
            backend.mended = True
            assert await session.resume(graph, run.id) == Out(why="fine")


async def test_the_cause_is_kept() -> None:
    cause = TypeError("no")
    async with open_session(backend=Odd(raises(cause)), store=":memory:") as session:
        results = await session.map(graph, INPUTS)
    assert results[2].error is not None and results[2].error.__cause__ is cause


async def test_a_whole_answer_counts_although_its_text_was_cut_off() -> None:
    text = 'The answer: {"why": "a {"}. Because'
    async with open_session(backend=Odd(lambda: Reply(text=text, finish_reason="length")), store=":memory:") as session:
        results = await session.map(graph, INPUTS)
    assert results[2].output == Out(why="a {")


async def test_cancellation_passes() -> None:
    with RunStore(":memory:") as store:
        async with open_session(backend=ScriptedBackend({"critic": lambda a: anyio.sleep_forever()}), store=store) as s:
            with anyio.move_on_after(0.05) as scope:
                await s.map(graph, INPUTS)
            assert scope.cancelled_caught
            assert s.batch is not None and {run.state for run in store.runs(s.batch)} == {"stopped"}


class Unshowable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Looped(BaseModel):
    here: Any = None


def bad(number: int) -> Any:
    """What goes wrong for one number of five."""
    itself: list[Any] = []
    itself.append(itself)
    match number:
        case 0:
            raise Unshowable
        case 1:
            return deep()
        case 2:
            raise ExceptionGroup("g", [KeyError("k")])
        case 3:
            return Looped(here=itself)
        case _:
            return Looped(here="\ud83d")


async def test_a_function_step_ends_its_own_run() -> None:
    def work(value: In) -> Looped:
        return bad(value.number - 1) if value.number else Looped(here=1)

    whole = TaskGraph("f", takes=In, gives=Looped)
    whole.step(work)
    async with open_session(backend=ScriptedBackend(), store=":memory:") as session:
        results = await session.map(whole, [In(number=at) for at in range(6)])
        assert results[0].output == Looped(here=1)
        for result in results[1:]:
            assert isinstance(result.error, StepError), result
            assert session.store.run(result.run_id).state == "failed"
            with pytest.raises(StepError):
                await session.resume(whole, result.run_id)


@pytest.mark.parametrize("where", ["when", "until"])
async def test_a_condition_ends_its_own_run(where: str) -> None:
    def condition(outputs: Any) -> bool:
        if outputs[first].why == "odd":
            bad(0)
        return True

    looped = TaskGraph("c", takes=In, gives=str)
    critic, writer = Role("critic", takes=In, gives=Out), Role("writer", takes=Out, gives=str)
    if where == "when":
        first = looped.step(critic)
        looped.step(writer, after=first, when=condition)
    else:
        with looped.loop("again", max_rounds=2, until=condition):
            first = looped.step(critic)
            looped.step(writer, after=first)
    odd = lambda ask: '{"why": "odd"}' if "\n3" in ask.messages[-1].content else FINE  # noqa: E731
    backend = ScriptedBackend({"critic": odd, "writer": lambda ask: "yes"})
    async with open_session(backend=backend, store=":memory:") as session:
        results = await session.map(looped, INPUTS)
        assert [result.output for result in results] == ["yes", "yes", "yes", None, "yes"]
        assert isinstance(results[3].error, GraphError | RunError)
        assert session.store.run(results[3].run_id).state == "failed"


@pytest.mark.parametrize("score", [lambda: bad(0), lambda: "x", lambda: 10**400, lambda: math.nan, lambda: None])
async def test_a_scorer_ends_its_own_run(score: Callable[[], Any]) -> None:
    def scorer(task: Task, output: Any) -> Any:
        return score() if task.id == "3" else 1.0

    tasks = TaskSet("t", "test", tuple(Task(str(value.number), value) for value in INPUTS), scorer)
    backend = ScriptedBackend({"critic": lambda ask: FINE})
    async with open_session(backend=backend, store=":memory:") as session:
        results = await session.map(graph, tasks)
        assert [result.score for result in results] == [1.0, 1.0, 1.0, 0.0, 1.0]
        assert isinstance(results[3].error, TaskSetError | RunError)
        asked = len(backend.asks)
        tasks = TaskSet("t", "test", tasks.tasks, lambda task, output: 0.5)
        assert session.batch is not None
        (again,) = await session.resume_batch(graph, session.batch, tasks)
        assert (again.score, again.output, len(backend.asks)) == (0.5, Out(why="fine"), asked)


# --- a thousand replies -----------------------------------------------------------------------------------

PIECES = [
    '{"why": "a"}', '{"why": ', '"', "\\", r"\ud83d", r"\u0000", "\x00", "\ud83d", "\udfff", "{", "}", "[", "]",
    "```json\n",     "NaN", "-Infinity", "1e999", "9" * 30, "1" * 4301, '{"share": NaN, "why": "n"}',
    '{"why": "b", "inner": [{"why": "c"}]}',
    '{"why":"a","inner":[{"why":"b"},{"wh', "<think>", "</think>", "<|im_end|>", "null", ",", ":", "é", "🙂", " ", "\n",
    '{"a":' * 900, "{" * 3000, "[" * 3000, '"why"', "true", "\u2028", "\ufeff",
]  # fmt: skip


def odd_reply(draw: random.Random) -> Reply:
    text = "".join(draw.choices(PIECES, k=draw.randint(0, 6)))
    if draw.random() < 0.3:
        text = json.dumps({"why": text, "share": draw.choice([math.nan, math.inf, -0.0, 1e308])})
    amounts = [0, 1, -1, 2**31, 2**63 - 1, 2**63, 10**400]
    seconds = [0.0, 1.5, math.nan, math.inf, 1e300, 1e18]
    usage = Usage() if draw.random() < 0.6 else Usage(answer_tokens=draw.choice(amounts), decode_s=draw.choice(seconds))
    return Reply(
        text=text,
        thinking=draw.choice(["", "a", "\ud83d"]),
        finish_reason=draw.choice(["stop", "length"]),
        usage=usage,
        engine=draw.choice(["one", "\udc80"]),
        mean_logprob=draw.choice([None, math.nan, -1.0]),
    )


ERRORS = (TypeError, ValueError, RecursionError, OverflowError, KeyError, AssertionError, OSError, StopIteration)


class Drawn:
    """Gives each ask an odd reply of its own, or raises; all is well once it is mended."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self.mended = False

    async def reply(self, ask: Ask, *, on_text: Any = None) -> Reply:
        if self.mended:
            return Reply(text=FINE)
        if self._draw.random() < 0.1:
            raise self._draw.choice(ERRORS)("\ud83d" if self._draw.random() < 0.5 else "odd")
        return odd_reply(self._draw)


async def test_a_thousand_odd_replies(tmp_path: Any) -> None:
    """Every run has its result; those that failed are resumed to their end, finished ones read back the same."""
    backend = Drawn(seed=21)
    with RunStore(tmp_path / "runs.db") as store:
        async with open_session(backend=backend, store=store) as session:
            results = await session.map(graph, [In(number=at) for at in range(1000)])
            assert session.batch is not None
            assert len(results) == 1000 and all(isinstance(one, RunResult) for one in results)
            states = [run.state for run in store.runs(session.batch)]
            assert states == ["failed" if one.error else "finished" for one in results]
            assert 50 < states.count("finished") < 950
            await _finished_ones_read_back(session, results)
            backend.mended = True
            resumed = await session.resume_batch(graph, session.batch)
            assert [one.error for one in resumed] == [None] * states.count("failed")
            assert {run.state for run in store.runs(session.batch)} == {"finished"}


async def _finished_ones_read_back(session: Session, results: list[RunResult]) -> None:
    """Resume what a crash just before the run's end would have left."""
    for one in [result for result in results if result.error is None]:
        session.store.end_run(one.run_id, "running")
        assert repr(await session.resume(graph, one.run_id)) == repr(one.output)
