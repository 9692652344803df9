"""Spend a gift card on exactly two things: read the offer, find the pair, check it, and look again if it is wrong.

    metier run examples/gift_card.py --tasks test:24 --assignment examples/gift_card_assignment.yaml --shelf DIR

Finding needs long thought, since pair after pair may be tried; reading and checking need none: one sum is enough to
see that a pair is wrong. So a first round may guess cheaply, and only a rejected guess is thought about.

Every role has a teacher, a program that writes its rows with thinking of different lengths and with a closed, empty
block, so that budgets and "off" both mean something to a variant trained on them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from metier.agents import Drawn, Role, Split, Task, TaskGraph, TaskSet, TrafficRow, draw_tasks, render_prompt


class Shop(BaseModel):
    text: str


class Offer(BaseModel):
    prices: str
    card: int


class Pair(BaseModel):
    first: int
    second: int


class Check(BaseModel):
    sum: int
    card: int
    listed: bool
    correct: bool


reader = Role("reader", takes=Shop, gives=Offer, instructions="List the prices of what is left.", max_tokens=48)
finder = Role(
    "finder",
    takes=(Offer, Check | None),
    gives=Pair,
    instructions="Find two prices that make the card.{% if check %} The last pair was wrong.{% endif %}",
    max_tokens=24,
)
checker = Role("checker", takes=(Offer, Pair), gives=Check, instructions="Is the pair right?", max_tokens=40)

graph = TaskGraph("gift-card", takes=Shop, gives=Pair)
offer = graph.step(reader)
with graph.loop("attempt", after=offer, max_rounds=3, until=lambda s: s[check].correct):
    find = graph.step(finder)  # from round 2 it sees the check
    check = graph.step(checker, after=find)

# ---- tasks ------------------------------------------------------------------------------------------------

THINGS = ("mug", "hat", "book", "lamp", "fern", "bowl", "kite", "pen", "scarf", "clock", "vase", "map")
PRICES = range(2, 13)
GONE = ("the {} is sold out", "no {} left", "the {} is gone")


class Puzzle(BaseModel):
    """What an offer is drawn from: prices left, and the only pair of them that makes the card, in their order."""

    prices: list[int]
    pair: tuple[int, int]


def gift_card_tasks(split: Split, size: int, seed: int = 0) -> TaskSet:
    """Shops with 4 to 6 different prices left, of 2 to 12, and a card above them that exactly one pair makes.

    No list of prices is in two splits. One thing in half of the shops is sold out.
    """
    return draw_tasks("gift-card", _draw, _score, split=split, size=size, seed=seed)


tasks = gift_card_tasks


def _draw(rng: random.Random) -> Drawn:
    puzzle = _draw_puzzle(rng)
    return Drawn(write_prices(puzzle.prices), Shop(text=_tell(puzzle, rng)), puzzle)


def _draw_puzzle(rng: random.Random) -> Puzzle:
    while True:
        prices = rng.sample(PRICES, rng.randint(4, 6))
        at, other = sorted(rng.sample(range(len(prices)), 2))
        pair = (prices[at], prices[other])
        if len(pairs_that_make(prices, sum(pair))) == 1 and max(prices) < sum(pair):
            return Puzzle(prices=prices, pair=pair)


def _tell(puzzle: Puzzle, rng: random.Random) -> str:
    things = rng.sample(THINGS, len(puzzle.prices) + 1)
    offers = [f"{thing} {price}" for thing, price in zip(things, puzzle.prices, strict=False)]
    after = ""
    if rng.random() < 0.5:
        offers.insert(rng.randrange(len(offers) + 1), f"{things[-1]} {rng.choice(PRICES)}")
        after = f" But {rng.choice(GONE).format(things[-1])}."
    return f"{', '.join(offers)}.{after} The card holds {sum(puzzle.pair)}."


def _score(task: Task, output: Any) -> float:
    return float(isinstance(output, Pair) and sorted((output.first, output.second)) == sorted(task.key.pair))


verifiers = {
    "reader": lambda task, answer: float(answer == offer_of(task.key)),
    "finder": _score,
}

# ---- prices -----------------------------------------------------------------------------------------------


def write_prices(prices: Sequence[int]) -> str:
    """Write prices: `12 7 25`."""
    return " ".join(map(str, prices))


def offer_of(puzzle: Puzzle) -> Offer:
    """What the reader should write."""
    return Offer(prices=write_prices(puzzle.prices), card=sum(puzzle.pair))


def pairs_that_make(prices: Sequence[int], card: int) -> list[tuple[int, int]]:
    """All pairs of prices with that sum, in the order of the list."""
    return [(p, q) for at, p in enumerate(prices) for q in prices[at + 1 :] if p + q == card]


# ---- teachers ---------------------------------------------------------------------------------------------

OFF_SHARE = 0.2
"""Of the rows of the finder; those of the others are off half the time."""


def think_about(puzzle: Puzzle, rng: random.Random) -> str:
    """For every price what is missing to the card, a third of the time at length.

    It does not stop at the one that is on the list: a model trained to stop there learns that what is missing is always
    listed.
    """
    card = sum(puzzle.pair)
    at_length = rng.random() < 1 / 3
    steps = []
    for price in puzzle.prices:
        listed = card - price in puzzle.prices and card != 2 * price
        steps.append(f"{card}-{price}={card - price}" + (" yes;" if listed else " no;") * at_length)
    return " ".join(steps)


def reader_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """Prices of what is left, and what the card holds."""
    rng = random.Random(seed)
    for task in gift_card_tasks(split, size, seed):
        gone = "all left" if " But " not in task.input.text else "one gone"
        yield _row(reader, {"shop": task.input}, offer_of(task.key), "" if rng.random() < 0.5 else gone)


def finder_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """Pairs; a quarter come after a rejected pair."""
    rng = random.Random(seed)
    for task in gift_card_tasks(split, size, seed):
        rejected = None
        if rng.random() < 0.25:
            rejected = check_of(task.key, wrong_pair(task.key, rng))
        thinking = "" if rng.random() < OFF_SHARE else think_about(task.key, rng)
        first, second = task.key.pair
        inputs = {"offer": offer_of(task.key), "check": rejected}
        yield _row(finder, inputs, Pair(first=first, second=second), thinking)


def checker_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """Checks of right pairs and of plausible wrong ones."""
    rng = random.Random(seed)
    for task in gift_card_tasks(split, size, seed):
        first, second = task.key.pair if rng.random() < 0.5 else wrong_pair(task.key, rng)
        if rng.random() < 0.25:
            first, second = second, first
        verdict = check_of(task.key, (first, second))
        thinking = "" if rng.random() < 0.5 else f"{first}+{second}={first + second}"
        inputs = {"offer": offer_of(task.key), "pair": Pair(first=first, second=second)}
        yield _row(checker, inputs, verdict, thinking)


def check_of(puzzle: Puzzle, pair: tuple[int, int]) -> Check:
    """What the checker should say of a pair."""
    card = sum(puzzle.pair)
    listed = pair[0] != pair[1] and set(pair) <= set(puzzle.prices)
    return Check(sum=sum(pair), card=card, listed=listed, correct=listed and sum(pair) == card)


def wrong_pair(puzzle: Puzzle, rng: random.Random) -> tuple[int, int]:
    """Two prices with another sum, or a price and a rest that is not on the list."""
    while True:
        first, second = rng.sample(puzzle.prices, 2)
        if rng.random() < 0.15:
            second = sum(puzzle.pair) - first
        if not check_of(puzzle, (first, second)).correct and second > 0:
            return first, second


def mixed_rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """Rows of all roles, as many of each as its own recipe has steps, for one adapter that plays all of them."""
    turns = (finder_rows, checker_rows) * 3 + (finder_rows, finder_rows, finder_rows, reader_rows)
    each = -(-size // len(turns))
    rows = {teacher: teacher(each * turns.count(teacher), seed) for teacher in set(turns)}
    for _ in range(each):
        yield from (next(rows[teacher]) for teacher in turns)


def reader_tune_rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """Rows of the reader that no training sees, to decide by."""
    return reader_rows(size, seed, "tune")


def finder_tune_rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """Rows of the finder that no training sees, to decide by."""
    return finder_rows(size, seed, "tune")


def checker_tune_rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """Rows of the checker that no training sees, to decide by."""
    return checker_rows(size, seed, "tune")


def checker_score(row: TrafficRow, answer: Check) -> float:
    """1.0 where the verdict is right."""
    return float(answer.correct == Check.model_validate_json(row.reply).correct)


def _row(role: Role, inputs: dict[str, Any], reply: BaseModel, thinking: str) -> TrafficRow:
    messages = render_prompt(role, inputs)
    return TrafficRow(role=role.name, messages=messages, reply=reply.model_dump_json(), thinking=thinking, score=1.0)
