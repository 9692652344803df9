"""Thinking and answering as steps of their own, each on a variant of its own, against one variant for both.

    metier make examples/recipes/ledger_staged.yaml     (and ledger_reader.yaml)
    python benchmarks/thinking_stages.py --shelf SHELF

The graph is `staged` of examples/ledger.py on TEST_TASKS fresh tasks. The reference is one variant for both stages;
its later stage reads the thought again, and that prefill is in its CPU-seconds as in everybody's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
from thinking_budgets import TEST_SEED, TEST_TASKS, arm_row

from metier.router.probing.outcomes import Outcome
from metier.router.space import Candidate, Part
from metier.runtime.trials.run_probe import ProbeOptions, Trials, open_trials

WORKFLOW = Path(__file__).parents[1] / "examples" / "ledger.py"
READER, TUNED = "ledger-reader", "ledger-staged"
ARMS: Mapping[str, tuple[str, str]] = {
    "one variant for both": (TUNED, TUNED),
    "think on the variant, answer on the base": (TUNED, "base"),
    "think on the base, answer on the variant": ("base", TUNED),
    "both on the base": ("base", "base"),
}


async def run_arm(trials: Trials, think: str, answer: str, test_tasks: int) -> list[Outcome]:
    """The staged workflow with these variants."""
    tasks = trials.file.tasks(f"test:{test_tasks}:{TEST_SEED}")
    played = {"reader": READER, "thinker": think, "answerer": answer}
    choices = {Part(role): Candidate(variant) for role, variant in played.items()}
    return await trials.evaluator(tasks).outcomes(choices, [task.id for task in tasks])


async def measure(shelf: Path, folder: Path, test_tasks: int) -> list[dict[str, Any]]:
    """All arms, paired with the first."""
    options = ProbeOptions(
        workflow=f"{WORKFLOW}:staged", tasks="tune:1", variants=("base", READER, TUNED), shelf=(str(shelf),)
    )
    records: list[dict[str, Any]] = []
    reference: list[Outcome] | None = None
    async with open_trials(options, folder) as trials:
        for arm, (think, answer) in ARMS.items():
            outcomes = await run_arm(trials, think, answer, test_tasks)
            reference = reference or outcomes
            prefilled = sum(a.prompt_tokens - a.cached_tokens for o in outcomes for a in o.asks if a.role == "answerer")
            again = {"answerer_prefill_tokens": round(prefilled / len(outcomes), 1)}
            records.append({**arm_row(arm, outcomes, reference), **again})
            print(json.dumps(records[-1]), flush=True)
    return records


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shelf", type=Path, default=Path("examples/variants"))
    parser.add_argument("--folder", type=Path, default=Path("runs/thinking/stages"))
    parser.add_argument("--test-tasks", type=int, default=TEST_TASKS)
    options = parser.parse_args()
    records = anyio.run(measure, options.shelf, options.folder, options.test_tasks)
    (options.folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


if __name__ == "__main__":
    main()
