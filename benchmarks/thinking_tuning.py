"""A role that thinks: trained on a program's traces, then length-tuned, against budget forcing of the bare base.

    metier make examples/recipes/ledger_accountant.yaml, then ledger_accountant_short.yaml
    python benchmarks/thinking_tuning.py --shelf SHELF

The accountant's asks of TEST_ROWS fresh ledgers, greedy, every variant with every budget; differences are paired with
the variant trained on traces at the same budget. Seeds and budgets were committed before the first test row was asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
from harness import arguments, write_rows
from thinking_budgets import load_module

from metier.agents import ThinkingProfile
from metier.runtime.trials.probe_options import ProbeOptions
from metier.runtime.trials.run_probe import open_trials
from metier.specializers.methods.role_quality import RoleQuality, measure_role, paired_interval

WORKFLOW = Path(__file__).parents[1] / "examples" / "ledger.py"
VARIANTS = {"traces": "ledger-accountant", "shortest correct": "ledger-accountant-short", "base": None}
BUDGETS = (0, 8, 16, 32, 64)
TEST_ROWS, TEST_SEED = 300, 12


def row_of(arm: str, budget: int, found: RoleQuality, reference: RoleQuality) -> dict[str, Any]:
    """One line of the table."""
    n = len(found.scores)
    _, low, high = paired_interval(found.scores, [0.0] * n)
    return {
        "arm": arm,
        "budget": budget,
        "rows": n,
        "right": round(found.mean, 4),
        "interval": [round(low, 4), round(high, 4)],
        "minus_traces": [round(v, 4) for v in paired_interval(found.scores, reference.scores)],
        "thinking_tokens": round(found.thinking_tokens / n, 2),
        "cpu_ms": round(found.cpu_ms_per_ask, 2),
    }


async def measure(shelf: Path, folder: Path) -> list[dict[str, Any]]:
    """All variants at all budgets."""
    ledger = load_module(WORKFLOW)
    rows = list(ledger.accountant_rows(TEST_ROWS, TEST_SEED, "test"))
    names = tuple(variant for variant in VARIANTS.values() if variant)
    options = ProbeOptions(workflow=str(WORKFLOW), tasks="tune:1", variants=("base", *names), shelf=(str(shelf),))
    records = []
    async with open_trials(options, folder) as trials:
        for budget in BUDGETS:
            reference: RoleQuality | None = None
            for arm, variant in VARIANTS.items():
                found = await measure_role(
                    trials.backend, ledger.accountant, rows, variant, thinking=ThinkingProfile(max_tokens=budget)
                )
                reference = reference or found
                records.append(row_of(arm, budget, found, reference))
                print(json.dumps(records[-1]), flush=True)
    return records


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--shelf", type=Path, default=Path("examples/variants"))
    parser.add_argument("--folder", type=Path, default=Path("runs/thinking/tuning"))
    options = parser.parse_args()
    records = anyio.run(measure, options.shelf, options.folder)
    write_rows(options.folder / "results.jsonl", records)


if __name__ == "__main__":
    main()
