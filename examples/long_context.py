"""Read a code out of a long story, with full attention and with attention that retrieves, and print both.

    python examples/long_context.py --tasks 8

The reader has 3,000 tokens of context. It plays on a variant that is the same weights with `attention: fier`, which at
each decode step attends to 256 tokens of them. Nothing is trained. The story is the one by Jules Verne that
reasoning-gym ships.

The recipe in docs/fier.md has `metier make` pick the budget on this role's own asks instead (`reader_rows`).
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from metier.agents import Drawn, Role, Split, Task, TaskGraph, TaskSet, TrafficRow, draw_tasks, render_prompt


class Report(BaseModel):
    story: str
    question: str


class Code(BaseModel):
    digits: str


# The question comes last, where a small model still knows it.
reader = Role("reader", takes=Report, gives=str, instructions="{{ report.question }}", max_tokens=24)


def find_code(note: str) -> Code:
    """The first run of five digits in what the reader says, empty where there is none."""
    found = re.search(r"\d{5}", note)
    return Code(digits=found.group() if found else "")


graph = TaskGraph("long-context", takes=Report, gives=Code)
read = graph.step(reader)
code = graph.step(find_code, after=read)

# ---- tasks --------------------------------------------------------------------------------------------------------

STORY_CHARACTERS = 11_500
"""About 2,700 tokens of SmolLM2, which with the rest of the prompt is more than retrieval's minimum."""
THINGS = ("box", "door", "safe", "locker", "chest", "bag", "gate", "drawer")
COLOURS = ("blue", "green", "yellow", "purple", "orange", "silver", "golden", "black")


@cache
def story() -> str:
    """The story without what Project Gutenberg adds."""
    text = files("reasoning_gym.data").joinpath("in_the_year_2889.txt").read_text(encoding="utf-8")
    return text.split("*** START", 1)[1].split("***", 1)[1].split("*** END", 1)[0].strip()


def tasks(split: Split, size: int, seed: int = 0) -> TaskSet:
    """Pieces of the story with a sentence somewhere in them that gives a code; the key is that sentence."""
    return draw_tasks("long-context", _draw, _score, split=split, size=size, seed=seed)


def _draw(rng: random.Random) -> Drawn:
    thing = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    digits = "".join(rng.choice("123456789") for _ in range(5))
    start = rng.randrange(len(story()) - STORY_CHARACTERS)
    piece = story()[start : start + STORY_CHARACTERS]
    at = piece.index(" ", rng.randrange(len(piece) - 200))
    fact = f"The secret code of the {thing} is {digits}."
    told = f"{piece[:at]}\n{fact} Remember it.\n{piece[at + 1 :]}"
    return Drawn(fact, Report(story=told, question=f"What is the secret code of the {thing}?"), fact)


def _score(task: Task, output: Any) -> float:
    return float(isinstance(output, Code) and output == find_code(task.key))


def reader_score(row: TrafficRow, answer: str) -> float:
    """1.0 where the answer has the code of the row's own."""
    return float(find_code(answer) == find_code(row.reply))


def reader_rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """The reader's asks with their right answers, on tune tasks."""
    for task in tasks("tune", size, seed):
        messages = render_prompt(reader, {"report": task.input})
        yield TrafficRow(role=reader.name, messages=messages, reply=task.key, score=1.0)


# ---- with and without ---------------------------------------------------------------------------------------------

DECODE_SQL = """
SELECT asks.role AS role, coalesce(asks.variant, 'base') AS variant, avg(asks.prompt_tokens) AS prompt,
       1000 * sum(asks.decode_s) / sum(asks.answer_tokens - 1) AS decode_ms, 1000 * avg(asks.cpu_s) AS cpu_ms
FROM asks JOIN runs ON runs.id = asks.run WHERE runs.batch = ? GROUP BY asks.role ORDER BY asks.role DESC
"""


async def compare(base: str, size: int, budget: int, folder: Path, settings: Any) -> None:
    """Run the same tasks with and without a variant that retrieves, one at a time, and print what it changes."""
    from metier.router import Assignment
    from metier.runtime import open_session
    from metier.specializers import Recipe, Shelf, produce

    method = {"method": "fier", "budget_tokens": budget}
    variant = produce(
        Recipe.model_validate({"name": "long-reader", "methods": [method]}), shelf=Shelf(folder / "shelf"), base=base
    )
    retrieving = Assignment.model_validate({"roles": {"reader": {"variant": variant.name}}})
    settings = settings.model_copy(update={"shelf": folder / "shelf", "store": folder / "runs.db"})
    print("| reader | tasks | solved | role | variant | prompt tokens | decode, ms a token | CPU-ms an ask |")
    print("|---|---|---|---|---|---|---|---|")
    for name, assignment in (("full attention", None), (f"retrieves {budget} tokens", retrieving)):
        async with open_session(base=base, assignment=assignment, settings=settings) as session:
            results = await session.map(graph, tasks("test", size), concurrency=1, label=name)
            solved = sum(result.score == 1.0 for result in results)
            for ask in session.store.query(DECODE_SQL, session.batch):
                cells = (
                    name, len(results), solved, ask["role"], ask["variant"], round(ask["prompt"]),
                    f"{ask['decode_ms']:.1f}", f"{ask['cpu_ms']:.0f}",
                )  # fmt: skip
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    """Parse the command line and compare."""
    import anyio

    from metier.runtime import load_settings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="bundled base, folder or Hugging Face id")
    parser.add_argument("--tasks", type=int, default=8, help="test tasks (default 8)")
    parser.add_argument("--budget", type=int, default=256, help="tokens that are retrieved (default 256)")
    options = parser.parse_args()
    settings = load_settings()
    engine = settings.engine.model_copy(update={"max_model_tokens": max(4096, settings.engine.max_model_tokens)})
    settings = settings.model_copy(update={"engine": engine})
    with tempfile.TemporaryDirectory(prefix="metier-long-context-") as folder:
        anyio.run(partial(compare, options.base, options.tasks, options.budget, Path(folder), settings))


if __name__ == "__main__":
    main()
