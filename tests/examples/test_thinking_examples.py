"""The teachers of the ledger and the gift card are right, and their splits are clean."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from metier.agents.answers.answers import parse_answer
from metier.agents.graphs.workflow_file import load_workflow
from metier.agents.tasksets import Split
from metier.specializers import load_recipe
from metier.specializers.recipes.recipe import read_rows

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_under_test", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic resolves its annotations there
    spec.loader.exec_module(module)
    return module


ledger, gift_card = load("ledger"), load("gift_card")
SPLITS: tuple[Split, ...] = ("train", "tune", "test")


@pytest.mark.parametrize("module", [ledger, gift_card], ids=["ledger", "gift_card"])
def test_no_task_is_in_two_splits(module: Any) -> None:
    seen = {split: {str(task.key) for task in module.tasks(split, 150)} for split in SPLITS}
    assert all(len(keys) == 150 for keys in seen.values())
    assert not seen["train"] & seen["tune"] and not seen["train"] & seen["test"] and not seen["tune"] & seen["test"]


@pytest.mark.parametrize("module", [ledger, gift_card], ids=["ledger", "gift_card"])
def test_every_row_is_of_its_roles_type_and_some_do_not_think(module: Any) -> None:
    roles = module.graph.build().roles()
    rows = list(module.mixed_rows(120, 1))
    assert {row.role for row in rows} == set(roles)
    for row in rows:
        assert parse_answer(row.reply, roles[row.role].gives).model_dump_json() == row.reply
    for name in roles:
        off = [not row.thinking for row in rows if row.role == name]
        assert any(off) and not all(off)


def test_running_totals_are_right_and_never_negative() -> None:
    for task in ledger.tasks("train", 100):
        for amounts in (task.key, ledger.income_first(task.key)):
            totals = ledger.running_totals(amounts)
            assert totals == [sum(amounts[: n + 1]) for n in range(len(amounts))]
            assert min(totals) >= 0 and max(totals) <= 63
            assert ledger.read_amounts(ledger.write_amounts(amounts)) == amounts
        assert sorted(ledger.income_first(task.key)) == sorted(task.key)
        slipped = ledger.running_totals(task.key, 1, 2)
        assert slipped[-1] == sum(task.key) + 2 and slipped[0] == task.key[0]


def test_what_the_ledgers_teachers_think_ends_in_the_answer() -> None:
    for row in ledger.accountant_rows(100, 0):
        if row.thinking:
            assert row.thinking.endswith(str(parse_answer(row.reply, ledger.Total).total))
    for row in ledger.auditor_rows(100, 0):
        verdict = parse_answer(row.reply, ledger.Audit)
        if row.thinking:
            right, said = row.thinking.rpartition("; ")[2].split(" said ")
            assert verdict == ledger.Audit(total=int(right), correct=right == said)


def test_ledgers_are_scored_by_their_total() -> None:
    tasks = ledger.tasks("tune", 5)
    for task in tasks:
        assert tasks.score(task, ledger.Total(total=sum(task.key))) == 1.0
        assert tasks.score(task, ledger.Total(total=sum(task.key) + 1)) == 0.0
        assert ledger.verifiers["reader"](task, ledger.Entries(amounts=ledger.write_amounts(task.key[::-1]))) == 1.0
        assert ledger.verifiers["reader"](task, ledger.Entries(amounts="none")) == 0.0


def test_a_card_has_one_pair_and_thinking_finds_it() -> None:
    for task in gift_card.tasks("train", 100):
        puzzle, card = task.key, sum(task.key.pair)
        by_trying = [(p, q) for i, p in enumerate(puzzle.prices) for q in puzzle.prices[i + 1 :] if p + q == card]
        assert by_trying == [puzzle.pair] and max(puzzle.prices) < card
        assert gift_card.think_about(puzzle, random.Random(0)).count(str(puzzle.pair[1])) >= 1
        assert gift_card.check_of(puzzle, puzzle.pair).correct
        assert not gift_card.check_of(puzzle, gift_card.wrong_pair(puzzle, random.Random(1))).correct


def test_a_price_that_is_not_there_is_no_pair() -> None:
    puzzle = gift_card.Puzzle(prices=[10, 20, 30, 25], pair=(20, 30))
    assert gift_card.check_of(puzzle, (5, 45)).model_dump() == {
        "sum": 50,
        "card": 50,
        "listed": False,
        "correct": False,
    }
    assert not gift_card.check_of(puzzle, (25, 25)).correct


def test_pairs_are_scored_in_either_order() -> None:
    tasks = gift_card.tasks("tune", 5)
    for task in tasks:
        first, second = task.key.pair
        assert tasks.score(task, gift_card.Pair(first=second, second=first)) == 1.0
        assert tasks.score(task, gift_card.Pair(first=first, second=first)) == 0.0


@pytest.mark.parametrize("workflow", ["ledger", "gift_card"])
def test_the_single_adapter_has_the_ranks_and_steps_of_all_roles_together(workflow: str) -> None:
    recipes = {path.stem: load_recipe(path) for path in sorted((EXAMPLES / "recipes").glob(f"{workflow}_*.yaml"))}
    roles = [f"{workflow}_{name}" for name in load(workflow).graph.build().roles()]
    lora = {name: recipe.methods[0].model_dump() for name, recipe in recipes.items()}
    for amount in ("rank", "steps"):
        assert lora[f"{workflow}_single"][amount] == sum(lora[name][amount] for name in roles)
    assert len(read_rows(recipes[f"{workflow}_reader"])) > 100


def test_a_files_verifiers_are_those_of_the_workflow_that_is_run() -> None:
    file = EXAMPLES / "ledger.py"
    assert set(load_workflow(str(file)).verifiers()) == {"reader", "accountant"}
    assert set(load_workflow(f"{file}:staged").verifiers()) == {"reader"}
