"""T-REX against LoRA of equal parameters, one LoRA per kind, and the base, on mixed puzzles.

    python benchmarks/trex_study.py                       # the table of what has been measured (no training)
    python benchmarks/trex_study.py --train --evaluate --arms lora trex --folder runs/trex-study

Arms: `trex` (2 input and 4 output vectors), `trex-no-intuition` (c = 0; a small random router breaks the
symmetry that the released initialisation would keep), `lora` (rank 7: equal parameters), `lora-per-kind` (one
such LoRA for each kind, on the mixture's rows of that kind), `base`. The first three see the same rows in the
same order, with the same steps, batches and schedule, each at the learning rate that was best for it over 48 steps
(`--rates`; `lora-slow` is the LoRA at the rate of the other examples). Rows are seen once. Answers come from the
real engine, greedy, under the answer type's grammar, and count when the kind's own score is 1.0. What exists is
skipped, so a run that was stopped goes on; every (arm, kind) is written as it is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from harness import RESAMPLES, append_row, arguments, interval, read_rows
from made_variants import make, say

from metier.agents import Ask, render_prompt
from metier.agents.answers.answer_schema import answer_schema
from metier.agents.answers.answers import parse_answer
from metier.agents.errors import AnswerError
from metier.agents.prompts import task_text
from metier.agents.tasksets import Task
from metier.agents.traffic import write_traffic
from metier.runtime.engines.pool import EnginePool
from metier.runtime.settings.engine import EngineSettings
from metier.specializers import Shelf, find_base, load_recipe
from metier.specializers.recipes.produce import produce
from metier.specializers.recipes.recipe import Recipe, TrafficData

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from mixed_puzzles import KINDS, Answer, kind_rows, kind_tasks, solver  # noqa: E402

ARMS = ("trex", "trex-no-intuition", "lora", "lora-slow", "lora-per-kind", "base")
RECIPES = ROOT / "examples" / "recipes"
RESULTS = Path(__file__).parent / "trex_study.jsonl"
TEST_PUZZLES_PER_PART = 60
"""Fresh test puzzles per kind in one part; intervals narrow with every further part (`--parts`)."""
PER_KIND_BATCH_ROWS = 8
"""Half the mixture's batch: a kind has few rows, and its LoRA should still take enough steps."""
SLOW_RATE = 0.001
"""The rate that the other examples' LoRAs were tuned to, for an arm beside the one tuned to these puzzles."""


# ---- training -----------------------------------------------------------------------------------------------


def recipes(arm: str, seed: int, folder: Path) -> Iterator[Recipe]:
    """The recipes of an arm's variants; none for the base."""
    if arm == "trex":
        yield load_recipe(RECIPES / "trex.yaml").model_copy(update={"seed": seed})
    elif arm == "trex-no-intuition":
        with_intuition = load_recipe(RECIPES / "trex.yaml")
        methods = tuple(method.model_copy(update={"intuition": False}) for method in with_intuition.methods)
        yield with_intuition.model_copy(update={"name": arm, "seed": seed, "methods": methods})
    elif arm == "lora":
        yield load_recipe(RECIPES / "mixed_lora.yaml").model_copy(update={"seed": seed})
    elif arm == "lora-slow":
        mixture = next(recipes("lora", seed, folder))
        methods = tuple(method.model_copy(update={"learning_rate": SLOW_RATE}) for method in mixture.methods)
        yield mixture.model_copy(update={"name": arm, "methods": methods})
    elif arm == "lora-per-kind":
        yield from (per_kind_recipe(kind, seed, folder) for kind in KINDS)


def per_kind_recipe(kind: str, seed: int, folder: Path) -> Recipe:
    """The mixture's LoRA recipe for one kind: its share of the rows, each seen once, in smaller batches."""
    mixture = next(recipes("lora", seed, folder))
    (lora,) = mixture.methods
    size = mixture.data.model_dump()["size"] // len(KINDS)
    rows = folder / f"rows-{kind}-{seed}.jsonl"
    if not rows.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_traffic(rows, kind_rows(kind, size, seed))
    settings = {
        "batch_rows": PER_KIND_BATCH_ROWS,
        "steps": size // PER_KIND_BATCH_ROWS,
        "warmup_steps": lora.model_dump()["warmup_steps"] // 2,
    }
    return mixture.model_copy(
        update={
            "name": f"lora-{kind.replace('_', '-')}",
            "data": TrafficData(traffic=rows.name),
            "folder": folder,
            "methods": (lora.model_copy(update=settings),),
        }
    )


