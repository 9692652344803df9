"""Runs a workflow on fresh engines in this process and says what that took: what a table of costs is made of."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from harness import clocked, resident_mib

from metier.agents.graphs.workflow_file import WorkflowFile
from metier.agents.tasksets import TaskSet
from metier.router.assignment import Assignment
from metier.runtime.opening import open_session
from metier.runtime.settings.session import load_settings
from metier.runtime.store.store import RunStore

WARM_UP = "tune:8:99"


async def measured_run(
    file: WorkflowFile,
    assignment: Assignment,
    task_spec: str,
    folders: Sequence[str],
    overrides: Mapping[str, Any],
    places: slice = slice(None),
) -> dict[str, Any]:
    """Run tasks under an assignment after a warm-up on others; CPU-seconds are those of the whole process.

    `others` is the share of the machine that other programs used meanwhile, `engines_mib` what starting engines added
    to this process, `runs` one record a task.
    """
    before_mib = resident_mib()
    every = file.tasks(task_spec)
    tasks = TaskSet(every.name, every.split, every.tasks[places], every.scorer, every.seeds)
    with RunStore(":memory:") as store:
        began = time.monotonic()
        async with open_session(
            assignment=assignment, shelf=list(folders), store=store, settings=load_settings(None, dict(overrides))
        ) as session:
            await session.map(file.graph, file.tasks(WARM_UP))
            started_s = time.monotonic() - began
            with clocked() as spent:
                results = await session.map(file.graph, tasks)
            resident = resident_mib() - before_mib
            asks = store.query(
                "SELECT a.run, COUNT(*) AS asks, SUM(a.cpu_s) AS cpu_s, SUM(a.thinking_tokens) AS thinking, "
                "SUM(a.prefill_s + a.decode_s + a.swap_s) AS seconds, SUM(a.swaps) AS swaps, "
                "SUM(a.prompt_tokens - a.cached_tokens) AS prefilled, "
                "SUM(a.thinking_tokens + a.answer_tokens) AS written, "
                "(SELECT COUNT(*) FROM steps s WHERE s.run = a.run AND s.tool != '') AS calls "
                "FROM asks a JOIN runs r ON r.id = a.run WHERE r.batch = ? GROUP BY a.run",
                session.batch,
            )
    by_run = {row["run"]: dict(row) for row in asks}
    rows = [
        {"task": task.id, "score": result.score or 0.0} | {k: v for k, v in by_run[result.run_id].items() if k != "run"}
        for task, result in zip(tasks, results, strict=True)
    ]
    return {
        "cpu_s": round(spent.cpu_s, 3),
        "wall_s": round(spent.wall_s, 2),
        "others": spent.others,
        "start_s": round(started_s, 1),
        "engines_mib": round(resident),
        "runs": rows,
    }
