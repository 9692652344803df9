"""Add up a short ledger: read the signed amounts, add them, audit the total, and start over if the audit fails.

    metier run examples/ledger.py --tasks test:24 --assignment examples/ledger_assignment.yaml --shelf DIR

Only adding needs thought: running totals make a small model right that guesses otherwise. Reading is copying. The
auditor adds up by itself and compares. After a rejected total the reader lists income first, so that the accountant
adds in another order and does not repeat its slip.

Every role has a teacher, a program that writes its rows with thinking of different lengths and with a closed, empty
block, so that budgets and "off" both mean something to a variant trained on them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from metier.agents import Drawn, Role, Split, Task, TaskGraph, TaskSet, TrafficRow, draw_tasks, render_prompt


class Ledger(BaseModel):
    text: str


class Entries(BaseModel):
    amounts: str


class Total(BaseModel):
    total: int


class Audit(BaseModel):
    total: int
    correct: bool


reader = Role(
    "reader",
    takes=(Ledger, Audit | None),
    gives=Entries,
    instructions="List the amounts, signed{% if audit %}, income first: the total was rejected{% endif %}.",
    max_tokens=48,
)
accountant = Role("accountant", takes=Entries, gives=Total, instructions="Add up.", max_tokens=16)
auditor = Role("auditor", takes=(Entries, Total), gives=Audit, instructions="Is the total right?", max_tokens=24)

graph = TaskGraph("ledger", takes=Ledger, gives=Total)
with graph.loop("attempt", max_rounds=3, until=lambda s: s[audit].correct):
    read = graph.step(reader)  # from round 2 it sees the audit
    add = graph.step(accountant, after=read)
    audit = graph.step(auditor, after=add)

# The same in stages: the thought is a step's text, which the next step reads, so each may have a variant of its own.
thinker = Role("thinker", takes=Entries, gives=str, instructions="Write the running totals.", max_tokens=64)
answerer = Role(
    "answerer", takes={"entries": Entries, "working": str}, gives=Total, instructions="Take the total.", max_tokens=16
)

staged = TaskGraph("ledger-staged", takes=Ledger, gives=Total)
staged_read = staged.step(reader)
staged_think = staged.step(thinker, after=staged_read)
staged.step(answerer, after=staged_think)

# ---- tasks ------------------------------------------------------------------------------------------------

NAMES = ("Ann", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Ida", "Jo", "Kim", "Lou", "Max")
INCOME = ("got {} from {}", "{1} paid us {0}", "sold to {1} for {0}")
SPENDING = ("paid {} to {}", "lent {1} {0}", "bought from {1} for {0}")


def ledger_tasks(split: Split, size: int, seed: int = 0) -> TaskSet:
    """Ledgers of 3 to 7 entries with amounts of 1 to 9; the key is the list of signed amounts.

    No list is in two splits, and no more is spent than came in before.
    """
    return draw_tasks("ledger", _draw, _score, split=split, size=size, seed=seed)


tasks = ledger_tasks


def _draw(rng: random.Random) -> Drawn:
    amounts = _draw_amounts(rng)
    names = rng.sample(NAMES, len(amounts))
    lines = (
        rng.choice(INCOME if amount > 0 else SPENDING).format(abs(amount), name)
        for amount, name in zip(amounts, names, strict=True)
    )
    return Drawn(write_amounts(amounts), Ledger(text=", ".join(lines)), amounts)


def _draw_amounts(rng: random.Random) -> list[int]:
    while True:
        amounts = [rng.randint(1, 9) * rng.choice((1, 1, -1)) for _ in range(rng.randint(3, 7))]
        if min(running_totals(amounts)) >= 0:
            return amounts


def _score(task: Task, output: Any) -> float:
    return float(isinstance(output, Total) and output.total == sum(task.key))


verifiers = {
    "reader": lambda task, answer: float(sorted(read_amounts(answer.amounts)) == sorted(task.key)),
    "accountant": _score,
}

# ---- amounts ----------------------------------------------------------------------------------------------


def write_amounts(amounts: Sequence[int]) -> str:
    """Write signed amounts: `+85 -37`."""
    return " ".join(f"{amount:+d}" for amount in amounts)


def read_amounts(text: str) -> list[int]:
    """Read signed amounts; empty when a word is none."""
    try:
        return [int(word) for word in text.split()]
    except ValueError:
        return []


def income_first(amounts: Sequence[int]) -> list[int]:
    """The same amounts, income before spending, each from last to first: its running totals are never negative."""
    return sorted(reversed(amounts), key=lambda amount: amount < 0)


def running_totals(amounts: Sequence[int], slip_at: int = -1, slip_by: int = 0) -> list[int]:
    """Sums of the first one, two, … amounts; with `slip_at`, that sum and all later ones are off by `slip_by`."""
    totals: list[int] = []
    for at, amount in enumerate(amounts):
        totals.append((totals[-1] if totals else 0) + amount + (slip_by if at == slip_at else 0))
    return totals


# ---- teachers ---------------------------------------------------------------------------------------------

OFF_SHARE = 0.2
"""Of the rows of a role that needs thought; those of the reader are off half the time."""


def think_about(amounts: Sequence[int], rng: random.Random) -> str:
    """One addition after another; a third of the time at length, which is for length tuning to find out."""
    totals = running_totals(amounts)
    pairs = list(zip(totals, amounts[1:], totals[1:], strict=False))
    steps = " ".join(f"{before}{amount:+d}={after}" for before, amount, after in pairs)
    return f"{len(amounts)} amounts, first {amounts[0]}: {steps}" if rng.random() < 1 / 3 else steps


def reader_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """Lists of signed amounts; a quarter come after a rejected total, with income first."""
    rng = random.Random(seed)
    for task in ledger_tasks(split, size, seed):
        audit_before, amounts = None, task.key
        if rng.random() < 0.25:
            audit_before, amounts = Audit(total=sum(task.key) + _off_by(rng), correct=False), income_first(task.key)
        thinking = "" if rng.random() < 0.5 else " ".join("in" if amount > 0 else "out" for amount in task.key)
        inputs = {"ledger": task.input, "audit": audit_before}
        yield _row(reader, inputs, Entries(amounts=write_amounts(amounts)), thinking)


def accountant_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """Totals of lists, in the ledger's order and with income first."""
    rng = random.Random(seed)
    for task in ledger_tasks(split, size, seed):
        amounts = income_first(task.key) if rng.random() < 0.25 else task.key
        thinking = "" if rng.random() < OFF_SHARE else think_about(amounts, rng)
        yield _row(
            accountant, {"entries": Entries(amounts=write_amounts(amounts))}, Total(total=sum(amounts)), thinking
        )


