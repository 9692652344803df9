"""The selectors of agentopt-py (0.1.0, Apache-2.0) on a recorded table, with their own defaults.

    PYTHON benchmarks/agentopt_search.py TABLE SELECTOR SHUFFLES      # prints a line of JSON for each shuffle

Needs nothing but agentopt-py, so that the Python of an environment of its own can run it. `lm_proposal` needs a
language model that knows the candidates by name, `bayesian` needs botorch: they fail without.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import sys
from pathlib import Path
from typing import Any

from outcome_table import Cast, Meter, Table

SELECTORS = (
    "brute_force",
    "random",
    "hill_climbing",
    "arm_elimination",
    "epsilon_lucb",
    "threshold",
    "lm_proposal",
    "bayesian",
)


def select(selector: str, table: Table, meter: Meter, seed: int) -> Cast:
    """What a selector chooses; its agent looks runs up in the table."""
    from agentopt import LLMTracker, ModelSelector  # type: ignore[import-not-found]

    class Agent:
        def __init__(self, models: dict[str, str]) -> None:
            self.cast = tuple(models[role] for role in table.roles)

        def run(self, task: int) -> float:
            return meter.score(self.cast, task)

    rng = random.Random(seed)
    random.seed(seed)
    tasks = rng.sample(range(len(table.tasks)), len(table.tasks))
    variants = rng.sample(table.variants, len(table.variants))
    options: dict[str, Any] = {"seed": seed} if selector in ("random", "hill_climbing") else {}
    if selector != "lm_proposal":
        options["tracker"] = LLMTracker(cache=False)  # nothing goes over the wire, and a cache would leave files behind
    with contextlib.redirect_stdout(io.StringIO()):
        found = ModelSelector(
            agent=Agent,
            models={role: list(variants) for role in table.roles},
            eval_fn=lambda expected, actual: actual,
            dataset=[(task, task) for task in tasks],
            method=selector,
            **options,
        ).select_best()
    best = found.get_best_combo()
    return tuple(best[role] for role in table.roles)


def main() -> None:
    """Run a selector on a table, shuffle after shuffle."""
    path, selector, shuffles = sys.argv[1:]
    logging.disable(logging.WARNING)
    table = Table.read(Path(path))
    for seed in range(int(shuffles)):
        meter = Meter(table)
        cast = select(selector, table, meter, seed)
        print(json.dumps({"cast": cast, "evaluations": len(meter.seen), "asks": len(meter.asked)}), flush=True)


if __name__ == "__main__":
    main()
