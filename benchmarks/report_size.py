"""How long the full report of 10,000 asks takes and how large it is: a made-up batch, recorded through the real store.

Run: python benchmarks/report_size.py [--runs 1000] [--keep FOLDER]. Bars: at most 5 CPU-seconds (one thread
does it all; seconds beside them are of a machine that may be busy) and 3 MB. Rounds of loops,
corrections, four adapters over three slots of two engines, failed runs: everything that has a section in the report.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from statistics import median

from harness import arguments, clocked, machine, spread
from orchestration import Answer, Plan, Puzzle, Verdict

from metier.agents import Message, Role, Task, TaskGraph
from metier.agents.messages import Usage
from metier.runtime import RunStore
from metier.runtime.report import render_html, render_markdown
from metier.runtime.runs.batches import new_batch
from metier.runtime.store.records import AskRecord, StepRecord

LIMIT_S, LIMIT_BYTES = 5.0, 3_000_000
ROUNDS = 3
CONCURRENCY = 16


def workflow() -> TaskGraph:
    """Three roles in rounds, and a function that checks what they agreed on."""
    planner = Role("planner", takes=(Puzzle, Verdict | None), gives=Plan)
    solver = Role("solver", takes=Plan, gives=Answer)
    critic = Role("critic", takes=(Puzzle, Answer), gives=Verdict)
    graph = TaskGraph("solve-and-check", takes=Puzzle, gives=Answer)
    with graph.loop("attempt", max_rounds=ROUNDS, until=lambda s: s[check].correct):
        plan = graph.step(planner)
        solve = graph.step(solver, after=plan)
        check = graph.step(critic, after=solve)
    return graph


def record(store: RunStore, label: str, runs: int, seed: int, speed: float) -> str:
    """Make up a batch of `runs` runs of ten asks each or so, `CONCURRENCY` at a time, and return its id."""
    draw = random.Random(seed)
    variants = {"planner": "planner-448", "solver": "solver-w8a8", "critic": "critic-lora"}
    tasks = [Task(str(i), Puzzle(text=f"How much is {i} and {i + 1}?")) for i in range(runs)]
    roles = {role: {"variant": name, "reason": "made up"} for role, name in variants.items()}
    batch, records, _ = new_batch(workflow().build(), tasks, seed, label, {"assignment": {"roles": roles}})
    store.add_batch(batch, records)
    start = time.time() - 3600.0
    free = [start] * CONCURRENCY
    load(store, batch.id, start, draw)
    for index, run in enumerate(records):
        store.start_run(run.id)
        now = begun = min(free)
        solved = draw.random() < 0.8
        for number in range(1, ROUNDS + 1):
            for role in ("planner", "solver", "critic"):
                step = StepRecord(f"attempt[{number}]/{role}", role, "done", "{}", "key", now)
                for attempt in range(2 if draw.random() < 0.1 else 1):
                    ask = one_ask(draw, role, variants[role], attempt, now, speed)
                    step.asks.append(ask)
                    now = ask.answered_at
                for ask in step.asks[:-1]:
                    ask.error = "no JSON"
                step.finished_at = now
                store.record_step(run.id, step)
        free[free.index(min(free))] = now
        if index % 97 == 96:
            store.end_run(run.id, "failed", error="RunError: made up", score=0.0, busy_s=now - begun)
        else:
            store.end_run(run.id, "finished", output='{"value": 1}', score=float(solved), busy_s=now - begun)
    totals = {"cpu_s": 1.0, "prefill_tokens": 1, "decode_tokens": 1, "asks": 1, "steps": 1, "adapter_loads": 1}
    store.record_engine_totals(batch.id, "base@made-up", totals)
    return batch.id


def one_ask(draw: random.Random, role: str, variant: str, attempt: int, now: float, speed: float) -> AskRecord:
    """An ask with amounts as of a small model on two cores."""
    swaps = int(draw.random() < 0.05)
    slot_wait_s = 0.02 * draw.random() if draw.random() < 0.1 else 0.0
    usage = Usage(
        prompt_tokens=draw.randint(60, 140),
        cached_tokens=draw.choice((0, 32, 64)),
        thinking_tokens=draw.randint(0, 30) if role == "critic" else 0,
        answer_tokens=draw.randint(8, 40),
        queue_s=slot_wait_s + 0.05 * draw.random(),
        slot_wait_s=slot_wait_s,
        prefill_s=0.05 * draw.random() / speed,
        decode_s=(0.3 + draw.random()) / speed,
        cpu_s=0.1 + 0.1 * draw.random() / speed,
        swaps=swaps,
        swap_s=0.03 * swaps,
    )
    took = usage.queue_s + usage.swap_s + usage.prefill_s + usage.decode_s
    messages = (Message(role="user", content="How much is it? " * 10),)
    return AskRecord(
        attempt, role, variant, "made up", 1, messages, now, now + took, '{"value": 1}', finish_reason="stop",
        engine="base" if role != "solver" else "solver-w8a8", usage=usage,
    )  # fmt: skip


def load(store: RunStore, batch: str, start: float, draw: random.Random) -> None:
    """Adapters that come and go, one row for each move; times are the store's own otherwise."""
    at, names, resident = start, ["planner-448", "critic-lora", "other", "another"], [""] * 0
    rows = []
    for number in range(400):
        at += 1.2
        name = names[number % len(names)]
        if name in resident:
            continue
        if len(resident) == 3:
            gone = resident.pop(0)
            rows.append((at, batch, "adapter_evicted", {"adapter": gone, "id": gone, "engine": "base", "seconds": 0.0}))
        resident.append(name)
        rows.append(
            (at + 0.03, batch, "adapter_loaded", {"adapter": name, "id": name, "engine": "base", "seconds": 0.03})
        )
    for row in rows:
        store.query("INSERT INTO engine_events VALUES (?, ?, ?, ?)", *row[:3], json.dumps(row[3]))


def main() -> None:
    """Make up two batches of half the asks each, render both reports, print time and size."""
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=505, help="runs of each of the two batches")
    parser.add_argument("--keep", type=Path, help="folder to keep the reports in")
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder, RunStore(Path(folder) / "runs.db") as store:
        batches = [record(store, "before", given.runs, 0, 1.0), record(store, "after", given.runs, 1, 1.3)]
        asks = store.query("SELECT count(*) AS n FROM asks")[0]["n"]
        for name, render in (("html", render_html), ("md", render_markdown)):
            samples = []
            for _ in range(5):
                with clocked() as spent:
                    text = render(store, batches)
                samples.append(spent)
            size, cpu_s = len(text.encode()), median(spent.cpu_s for spent in samples)
            shown = spread([spent.cpu_s for spent in samples])
            wall_s = median(spent.wall_s for spent in samples)
            print(f"{name}: {asks} asks, {shown} CPU-s, {wall_s:.2f} s, {size / 1e6:.2f} MB")
            if given.keep is not None:
                given.keep.mkdir(parents=True, exist_ok=True)
                (given.keep / f"report.{name}").write_text(text, encoding="utf-8")
            if cpu_s > LIMIT_S or size > LIMIT_BYTES:
                raise SystemExit(f"{name}: more than {LIMIT_S} CPU-s or {LIMIT_BYTES} bytes")


if __name__ == "__main__":
    main()
