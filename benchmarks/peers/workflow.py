"""The workflow that every peer runs, without a framework: prompts of three roles, briefs, and how clients are driven.

Standard library only, since it runs in the peers' environments. The prompts are those of `benchmarks/programs.py`
in metier's layout, to the letter (a test compares them), so that all sides ask the same things.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Protocol

ROUNDS = 2
TOKENS_PER_ASK = 32
ASKS_PER_PROGRAM = 1 + 2 * ROUNDS
SYSTEM = "You are one specialist in a team. Do only your own step."
INSTRUCTIONS = {
    "planner": "Plan the work in short steps.",
    "solver": "Carry out the plan; mind the critique.",
    "critic": "Criticise the draft.",
}
TOPICS = ["a bridge over a river", "a garden on a roof", "a library without books", "a clock that runs backwards"]


def model_of(role: str) -> str:
    """The name under which a role's adapter is served."""
    return f"random-{role}"


def prompt(role: str, inputs: dict[str, str | None]) -> str:
    """The user message of a role: what it is given, in order, then what it is to do; None is left out."""
    parts = [f"# {name}\n{text}" for name, text in inputs.items() if text is not None]
    return "\n\n".join([*parts, f"# Your step: {role}\n{INSTRUCTIONS[role]}"])


def briefs(label: str, programs: int) -> list[str]:
    """What the programs of a batch are about; `label` keeps one batch out of another's prefix cache."""
    return [f"Batch {label}. Describe {TOPICS[i % len(TOPICS)]}, number {i}." for i in range(programs)]


@dataclass
class Batch:
    """What a batch of programs took: seconds of each program, and of the whole in wall and this process's CPU."""

    program_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    cpu_s: float = 0.0
    asks: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def count(self, prompt_tokens: int, output_tokens: int) -> None:
        """Note one answered ask."""
        self.asks += 1
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens


Program = Callable[[str, Batch], Awaitable[None]]
"""Runs one program on a brief and counts its asks."""


class AskRole(Protocol):
    """Asks a role and counts the ask; what it replies."""

    async def __call__(self, role: str, batch: Batch, **inputs: str | None) -> str: ...


def program_of(ask: AskRole) -> Program:
    """The program by a client that asks one role after the other."""

    async def program(brief: str, batch: Batch) -> None:
        plan = await ask("planner", batch, brief=brief)
        critique: str | None = None
        for _ in range(ROUNDS):
            draft = await ask("solver", batch, brief=brief, plan=plan, critique=critique)
            critique = await ask("critic", batch, brief=brief, plan=plan, draft=draft)

    return program


async def run_batch(program: Program, texts: list[str], at_once: int) -> Batch:
    """Run a program on each text, `at_once` at a time."""
    batch, left = Batch(), iter(texts)

    async def work() -> None:
        for text in left:
            began_s = time.monotonic()
            await program(text, batch)
            batch.program_s.append(time.monotonic() - began_s)

    wall_s, cpu_s = time.monotonic(), time.process_time()
    await asyncio.gather(*(work() for _ in range(min(at_once, len(texts)))))
    batch.wall_s, batch.cpu_s = time.monotonic() - wall_s, time.process_time() - cpu_s
    return batch


async def obey(program: Program) -> None:
    """Read orders from stdin, `{"texts", "at_once"}` a line, and answer each with its batch; ends with stdin."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        batch = await run_batch(program, order["texts"], order["at_once"])
        print(json.dumps(asdict(batch)), flush=True)
