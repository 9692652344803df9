"""A first round on one variant or budget and later rounds on another, against one of them in every round.

    metier make examples/recipes/gift_card_single.yaml, then gift_card_single_w8a8.yaml
    python benchmarks/round_split.py --shelf SHELF

examples/gift_card.py on TEST_TASKS fresh shops: the finder may guess at first and think only when the checker says no,
or begin on the 8-bit variant and go on with the whole one. Reader and checker do the same in every arm. Arms, seed and
budget were committed before the first task was run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thinking_budgets import run_arms, run_study

from metier.router.space import Candidate, Part
from metier.runtime.trials.probe_options import ProbeOptions
from metier.runtime.trials.run_probe import open_trials

WORKFLOW = Path(__file__).parents[1] / "examples" / "gift_card.py"
WHOLE, EIGHT_BIT = "gift-card-single", "gift-card-single-w8a8"
THINKS, GUESSES = Candidate(WHOLE, 64), Candidate(WHOLE, 0)
OTHERS = {Part("reader"): GUESSES, Part("checker", "first"): GUESSES, Part("checker", "later"): GUESSES}
ARMS: Mapping[str, tuple[Candidate, Candidate]] = {
    "thinks in every round": (THINKS, THINKS),
    "never thinks": (GUESSES, GUESSES),
    "guesses first, then thinks": (GUESSES, THINKS),
    "thinks first, then guesses": (THINKS, GUESSES),
    "8 bits in every round": (Candidate(EIGHT_BIT, 64), Candidate(EIGHT_BIT, 64)),
    "8 bits first, then 16": (Candidate(EIGHT_BIT, 64), THINKS),
}


async def measure(shelf: Path, folder: Path, test_tasks: int) -> list[dict[str, Any]]:
    """All arms, paired with the first."""
    options = ProbeOptions(
        workflow=str(WORKFLOW), tasks="tune:1", variants=("base", WHOLE, EIGHT_BIT), shelf=(str(shelf),)
    )
    arms = {arm: OTHERS | {Part("finder", "first"): a, Part("finder", "later"): b} for arm, (a, b) in ARMS.items()}
    async with open_trials(options, folder) as trials:
        return await run_arms(trials, arms, test_tasks)


if __name__ == "__main__":
    run_study(__doc__, Path("runs/rounds"), measure)