def auditor_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """Audits of right totals and of slips; the auditor ends its thinking with its own total beside the one said."""
    rng = random.Random(seed)
    for task in ledger_tasks(split, size, seed):
        amounts = income_first(task.key) if rng.random() < 0.25 else task.key
        right = sum(amounts)
        said = right if rng.random() < 0.5 else running_totals(amounts, 0, _off_by(rng))[-1]
        thinking = "" if rng.random() < OFF_SHARE else f"{think_about(amounts, rng)}; {right} said {said}"
        inputs = {"entries": Entries(amounts=write_amounts(amounts)), "total": Total(total=said)}
        yield _row(auditor, inputs, Audit(total=right, correct=said == right), thinking)


def staged_rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """Thoughts as text, and totals taken from them, in turn."""
    rng = random.Random(seed)
    for number, task in enumerate(ledger_tasks("train", size, seed)):
        entries = Entries(amounts=write_amounts(task.key))
        working = think_about(task.key, rng)
        if number % 2:
            yield _row(answerer, {"entries": entries, "working": working}, Total(total=sum(task.key)), None)
        else:
            messages = render_prompt(thinker, {"entries": entries})
            yield TrafficRow(role=thinker.name, messages=messages, reply=working, score=1.0)


def mixed_rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """Rows of all roles in turn, for one adapter that plays all of them."""
    teachers = [rows(-(-size // 3), seed) for rows in (reader_rows, accountant_rows, auditor_rows)]
    for turn in zip(*teachers, strict=True):
        yield from turn


def reader_tune_rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """Rows of the reader that no training sees, to decide by."""
    return reader_rows(size, seed, "tune")


def accountant_tune_rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """Rows of the accountant that no training sees, to decide by."""
    return accountant_rows(size, seed, "tune")


def auditor_tune_rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """Rows of the auditor that no training sees, to decide by."""
    return auditor_rows(size, seed, "tune")


def auditor_score(row: TrafficRow, answer: Audit) -> float:
    """1.0 where the verdict is right, whatever total the auditor came to."""
    return float(answer.correct == Audit.model_validate_json(row.reply).correct)


def _off_by(rng: random.Random) -> int:
    return rng.choice((-3, -2, -1, 1, 2, 3))


def _row(role: Role, inputs: dict[str, Any], reply: BaseModel, thinking: str | None) -> TrafficRow:
    messages = render_prompt(role, inputs)
    return TrafficRow(role=role.name, messages=messages, reply=reply.model_dump_json(), thinking=thinking, score=1.0)
