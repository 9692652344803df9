"""What benchmarks share: arms that take turns, CPU-seconds beside wall, medians with their spread, tables, journals.

A benchmark measures its arms in one session, in paired rounds: every arm once a round, so that a busy machine disturbs
all of them alike, and what is compared is compared within a round. The first round warms up and is not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "RESAMPLES",
    "Samples",
    "Spent",
    "append_row",
    "arguments",
    "clocked",
    "in_turns",
    "interval",
    "machine",
    "paired_rounds",
    "print_table",
    "read_rows",
    "resamples",
    "resident_mib",
    "spread",
    "tree_cpu_s",
    "write_rows",
]

A = TypeVar("A")
S = TypeVar("S")
RESAMPLES = 10_000


# ---- the command line -------------------------------------------------------------------------------------------


def arguments(
    description: str | None, *, rounds: int | None = None, base: bool = False, threads: int | None = None
) -> argparse.ArgumentParser:
    """A parser that shows the module's text, with the options that many benchmarks have.

    `rounds` adds --rounds and --journal, `base` --base, `threads` --threads; the numbers are their defaults.
    """
    from metier.specializers.shelf.bundled_model import DEFAULT_BASE

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if base:
        parser.add_argument("--base", default=DEFAULT_BASE, help="bundled base, folder or Hugging Face id")
    if threads is not None:
        parser.add_argument("--threads", type=int, default=threads, help=f"threads per engine (default {threads})")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"paired rounds (default {rounds})")
        parser.add_argument("--journal", type=Path, help="append a line of JSON for every sample to this file")
    return parser


# ---- rounds -----------------------------------------------------------------------------------------------------


def in_turns(arms: Sequence[A], number: int) -> list[A]:
    """The arms in the order of a round: the one that begins moves on with the rounds."""
    turn = number % max(len(arms), 1)
    return [*arms[turn:], *arms[:turn]]


def paired_rounds(arms: Sequence[A], rounds: int) -> Iterator[tuple[int, A]]:
    """(round, arm) of all rounds; round 0 warms up, and `rounds` more count."""
    for number in range(rounds + 1):
        for arm in in_turns(arms, number):
            yield number, arm


class Samples(Generic[A, S]):
    """What was measured, by arm, a sample a round; round 0 is not kept. With a journal each is appended there too."""

    def __init__(self, arms: Sequence[A], journal: Path | None = None) -> None:
        self._by_arm: dict[A, list[S]] = {arm: [] for arm in arms}
        self._journal = journal

    def keep(self, number: int, arm: A, sample: S) -> S:
        """Keep one sample, unless it warmed up; returns it."""
        if number:
            self._by_arm[arm].append(sample)
            if self._journal is not None:
                shown = sample if isinstance(sample, (Mapping, tuple, float, int)) else vars(sample)
                append_row(self._journal, {"round": number, "arm": str(arm), "sample": shown, "machine": machine()})
        return sample

    def __iter__(self) -> Iterator[A]:
        return iter(self._by_arm)

    def __getitem__(self, arm: A) -> list[S]:
        return self._by_arm[arm]

    def values(self, arm: A, of: Callable[[S], float]) -> list[float]:
        """One figure of an arm, round by round."""
        return [of(sample) for sample in self._by_arm[arm]]

    def ratios(self, arm: A, other: A, of: Callable[[S], float]) -> list[float]:
        """That figure over another arm's, within each round."""
        return [a / b for a, b in zip(self.values(arm, of), self.values(other, of), strict=True)]

    def differences(self, arm: A, other: A, of: Callable[[S], float]) -> list[float]:
        """That figure less another arm's, within each round."""
        return [a - b for a, b in zip(self.values(arm, of), self.values(other, of), strict=True)]


# ---- what it took -----------------------------------------------------------------------------------------------


@dataclass
class Spent:
    """What a block took: seconds by the wall and of CPU, and the share of all processors that others used meanwhile."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    others: float = 0.0


@contextmanager
def clocked(cpu_s: Callable[[], float] = time.process_time) -> Iterator[Spent]:
    """Measure a block; `cpu_s` says what counts as its CPU time, this process by default."""
    spent = Spent()
    busy, cpu, wall = _busy_s(), cpu_s(), time.perf_counter()
    yield spent
    spent.wall_s, spent.cpu_s = time.perf_counter() - wall, cpu_s() - cpu
    others_s = _busy_s() - busy - spent.cpu_s
    spent.others = round(max(0.0, others_s) / (spent.wall_s * (os.cpu_count() or 1)), 3)


def tree_cpu_s() -> float:
    """CPU-seconds of this process and of all that it has started and that still run."""
    import psutil

    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def resident_mib() -> float:
    """Memory of this process that is in RAM."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _busy_s() -> float:
    """CPU-seconds that all programs of the machine have used since it started, 0.0 where /proc is missing."""
    try:
        user, nice, system = Path("/proc/stat").read_text(encoding="ascii").split()[1:4]
    except OSError:
        return 0.0
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """The processor's name, how many cores there are, and which of the instructions that matter it has."""
    from metier.specializers.machine.machine import this_machine

    return str(this_machine().model_copy(update={"vllm": ""}))


# ---- what it came to --------------------------------------------------------------------------------------------


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median with the least and the greatest value, "" of none."""
    if not values:
        return ""
    to = " to " if min(values) < 0 or "+" in form else "-"
    return f"{median(values):{form}} ({min(values):{form}}{to}{max(values):{form}})"


def print_table(heads: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> None:
    """Print a table as Markdown."""
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def resamples(items: int, seed: int = 0) -> NDArray[np.int64]:
    """Places of items drawn again with replacement, [RESAMPLES, items]: the draws of a bootstrap."""
    return np.random.default_rng(seed).integers(items, size=(RESAMPLES, items))


def interval(drawn: NDArray[np.float64], method: Any = "linear") -> tuple[float, float]:
    """The 95 % interval of a statistic from its values on resamples."""
    low, high = np.percentile(drawn, (2.5, 97.5), method=method)
    return float(low), float(high)


# ---- journals ---------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a JSONL file, whose folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
