"""Cost of pass and the interval of its ratio, by hand and against the slow way."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from cost_of_pass import Arm, paired, ratio_interval, show  # noqa: E402


def block(scores: str, cpu_s: float, first: int = 0) -> dict[str, Any]:
    runs = [{"task": str(first + i), "score": float(c), "cpu_s": 0.5, "thinking": 2} for i, c in enumerate(scores)]
    return {"runs": runs, "cpu_s": cpu_s, "wall_s": 3.0, "others": 0.02, "engines_mib": 900}


def test_what_a_process_used_is_shared_out_over_its_tasks() -> None:
    arm = Arm.of("a", [block("1101", 4.0), block("01", 3.0, first=4)])
    assert arm.cpu_s.tolist() == [1.0, 1.0, 1.0, 1.0, 1.5, 1.5]
    assert arm.cost_of_pass == 7.0 / 4 and arm.wall_s == 6.0


def test_arms_are_paired_by_task() -> None:
    one, other = paired(Arm.of("a", [block("110", 3.0, first=1)]), Arm.of("b", [block("0011", 4.0)]))
    assert one.tasks == other.tasks == ("1", "2", "3")
    assert other.scores.tolist() == [0.0, 1.0, 1.0]


def test_the_ratio_is_that_of_costs_and_its_interval_holds_it() -> None:
    dear, cheap = Arm.of("dear", [block("10" * 40, 160.0)]), Arm.of("assigned", [block("1110" * 20, 40.0)])
    ratio, low, high = ratio_interval(dear, cheap)
    assert ratio == pytest.approx((160 / 40) / (40 / 60))
    assert low < ratio < high
    # The slow way, one resample after the other.
    rng = np.random.default_rng(1)
    slow = []
    for _ in range(500):
        at = rng.integers(80, size=80)
        slow.append(dear.cpu_s[at].sum() / dear.scores[at].sum() * cheap.scores[at].sum() / cheap.cpu_s[at].sum())
    assert (low, high) == pytest.approx(tuple(np.percentile(slow, (2.5, 97.5))), rel=0.1)


def test_an_arm_that_solves_nothing_has_no_cost_of_pass() -> None:
    none, some = Arm.of("base", [block("0000", 2.0)]), Arm.of("assigned", [block("1011", 2.0)])
    assert math.isinf(none.cost_of_pass) and math.isinf(ratio_interval(none, some)[1])
    text = show("w", [none, some], against=("base",))
    assert "none solved" in text and "| base | assigned | inf" in text
