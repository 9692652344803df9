"""Engines in processes of their own, compared in turns: real processes, whose engine is a formula."""

from __future__ import annotations

import argparse
import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from engine_process import Sample, Worker, compare, disturbed, least_disturbed, paired_columns  # noqa: E402

ENGINE = """
import sys
sys.path.insert(0, {benchmarks!r})
from engine_process import Sample, answer_with
asked = 0
def measure(workload):
    global asked
    asked += 1
    return Sample({speed} * (2.0 if workload == "prefill" else 1.0), 1.0, {others}, float(asked))
print("what libraries say on standard output is skipped")
answer_with(measure)
"""


def start(speed: float, others: float = 0.0) -> Worker:
    """A process that says it is so fast, and that other programs took such a share meanwhile."""
    return Worker(["-c", ENGINE.format(benchmarks=str(BENCHMARKS), speed=speed, others=others)], threads=1)


def options(rounds: int, retries: int = 0, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(rounds=rounds, retries=retries, journal=None, **more)


def test_workloads_are_measured_where_they_are_had_and_ratios_taken_within_rounds() -> None:
    engines = {"base": partial(start, 100.0), "ours": partial(start, 50.0)}
    workloads = {"base": ["decode-1", "prefill"], "ours": ["prefill"]}
    samples = compare(engines, workloads, options(2))
    assert {arm: len(samples[arm]) for arm in samples} == {
        ("base", "decode-1"): 2, ("base", "prefill"): 2, ("ours", "prefill"): 2,
    }  # fmt: skip
    kept = [*samples["base", "decode-1"], *samples["base", "prefill"]]
    assert min(sample.first_token_s for sample in kept) == 3.0  # the first two questions warmed it up
    columns = paired_columns(samples, "ours", "base", "prefill")
    assert columns == ("100 (100-100)", "1.00 (1.00-1.00)", "0.50 (0.50-0.50)", "1.00 (1.00-1.00)")
    assert disturbed(samples, "prefill") == "other programs' share 0% at the median"


def test_disturbed_samples_are_repeated_and_the_quietest_kept() -> None:
    seen = iter([Sample(1.0, 1.0, 0.5), Sample(2.0, 1.0, 0.2), Sample(3.0, 1.0, 0.3), Sample(4.0, 1.0, 0.0)])
    assert least_disturbed(lambda: next(seen), 3).tokens_per_s == 2.0
    assert least_disturbed(lambda: next(seen), 3).tokens_per_s == 4.0  # alone at once: not repeated
    samples = compare({"base": partial(start, 1.0, 0.4)}, {"base": ["decode-1"]}, options(1, retries=2))
    (kept,) = samples["base", "decode-1"]
    assert kept.first_token_s == 2.0  # one to warm up, then the first of three equally disturbed ones


def test_an_engine_that_ends_is_said() -> None:
    with pytest.raises(SystemExit, match="ended with code 3"):
        Worker(["-c", "raise SystemExit(3)"], threads=1)


def test_the_tables_of_decoding_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    lora, trex = importlib.import_module("lora_decode"), importlib.import_module("trex_decode")
    engines = {"base eager": partial(start, 100.0), "ours eager": partial(start, 80.0)}
    given = options(1, rank=8, max_lora_rank=16, threads=1, engines=list(engines), eager=True)
    samples = compare(engines, dict.fromkeys(engines, list(lora.WORKLOADS)), given)
    lora.report(samples, given)
    said = capsys.readouterr().out
    assert "ratios against 'base eager'" in said
    assert "| ours eager | 80 (80-80) | 1.00 (1.00-1.00) | 0.80 (0.80-0.80) | 1.25 (1.25-1.25) |" in said
    engines = {name: partial(start, 10.0) for name in trex.WORKERS}
    trex.report(compare(engines, trex.WORKERS, given), given)
    said = capsys.readouterr().out
    assert "| T-REX step / LoRA 36 step, batch 16 | 1.00 (1.00-1.00) | 1.00 (1.00-1.00) | <= 1.15 |" in said
    assert "| fp32 | 1.00 (1.00-1.00) | 1.00 (1.00-1.00) |" in said
