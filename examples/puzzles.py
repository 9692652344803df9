"""Small arithmetic puzzles for three roles, and the teacher programs that make their training data.

A planner turns a puzzle into an expression, a solver evaluates it, a critic works the puzzle out by itself and
compares. The teachers know the right answers from the generator, and make the plausible mistakes that a critic
has to catch and a planner has to recover from.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from metier.agents import Role, Split, TaskSet, TrafficRow, mix_tasks, reasoning_gym_tasks, render_prompt


class Puzzle(BaseModel):
    text: str


class Plan(BaseModel):
    expression: str


class Answer(BaseModel):
    steps: str
    value: int


class Verdict(BaseModel):
    why: str
    correct: bool


planner = Role(
    "planner",
    takes=(Puzzle, Verdict | None),
    gives=Plan,
    instructions="Turn the puzzle into one expression."
    "{% if verdict %} The last attempt was rejected: check it and write the terms in another order.{% endif %}",
    max_tokens=40,
)
solver = Role("solver", takes=Plan, gives=Answer, instructions="Evaluate the expression.", max_tokens=56)
critic = Role(
    "critic",
    takes=(Puzzle, Answer),
    gives=Verdict,
    instructions="Work the puzzle out yourself. Is the value right?",
    max_tokens=64,
)

Terms = list[tuple[int, list[int]]]  # 3*14-2 is [(1, [3, 14]), (-1, [2])]


# ---- puzzles ----------------------------------------------------------------------------------------------


def puzzle_tasks(split: Split, size: int, seed: int = 0, shares: tuple[int, int, int] = (1, 1, 1)) -> TaskSet:
    """Mix leg counting, chain sums and basic arithmetic, in equal parts or by `shares`.

    Splits share no expression, so a sum that one dataset words for training is in no other's test. Puzzles that
    are scored are only those whose key is right: without parentheses, basic_arithmetic (reasoning-gym 0.1.25)
    works `4 - 1 * 9` out from left to right. Teachers do not read the key.
    """
    knobs: dict[str, dict[str, Any]] = {
        "leg_counting": {"min_animals": 2, "max_animals": 3, "max_instances": 5},
        "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        "basic_arithmetic": {
            "min_terms": 2,
            "max_terms": 3,
            "min_digits": 1,
            "max_digits": 1,
            "operators": ["+", "-", "*"],
            "allow_parentheses": False,
            "allow_negation": False,
        },
    }
    mixed = mix_tasks(
        "puzzles",
        *(
            reasoning_gym_tasks(
                dataset,
                split=split,
                size=-(-size * shares[part] // sum(shares)),
                input_type=Puzzle,
                seed=len(knobs) * seed + part,
                content=lambda entry: write_terms(right_terms(entry)),
                keep=None if split == "train" else key_is_right,
                **chosen,
            )
            for part, (dataset, chosen) in enumerate(knobs.items())
        ),
    )
    return TaskSet(mixed.name, split, mixed.tasks[:size], mixed.scorer, mixed.seeds)


def right_terms(entry: Mapping[str, Any]) -> Terms:
    """The expression that answers a puzzle, from its generator's entry (the task's key)."""
    metadata: dict[str, Any] = entry["metadata"]
    if "animals" in metadata:
        from reasoning_gym.arithmetic.leg_counting import ANIMALS

        return [(1, [count, ANIMALS[animal]]) for animal, count in metadata["animals"].items()]
    return read_terms(metadata["expression"])


def key_is_right(entry: Mapping[str, Any]) -> bool:
    """Whether the generator's answer is what its expression means."""
    return bool(entry["answer"] == str(evaluate(right_terms(entry))))


# ---- expressions ------------------------------------------------------------------------------------------


def read_terms(expression: str) -> Terms:
    """Read a sum of products, such as `3*14-2`."""
    parts = re.findall(r"([+-]?)((?:\d+)(?:\*\d+)*)", expression.replace(" ", ""))
    return [(-1 if sign == "-" else 1, [int(f) for f in factors.split("*")]) for sign, factors in parts]


def write_terms(terms: Terms) -> str:
    """Write a sum of products without spaces."""
    text = "".join(("-" if sign < 0 else "+") + "*".join(map(str, factors)) for sign, factors in terms)
    return text.removeprefix("+")


def reorder(terms: Terms) -> Terms:
    """The same sum with its terms and factors the other way round, positive terms first where that differs."""
    turned = [(sign, factors[::-1]) for sign, factors in reversed(terms)]
    positive_first = sorted(turned, key=lambda term: -term[0])
    return turned if positive_first == terms else positive_first


def evaluate(terms: Terms) -> int:
    """Value of a sum of products."""
    total = 0
    for sign, factors in terms:
        product = sign
        for factor in factors:
            product *= factor
        total += product
    return total


def work_out(terms: Terms, slip_at: int = -1, slip_by: int = 0) -> Answer:
    """Evaluate one operation at a time, products first: `3*14+2` gives steps `42+2=44`.

    With `slip_at`, the result of that line is off by `slip_by` and later lines build on it.
    """
    lines: list[str] = []
    while len(terms) > 1 or len(terms[0][1]) > 1:
        if any(len(factors) > 1 for _, factors in terms):
            terms = [(s, [f[0] * f[1], *f[2:]] if len(f) > 1 else f) for s, f in terms]
        else:
            total = evaluate(terms[:2])
            terms = [(-1 if total < 0 else 1, [abs(total)]), *terms[2:]]
        if len(lines) == slip_at:
            sign, factors = terms[0]
            off = sign * factors[0] + slip_by
            terms = [(-1 if off < 0 else 1, [abs(off), *factors[1:]]), *terms[1:]]
        lines.append(write_terms(terms))
    return Answer(steps="=".join(lines), value=evaluate(terms))


