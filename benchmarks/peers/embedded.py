"""The workflow in a metier session, engine in this process: `embedded.py FOLDER [--no-adapters]`, orders on stdin.

The ceiling is the same session with every role on the base, in an engine that has no LoRA layers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import anyio
from ours import load_parts, settings_of
from workflow import Batch

from metier.router import Assignment
from metier.runtime import RunStore, Session, open_session

sys.path.insert(0, str(Path(__file__).parents[1]))


async def run_batch(session: Session, store: RunStore, texts: list[str], at_once: int) -> Batch:
    """One `session.map`; a program's seconds are from its start, as the store has them."""
    from programs import Brief, graph

    batch, wall_s, cpu_s = Batch(), time.monotonic(), time.process_time()
    results = await session.map(graph, [Brief(text=text) for text in texts], concurrency=at_once)
    batch.wall_s, batch.cpu_s = time.monotonic() - wall_s, time.process_time() - cpu_s
    failed = [result.error for result in results if result.error is not None]
    if failed:
        raise failed[0]
    assert session.batch is not None
    asks = store.query(
        "SELECT asks.run AS run, answer_tokens, prompt_tokens, asked_at, answered_at FROM asks "
        "JOIN runs ON runs.id = asks.run WHERE runs.batch = ?",
        session.batch,
    )
    spans: dict[str, tuple[float, float]] = {}
    for ask in asks:
        batch.count(ask["prompt_tokens"], ask["answer_tokens"])
        first, last = spans.get(ask["run"], (ask["asked_at"], ask["answered_at"]))
        spans[ask["run"]] = min(first, ask["asked_at"]), max(last, ask["answered_at"])
    batch.program_s = [last - first for first, last in spans.values()]
    return batch


async def main(folder: Path, adapters: bool) -> None:
    """Run batches until stdin ends."""
    parts = load_parts(folder)
    assignment = parts.assignment if adapters else Assignment()
    with RunStore(":memory:") as store:
        async with open_session(
            base=str(parts.base), assignment=assignment, store=store, settings=settings_of(folder)
        ) as session:
            await session.start_engines()
            while line := await anyio.to_thread.run_sync(sys.stdin.readline):
                order = json.loads(line)
                batch = await run_batch(session, store, order["texts"], order["at_once"])
                print(json.dumps(asdict(batch)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-adapters", action="store_true")
    given = parser.parse_args()
    anyio.run(main, given.folder, not given.no_adapters)
