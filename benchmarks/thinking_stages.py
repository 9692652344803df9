"""Thinking and answering as steps of their own, each on a variant of its own, against one variant for both.

    metier make examples/recipes/ledger_staged.yaml     (and ledger_reader.yaml)
    python benchmarks/thinking_stages.py --shelf SHELF

The graph is `staged` of examples/ledger.py on TEST_TASKS fresh tasks. The reference is one variant for both stages;
its later stage reads the thought again, and that prefill is in its CPU-seconds as in everybody's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinking_budgets import run_arms, run_study

from metier.router.probing.outcomes import Outcome
from metier.router.space import Candidate, Part
from metier.runtime.trials.probe_options import ProbeOptions
from metier.runtime.trials.run_probe import open_trials

WORKFLOW = Path(__file__).parents[1] / "examples" / "ledger.py"
READER, TUNED = "ledger-reader", "ledger-staged"
ARMS: Mapping[str, tuple[str, str]] = {
    "one variant for both": (TUNED, TUNED),
    "think on the variant, answer on the base": (TUNED, "base"),
    "think on the base, answer on the variant": ("base", TUNED),
    "both on the base": ("base", "base"),
}


def choices_of(think: str, answer: str) -> dict[Part, Candidate]:
    """The staged workflow with these variants."""
    played = {"reader": READER, "thinker": think, "answerer": answer}
    return {Part(role): Candidate(variant) for role, variant in played.items()}


def read_again(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Prompt tokens a task that the answering stage had to compute."""
    prefilled = sum(a.prompt_tokens - a.cached_tokens for o in outcomes for a in o.asks if a.role == "answerer")
    return {"answerer_prefill_tokens": round(prefilled / len(outcomes), 1)}


async def measure(shelf: Path, folder: Path, test_tasks: int) -> list[dict[str, Any]]:
    """All arms, paired with the first."""
    options = ProbeOptions(
        workflow=f"{WORKFLOW}:staged", tasks="tune:1", variants=("base", READER, TUNED), shelf=(str(shelf),)
    )
    arms = {arm: choices_of(*played) for arm, played in ARMS.items()}
    async with open_trials(options, folder) as trials:
        return await run_arms(trials, arms, test_tasks, read_again)


if __name__ == "__main__":
    run_study(__doc__, Path("runs/thinking/stages"), measure)