def train(arms: Iterable[str], seed: int, folder: Path) -> None:
    """Make every variant of the arms that is not there yet."""
    shelf = Shelf(folder / f"shelf-{seed}")
    for arm in arms:
        for recipe in recipes(arm, seed, folder):
            make(arm, recipe, shelf)


def progressive_loss(arm: str, settings: dict[str, Any], seed: int, folder: Path, last: int = 16) -> float:
    """Mean loss of a short run's last steps, each taken before the rows were learned from: to choose a rate.

    The rows are seen once, so this is a loss on unseen rows, without touching tune or test puzzles.
    """
    (recipe,) = recipes(arm, seed, folder)
    methods = tuple(type(m).model_validate({**m.model_dump(), **settings}) for m in recipe.methods)
    name = "rate-" + "-".join([arm, *(f"{value:g}" for value in settings.values())])
    shelf = Shelf(folder / "shelf-rates")
    short = recipe.model_copy(update={"name": name, "methods": methods})
    variant = produce(short, shelf=shelf, base="smollm2-135m", on_progress=say)
    log = (shelf.path(variant) / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    return float(np.mean([json.loads(line)["loss"] for line in log[-last:]]))


# ---- evaluation ---------------------------------------------------------------------------------------------


def variant_name(arm: str, kind: str, seed: int, folder: Path) -> str | None:
    """Which variant of an arm answers puzzles of a kind."""
    names = [recipe.name for recipe in recipes(arm, seed, folder)]
    return (names[list(KINDS).index(kind)] if len(names) > 1 else names[0]) if names else None


async def evaluate(arms: Sequence[str], parts: int, seed: int, folder: Path, results: Path) -> None:
    """Ask every arm every test puzzle that it has not answered yet, in one engine with all their adapters."""
    done = {(row["arm"], row["kind"], row["part"]) for row in read_rows(results) if row["seed"] == seed}
    cells = ((arm, kind, part) for part in range(parts) for arm in arms for kind in KINDS)
    open_cells = [cell for cell in cells if cell not in done]
    if not open_cells:
        return
    shelf = Shelf(folder / f"shelf-{seed}")
    wanted = {cell: variant_name(*cell[:2], seed, folder) for cell in open_cells}
    slots = len({name for name in wanted.values() if name is not None})
    settings = EngineSettings(adapter_slots=max(1, slots), max_running=16, max_model_tokens=512)
    base = find_base("smollm2-135m")
    async with EnginePool(base, lambda name: (shelf.get(name), shelf.path(name)), settings, adapters=slots > 0) as pool:
        for (arm, kind, part), name in wanted.items():
            tasks = kind_tasks(kind, "test", (part + 1) * TEST_PUZZLES_PER_PART)
            fresh = tasks.tasks[-TEST_PUZZLES_PER_PART:]
            replies = await ask_all(pool, fresh, name)
            solved = "".join("1" if tasks.score(task, replies[task.id]) == 1.0 else "0" for task in fresh)
            identity = None if name is None else shelf.get(name).id
            row = {"seed": seed, "arm": arm, "kind": kind, "part": part, "variant": identity, "solved": solved}
            append_row(results, row)
            print(f"{arm} {kind}, part {part}: {solved.count('1') / len(solved):.3f}", flush=True)


async def ask_all(pool: EnginePool, tasks: Sequence[Task], variant: str | None) -> dict[str, Answer | None]:
    """Answers by task id; None for one that does not fit the answer type."""
    replies: dict[str, Answer | None] = {}

    async def ask_one(task: Task) -> None:
        ask = Ask(
            run_id=f"{variant}-{task.id}",
            step_path=solver.name,
            role=solver.name,
            messages=render_prompt(solver, {"puzzle": task.input}),
            variant=variant,
            answer_schema=answer_schema(Answer),
            max_tokens=solver.max_tokens,
            task=task_text(task.input),
        )
        reply = await pool.reply(ask)
        try:
            replies[task.id] = parse_answer(reply.text, Answer)
        except AnswerError:
            replies[task.id] = None

    async with anyio.create_task_group() as asks:
        for task in tasks:
            asks.start_soon(ask_one, task)
    return replies


# ---- the table ----------------------------------------------------------------------------------------------


def solved_by(results: list[dict[str, Any]], arm: str, seed: int) -> np.ndarray | None:
    """Array [kinds, puzzles] of 0 and 1, of the parts that are whole; None when there is none."""
    rows = {(r["part"], r["kind"]): r["solved"] for r in results if (r["arm"], r["seed"]) == (arm, seed)}
    parts: list[list[list[int]]] = []
    while all((len(parts), kind) in rows for kind in KINDS):
        parts.append([[int(c) for c in rows[len(parts), kind]] for kind in KINDS])
    return np.concatenate([np.array(part) for part in parts], axis=1) if parts else None


def mean_over_kinds(solved: np.ndarray) -> tuple[float, float, float]:
    """Mean over kinds with its 95 % bootstrap interval, in per cent; puzzles are drawn anew within each kind."""
    kinds, puzzles = solved.shape
    drawn = np.random.default_rng(0).integers(puzzles, size=(RESAMPLES, kinds, puzzles))
    low, high = interval(100 * np.take_along_axis(solved[None], drawn, axis=2).mean(axis=(1, 2)))
    return 100 * float(solved.mean()), low, high


def print_tables(results: list[dict[str, Any]]) -> None:
    """Accuracy per arm and kind, and paired differences on the same puzzles; one pair of tables a seed."""
    for seed in sorted({row["seed"] for row in results}):
        measured = {arm: solved for arm in ARMS if (solved := solved_by(results, arm, seed)) is not None}
        print(f"\nSeed {seed}: per cent of test puzzles solved\n")
        print(f"| arm | mean over kinds (95 %) | {' | '.join(KINDS)} | puzzles per kind |")
        print("|---" * (len(KINDS) + 3) + "|")
        for arm, solved in measured.items():
            mean, low, high = mean_over_kinds(solved)
            by_kind = " | ".join(f"{100 * kind.mean():.0f}" for kind in solved)
            print(f"| {arm} | {mean:.1f} ({low:.1f} to {high:.1f}) | {by_kind} | {solved.shape[1]} |")
        print("\n| paired difference | points (95 %) |\n|---|---|")
        for one, other in (
            ("trex", "lora"),
            ("trex", "lora-slow"),
            ("trex", "trex-no-intuition"),
            ("trex-no-intuition", "lora"),
            ("trex", "lora-per-kind"),
            ("lora", "lora-per-kind"),
        ):
            if one in measured and other in measured:
                common = min(measured[one].shape[1], measured[other].shape[1])
                mean, low, high = mean_over_kinds(measured[one][:, :common] - measured[other][:, :common])
                print(f"| {one} - {other} | {mean:+.1f} ({low:+.1f} to {high:+.1f}) |")


def main() -> None:
    """Parse options; without any, print what has been measured."""
    parser = arguments(__doc__)
    parser.add_argument("--train", action="store_true", help="make the variants that are missing (an hour or more)")
    parser.add_argument("--evaluate", action="store_true", help="ask the engine what has not been asked")
    parser.add_argument("--rates", type=float, nargs="+", default=[], help="compare learning rates over 48 steps")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--parts", type=int, default=1, help="parts of 60 test puzzles per kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "trex-study", help="variants and rows")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for arm in options.arms if options.rates else ():
        for rate in options.rates:
            loss = progressive_loss(arm, {"steps": 48, "learning_rate": rate}, options.seed, options.folder)
            print(f"{arm}, learning rate {rate:g}: loss {loss:.4f}", flush=True)
    if options.train:
        train(options.arms, options.seed, options.folder)
    if options.evaluate:
        anyio.run(evaluate, options.arms, options.parts, options.seed, options.folder, options.results)
    print_tables(read_rows(options.results))


if __name__ == "__main__":
    main()
