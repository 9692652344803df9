"""Cost of pass (CPU-seconds per solved task) of arms on the same tasks, and paired bootstrap intervals of its ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from harness import interval, resamples
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """One arm, task by task in one order: scores, CPU-seconds of the process, thinking tokens; and its totals."""

    name: str
    tasks: tuple[str, ...]
    scores: Numbers
    cpu_s: Numbers
    thinking: Numbers
    wall_s: float
    others: float
    engines_mib: float

    @classmethod
    def of(cls, name: str, blocks: Sequence[dict[str, Any]]) -> Self:
        """An arm from its blocks; what the process used beyond its asks is shared out by what they used."""
        runs = [run for block in blocks for run in block["runs"]]
        factors = [block["cpu_s"] / math.fsum(run["cpu_s"] for run in block["runs"]) for block in blocks]
        cpu_s = [run["cpu_s"] * f for block, f in zip(blocks, factors, strict=True) for run in block["runs"]]
        return cls(
            name,
            tuple(run["task"] for run in runs),
            np.array([run["score"] for run in runs], dtype=float),
            np.array(cpu_s, dtype=float),
            np.array([run["thinking"] for run in runs], dtype=float),
            math.fsum(block["wall_s"] for block in blocks),
            max(block["others"] for block in blocks),
            max(block["engines_mib"] for block in blocks),
        )

    @property
    def cost_of_pass(self) -> float:
        """CPU-seconds per solved task; infinite where none is."""
        return cost_of_pass(self.cpu_s, self.scores)


def cost_of_pass(cpu_s: Numbers, scores: Numbers) -> float:
    """CPU-seconds of all tasks over the number of those solved; infinite where none is."""
    return float(cpu_s.sum() / scores.sum()) if scores.sum() > 0 else math.inf


def mean_interval(values: Numbers, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean."""
    return interval(values[resamples(len(values), seed)].mean(axis=1))


def paired(one: Arm, other: Arm) -> tuple[Arm, Arm]:
    """Both arms on the tasks they share, in the order of the first."""
    common = [task for task in one.tasks if task in set(other.tasks)]

    def restricted(arm: Arm) -> Arm:
        place = {task: number for number, task in enumerate(arm.tasks)}
        at = [place[task] for task in common]
        return Arm(
            arm.name,
            tuple(common),
            arm.scores[at],
            arm.cpu_s[at],
            arm.thinking[at],
            arm.wall_s,
            arm.others,
            arm.engines_mib,
        )

    return restricted(one), restricted(other)


def ratio_interval(one: Arm, other: Arm, seed: int = 0) -> tuple[float, float, float]:
    """Cost of pass of `one` over that of `other`, with its 95 % interval, tasks resampled for both together.

    In a resample where `one` solves nothing its cost is infinite.
    """
    one, other = paired(one, other)
    draws = resamples(len(one.tasks), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        above = one.cpu_s[draws].sum(axis=1) / one.scores[draws].sum(axis=1)
        below = other.cpu_s[draws].sum(axis=1) / other.scores[draws].sum(axis=1)
        ratios = np.where(np.isinf(above), np.inf, above / below)
    return one.cost_of_pass / other.cost_of_pass, *interval(ratios, "nearest")


def show(title: str, arms: Sequence[Arm], against: Sequence[str]) -> str:
    """The table of a workflow as Markdown, and the last arms' cost against those of `against`."""
    lines = [
        f"{title}: {max((len(arm.tasks) for arm in arms), default=0)} fresh tasks",
        "",
        "| arm | tasks | solved, % (95 %) | CPU-s a task | per solved | thinking tokens | wall, s | MiB | others |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        low, high = mean_interval(arm.scores)
        per_solved = "none solved" if math.isinf(arm.cost_of_pass) else f"{arm.cost_of_pass:.3f}"
        lines.append(
            f"| {arm.name} | {len(arm.tasks)} | {100 * arm.scores.mean():.1f} ({100 * low:.1f}-{100 * high:.1f}) "
            f"| {arm.cpu_s.mean():.3f} | {per_solved} | {arm.thinking.mean():.1f} | {arm.wall_s:.0f} "
            f"| {arm.engines_mib:.0f} | {arm.others:.0%} |"
        )
    by_name = {arm.name: arm for arm in arms}
    lines += ["", "| cost of pass ÷ | of | ratio (95 %) | solved, points (95 %) |", "|---|---|---|---|"]
    for below in against:
        for arm in arms:
            if below not in by_name or not arm.name.startswith("assigned") or math.isinf(arm.cost_of_pass):
                continue
            one, other = paired(by_name[below], arm)
            ratio, low, high = ratio_interval(one, other)
            gain = other.scores - one.scores
            less, more = mean_interval(gain)
            lines.append(
                f"| {below} | {arm.name} | {ratio:.2f} ({low:.2f}-{high:.2f}) "
                f"| {100 * gain.mean():+.1f} ({100 * less:+.1f} to {100 * more:+.1f}) |"
            )
    return "\n".join(lines) + "\n"
