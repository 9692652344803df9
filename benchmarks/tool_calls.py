"""How many of a small model's replies with tools are neither a call that fits nor an answer: the grammar's bar is none.

    python benchmarks/tool_calls.py --asks 1000
    python benchmarks/tool_calls.py --asks 1000 --journal runs/tool_calls.jsonl --slice 200     # until all are there

A role with four tools of different arguments is asked hot (temperature 1), so that it writes whatever the grammar lets
it. Each reply is checked against the tool's own arguments and the answer's type. One that its limit of tokens cut off
is neither, and is counted apart: nothing of it is called.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import anyio
from harness import arguments, machine, read_rows, write_rows
from pydantic import BaseModel

from metier.agents import AnswerError, Role, TaskGraph, Tool, ToolError, parse_answer
from metier.agents.tools.calls import read_calls
from metier.runtime import RunStore, load_settings, open_session


class Question(BaseModel):
    text: str


class Answer(BaseModel):
    value: int
    sure: bool


class Place(BaseModel):
    city: str
    country: Literal["Norway", "Ghana", "Peru"]


def calculator(expression: str) -> str:
    """Works out a sum."""
    return str(len(expression))


def weather(place: Place, days: int = 1) -> str:
    """Tells the weather at a place."""
    return f"{place.city}: rain for {days} days"


def sort(numbers: list[int], order: Literal["up", "down"]) -> str:
    """Sorts numbers."""
    return str(sorted(numbers, reverse=order == "down"))


def now() -> str:
    """Tells the time."""
    return "noon"


role = Role(
    "solver",
    takes=Question,
    gives=Answer,
    instructions="Answer the question. Use the tools.",
    tools=[calculator, weather, sort, now],
    max_calls=3,
    max_tokens=64,
    temperature=1.0,
)
graph = TaskGraph("tool-calls", takes=Question, gives=Answer)
graph.step(role, retries=0)


def kind_of(text: str, finish_reason: str, tools: dict[str, Tool]) -> str:
    """What a reply is: calls, an answer, cut off, or invalid."""
    calls = read_calls(text)
    try:
        if calls is None:
            parse_answer(text, Answer)
            return "answer"
        for call in calls.tool_calls:
            tools[call.name].read(call.arguments)
        return "calls"
    except (AnswerError, ToolError, KeyError):
        return "cut off" if finish_reason == "length" else "invalid"


async def replies(base: str, asks: int, concurrency: int, store: Path, first_batch: int) -> list[dict[str, Any]]:
    """At least so many replies of one engine: batch, text and finish reason of each."""
    with RunStore(store) as runs:
        async with open_session(base=base, store=runs, settings=load_settings()) as session:
            found: list[dict[str, Any]] = []
            batch = first_batch
            while len(found) < asks:
                questions = [Question(text=f"What is {n} times {batch + 3}?") for n in range(concurrency)]
                results = await session.map(graph, questions, concurrency=concurrency, seed=batch)
                for result in results:
                    if result.error is not None and not isinstance(result.error, AnswerError):
                        raise result.error
                rows = runs.query(
                    "SELECT a.reply AS text, a.finish_reason AS finish_reason FROM asks a JOIN runs r ON r.id = a.run "
                    "WHERE a.finish_reason != '' AND r.batch = ?",
                    session.batch,
                )
                found += [{"batch": batch, **dict(row)} for row in rows]
                batch += 1
    return found


def main() -> None:
    """Print what the replies were."""
    parser = arguments(__doc__, base=True)
    parser.add_argument("--asks", type=int, default=1000, help="replies to look at")
    parser.add_argument(
        "--concurrency", type=int, default=8, help="runs at a time; their prompts together must fit a step"
    )
    parser.add_argument("--journal", type=Path, help="keep the replies in this file, and go on behind those in it")
    parser.add_argument("--slice", type=int, help="ask at most about so many in this process")
    options = parser.parse_args()
    found = read_rows(options.journal) if options.journal else []
    missing = options.asks - len(found)
    if missing > 0:
        first = max((row["batch"] + 1 for row in found), default=0)
        asks = min(missing, options.slice or missing)
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "runs.db"
            found += anyio.run(replies, options.base, asks, options.concurrency, store, first)
        if options.journal:
            write_rows(options.journal, found)
    tools: dict[str, Any] = {each.name: each for each in role.tools if isinstance(each, Tool)}
    kinds = Counter(kind_of(row["text"], row["finish_reason"], tools) for row in found)
    said = [calls for row in found for calls in [read_calls(row["text"])] if calls is not None]
    called = Counter(call.name for calls in said for call in calls.tool_calls)
    print(f"{machine()}\n{len(found)} replies: {json.dumps(kinds)}; calls by tool: {json.dumps(called)}")


if __name__ == "__main__":
    main()