def plausible_mistake(terms: Terms, rng: random.Random) -> Answer:
    """A wrong answer of the kinds that solvers and planners really give."""
    right = evaluate(terms)
    for _ in range(100):
        kind = rng.choice(("slip", "slip", "number", "sign"))
        if kind == "slip":
            lines = len(work_out(terms).steps.split("="))
            answer = work_out(terms, rng.randrange(lines), rng.choice((-10, -2, -1, 1, 2, 10)))
        elif kind == "number":
            answer = work_out(misread(terms, rng))
        else:
            at = rng.randrange(len(terms))
            answer = work_out([(-s if i == at else s, f) for i, (s, f) in enumerate(terms)])
        if answer.value != right:
            return answer
    return work_out(terms, 0, 1)


def misread(terms: Terms, rng: random.Random) -> Terms:
    """The expression with one number taken for another: a wrong leg count, or a digit that changed."""
    at = rng.randrange(len(terms))
    sign, factors = terms[at]
    changed = [*factors[:-1], rng.choice((0, 2, 4, 5, 6, 8, 10, 14))]
    if len(factors) == 1:
        changed = [abs(factors[0] + rng.choice((-10, -1, 1, 10)))]
    return [*terms[:at], (sign, changed), *terms[at + 1 :]]


# ---- teachers ---------------------------------------------------------------------------------------------


def planner_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """Expressions for puzzles; a third of the rows come after a rejected attempt, with the critic's reason.

    Most are about legs: how many each animal has is what takes learning, sums are only copied.
    """
    rng = random.Random(seed)
    for task in puzzle_tasks(split, size, seed, shares=(3, 1, 1)):
        terms = right_terms(task.key)
        if rng.random() < 0.65:
            yield _row(planner, {"puzzle": task.input, "verdict": None}, Plan(expression=write_terms(terms)))
            continue
        # The critic is not always right either: the planner must not simply copy its expression.
        seen = terms if rng.random() < 0.75 else misread(terms, rng)
        verdict = Verdict(why=f"{write_terms(seen)}={work_out(seen).steps}", correct=False)
        plan = Plan(expression=write_terms(reorder(terms)))
        yield _row(planner, {"puzzle": task.input, "verdict": verdict}, plan)


def planner_tune_rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """Rows of the planner that no training sees, to decide by."""
    return planner_rows(size, seed, "tune")


def planner_score(row: TrafficRow, answer: Plan) -> float:
    """1.0 where the expression has the value of the teacher's, in whatever order it is written."""
    try:
        right = evaluate(read_terms(Plan.model_validate_json(row.reply).expression))
        return float(evaluate(read_terms(answer.expression)) == right)
    except (ValueError, IndexError):  # an expression that is none
        return 0.0


def solver_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """Workings of expressions, in the order of the puzzle and the other way round."""
    rng = random.Random(seed)
    for task in puzzle_tasks(split, size, seed):
        terms = right_terms(task.key)
        if rng.random() < 0.25:
            terms = misread(terms, rng)
        if rng.random() < 0.35:
            terms = reorder(terms)
        yield _row(solver, {"plan": Plan(expression=write_terms(terms))}, work_out(terms))


def solver_tune_rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """Rows of the solver that no training sees, to decide by."""
    return solver_rows(size, seed, "tune")


def solver_score(row: TrafficRow, answer: Answer) -> float:
    """1.0 where the value is right, however it was worked out."""
    return float(answer.value == Answer.model_validate_json(row.reply).value)


def critic_rows(size: int, seed: int, split: Split = "train") -> Iterator[TrafficRow]:
    """Checks of right answers and of plausible mistakes; the critic works the puzzle out before it judges.

    It ends by writing its own value and the one it was given side by side: a small model compares two numbers
    that stand together, and does not learn to compare one with a far-away prompt.
    """
    rng = random.Random(seed)
    for task in puzzle_tasks(split, size, seed, shares=(2, 1, 1)):
        terms = right_terms(task.key)
        tried = reorder(terms) if rng.random() < 0.25 else terms
        answer = work_out(tried) if rng.random() < 0.5 else plausible_mistake(tried, rng)
        why = f"{write_terms(terms)}={work_out(terms).steps}; said {answer.value}"
        verdict = Verdict(why=why, correct=answer.value == evaluate(terms))
        yield _row(critic, {"puzzle": task.input, "answer": answer}, verdict)


def mixed_rows(size: int, seed: int) -> Iterator[TrafficRow]:
    """Rows of all roles, for one adapter that plays all of them, in the shares of steps that their own recipes take."""
    shares = {planner_rows: 2, solver_rows: 5, critic_rows: 2}
    blocks = -(-size // sum(shares.values()))
    rows = {teacher: teacher(blocks * share, seed) for teacher, share in shares.items()}
    mixed = (next(rows[teacher]) for _ in range(blocks) for teacher, share in shares.items() for _ in range(share))
    return itertools.islice(mixed, size)


def _row(role: Role, inputs: dict[str, Any], reply: BaseModel) -> TrafficRow:
    return TrafficRow(role=role.name, messages=render_prompt(role, inputs), reply=reply.model_dump_json(), score=1.0)
