"""Measure the three roles, before and after tuning, and the whole loop, with transformers instead of an engine.

    python examples/evaluate_roles.py --shelf examples/variants --write

Greedy, no grammar, on the tune split (the test split is for the demo). `--write` puts the numbers on the cards.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from puzzles import (
    Answer,
    Plan,
    critic,
    critic_rows,
    evaluate,
    planner,
    planner_rows,
    puzzle_tasks,
    read_terms,
    solver,
    solver_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from metier.agents import AnswerError, Message, Role, parse_answer, render_prompt
from metier.specializers import Shelf, find_base

ROLES: dict[str, tuple[Role, Callable[..., Any], Callable[[Any], Any]]] = {
    "planner": (planner, planner_rows, lambda plan: evaluate(read_terms(plan.expression))),
    "solver": (solver, solver_rows, lambda answer: answer.value),
    "critic": (critic, critic_rows, lambda verdict: verdict.correct),
}


class Team:
    """The base with one adapter per role."""

    def __init__(self, shelf: Shelf) -> None:
        base = find_base("smollm2-135m")
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        for variant in shelf.list():
            folder = shelf.path(variant) / "adapter"
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(folder, variant.name)
            else:
                self.model = PeftModel.from_pretrained(self.model, folder, variant.name)
        self.model.eval()

    @torch.inference_mode()
    def ask(self, role: Role, prompts: Sequence[Sequence[Message]], tuned: bool = True) -> list[Any]:
        """Typed answers in the order of the prompts; None for a reply that does not fit."""
        texts = [
            self.tokenizer.apply_chat_template(
                [message.model_dump() for message in messages], add_generation_prompt=True, tokenize=False
            )
            for messages in prompts
        ]
        if tuned:
            self.model.set_adapter(role.name)
        with nullcontext() if tuned else self.model.disable_adapter():
            batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            tokens = self.model.generate(**batch, max_new_tokens=role.max_tokens, do_sample=False)
        replies = self.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_parsed(reply, role) for reply in replies]


def _parsed(reply: str, role: Role) -> Any:
    try:
        return parse_answer(reply, role.gives)
    except AnswerError:
        return None


def role_accuracy(team: Team, name: str, size: int, tuned: bool) -> float:
    """Share of replies that mean the same as the teacher's: the expression's value, the value, the verdict."""
    role, rows_of, meaning = ROLES[name]
    rows = list(rows_of(size=size, seed=0, split="tune"))
    right = 0
    for answer, row in zip(team.ask(role, [row.messages for row in rows], tuned), rows, strict=True):
        try:
            right += answer is not None and meaning(answer) == meaning(parse_answer(row.reply, role.gives))
        except (ValueError, IndexError):  # an expression that is none
            pass
    return right / len(rows)


def run_loop(team: Team, size: int, tuned: bool = True, max_rounds: int = 3) -> dict[str, float]:
    """The workflow on tune puzzles: plan, solve, check, again while the critic objects."""
    tasks = puzzle_tasks("tune", size, seed=1)
    open_runs = list(tasks)
    verdicts: dict[str, Any] = {}
    answers: dict[str, Any] = {}
    started = []
    for _ in range(max_rounds):
        if not open_runs:
            break
        started.append(len(open_runs))
        plans = team.ask(
            planner,
            [render_prompt(planner, {"puzzle": t.input, "verdict": verdicts.get(t.id)}) for t in open_runs],
            tuned,
        )
        plans = [plan or Plan(expression="") for plan in plans]
        found = team.ask(solver, [render_prompt(solver, {"plan": plan}) for plan in plans], tuned)
        found = [answer or Answer(steps="", value=0) for answer in found]
        checks = team.ask(
            critic,
            [render_prompt(critic, {"puzzle": t.input, "answer": a}) for t, a in zip(open_runs, found, strict=True)],
            tuned,
        )
        for task, answer, check in zip(open_runs, found, checks, strict=True):
            answers[task.id], verdicts[task.id] = answer, check
        open_runs = [t for t in open_runs if not (verdicts[t.id] and verdicts[t.id].correct)]
    solved = {t.id: tasks.score(t, answers[t.id]) for t in tasks}
    result = {
        "solved": sum(solved.values()) / size,
        "second_round": (started[1] if len(started) > 1 else 0) / size,
        "third_round": (started[2] if len(started) > 2 else 0) / size,
        "never_accepted": len(open_runs) / size,
    }
    for kind in ("leg", "chain", "basic"):
        of_kind = [score for id_, score in solved.items() if id_.startswith(kind)]
        result[f"solved_{kind}"] = sum(of_kind) / max(1, len(of_kind))
    return {key: round(value, 3) for key, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shelf", type=Path, default=Path(__file__).parent / "variants")
    parser.add_argument("--size", type=int, default=48, help="puzzles per measurement")
    parser.add_argument("--write", action="store_true", help="write the accuracies on the variants' cards")
    arguments = parser.parse_args()
    shelf = Shelf(arguments.shelf)
    team = Team(shelf)
    for variant in reversed(shelf.list()):
        before, after = (role_accuracy(team, variant.name, arguments.size, tuned) for tuned in (False, True))
        print(f"{variant.name}: {before:.3f} before, {after:.3f} after", flush=True)
        if arguments.write:
            card = {"tune_accuracy_before": round(before, 4), "tune_accuracy_after": round(after, 4)}
            shelf.annotate(variant, {**card, "tune_rows": arguments.size})
    if len(shelf.list()) == len(ROLES):
        print("loop, tuned:", json.dumps(run_loop(team, arguments.size)), flush=True)
        print("loop, base: ", json.dumps(run_loop(team, arguments.size, tuned=False)), flush=True)


if __name__ == "__main__":
    main()
