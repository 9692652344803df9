"""What every benchmark is built on: whose turn it is, what is kept, and how it is said."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import harness


@dataclass(frozen=True)
class Took:
    cpu_s: float


def test_every_arm_runs_once_a_round_and_the_first_one_changes() -> None:
    turns = list(harness.paired_rounds(["a", "b", "c"], 2))
    assert turns == [(n, arm) for n, order in enumerate(("abc", "bca", "cab")) for arm in order]
    assert harness.in_turns([], 3) == []


def test_the_first_round_is_not_kept_and_figures_are_compared_within_rounds(tmp_path: Path) -> None:
    samples: harness.Samples[str, Took] = harness.Samples(["base", "ours"], tmp_path / "new" / "journal.jsonl")
    for number, arm in harness.paired_rounds(["base", "ours"], 2):
        samples.keep(number, arm, Took(float(1 + number) * (3 if arm == "ours" else 1)))
    assert samples.values("base", lambda took: took.cpu_s) == [2.0, 3.0]
    assert samples.ratios("ours", "base", lambda took: took.cpu_s) == [3.0, 3.0]
    assert samples.differences("ours", "base", lambda took: took.cpu_s) == [4.0, 6.0]
    rows = harness.read_rows(tmp_path / "new" / "journal.jsonl")
    assert [(row["round"], row["arm"], row["sample"]) for row in rows] == [
        (1, "ours", {"cpu_s": 6.0}), (1, "base", {"cpu_s": 2.0}),
        (2, "base", {"cpu_s": 3.0}), (2, "ours", {"cpu_s": 9.0}),
    ]  # fmt: skip
    assert rows[0]["machine"] == harness.machine()


def test_a_block_is_measured_in_cpu_seconds_beside_wall() -> None:
    with harness.clocked() as spent:
        began_s = time.process_time()
        while time.process_time() - began_s < 0.05:
            pass
    assert spent.wall_s > 0.0 and spent.cpu_s >= 0.05
    assert 0.0 <= spent.others
    with harness.clocked(lambda: 7.0) as none:
        pass
    assert none.cpu_s == 0.0


@pytest.mark.parametrize(
    ("values", "form", "shown"),
    [
        ([3.0, 1.0, 2.0], ".1f", "2.0 (1.0-3.0)"),
        ([0.5, -1.0], ".2f", "-0.25 (-1.00 to 0.50)"),
        ([1.0], "+.1f", "+1.0 (+1.0 to +1.0)"),
        ([], ".2f", ""),
    ],
)
def test_a_spread_is_the_median_with_its_extremes(values: list[float], form: str, shown: str) -> None:
    assert harness.spread(values, form) == shown


def test_tables_and_journals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harness.print_table(("arm", "s"), [("ours", "1"), ("base", "2")])
    assert capsys.readouterr().out == "| arm | s |\n|---|---|\n| ours | 1 |\n| base | 2 |\n"
    assert harness.read_rows(tmp_path / "rows.jsonl") == []
    harness.write_rows(tmp_path / "rows.jsonl", [{"a": 1}])
    harness.append_row(tmp_path / "rows.jsonl", {"a": 2})
    assert harness.read_rows(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 2}]


def test_intervals_are_drawn_the_same_each_time() -> None:
    values = np.random.default_rng(1).normal(size=200)
    draws = harness.resamples(len(values))
    assert draws.shape == (harness.RESAMPLES, 200) and (draws == harness.resamples(len(values))).all()
    low, high = harness.interval(values[draws].mean(axis=1))
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.03)


def test_the_machine_is_named() -> None:
    assert f"{os.cpu_count()} cores" in harness.machine()
    assert harness.resident_mib() > 1.0
    assert harness.tree_cpu_s() > 0.0
