"""From `metier probe` to `metier assign` to a run, on a real engine with a tiny model and two adapters."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from metier.agents import PROMPT_LAYOUT
from metier.router import load_assignment, read_profiles
from metier.router.probing.probe import ProbeSettings
from metier.router.solving.assigned import AssignSettings
from metier.runtime import RunStore
from metier.runtime.cli.run import RunOptions, run_workflow
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.trials.footprints import checkpoint_mib, slot_mib
from metier.runtime.trials.probe_options import ProbeOptions
from metier.runtime.trials.run_assign import run_assign
from metier.runtime.trials.run_probe import run_probe
from metier.specializers.shelf.base_model import base_fingerprint
from metier.specializers.shelf.shelf import Shelf
from metier.specializers.shelf.variant import AskSpec, EngineSpec
from tests.tiny_model import write_random_lora

pytestmark = pytest.mark.engine

WORKFLOW = """
from pydantic import BaseModel
from metier.agents import Role, Task, TaskGraph, TaskSet

class Puzzle(BaseModel):
    text: str

class Guess(BaseModel):
    yes: bool

class Answer(BaseModel):
    yes: bool

graph = TaskGraph("guess", takes=Puzzle, gives=Answer)
first = graph.step(Role("first", takes=Puzzle, gives=Guess, max_tokens=24))
graph.step(Role("second", takes=(Puzzle, Guess), gives=Answer, max_tokens=24), after=first)

def tasks(split, size, seed):
    made = tuple(Task(str(n), Puzzle(text=f"Is {n + 100 * seed} even?"), key=n) for n in range(size))
    # Half the score for any answer, so that a random model has some.
    return TaskSet("even", "test", made, lambda task, output: 0.5 + 0.5 * (output.yes == (task.key % 2 == 0)))
"""


def test_probe_assign_run(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "guess.py").write_text(WORKFLOW)
    base, shelf = base_fingerprint(tiny_base), Shelf(tmp_path / "shelf")
    for seed, name in enumerate(("x", "y")):
        write_random_lora(tmp_path / name / "adapter", tiny_base, rank=4, seed=seed)
        ask = AskSpec(adapter="lora", rank=4)
        record = {"base": base, "prompt_layout": PROMPT_LAYOUT, "engine": EngineSpec(base=base), "ask": ask}
        shelf.add(tmp_path / name, name=name, record=record)
    (tmp_path / "incumbent.yaml").write_text("roles: {first: x}\n")
    engine = EngineSettings(eager=True, kv_cache_mib=32, max_model_tokens=512, threads=1, slot_rank=8)
    overrides = {"shelf": str(shelf.folder), "engine": engine.model_dump(mode="json")}
    options = ProbeOptions(
        workflow=str(tmp_path / "guess.py"), tasks="tune:6", variants=("base", "x", "y"), base=str(tiny_base),
        incumbent="incumbent.yaml", overrides=overrides, probe=ProbeSettings(batch_tasks=3, margin=1.0),
    )  # fmt: skip
    anyio.run(run_probe, options, tmp_path / "probe")
    rows = {(r.role, r.variant): r for r in read_profiles(tmp_path / "probe" / "profiles.jsonl")}
    assert len(rows) == 6 and all(row.n == 6 and row.cpu_s > 0 and row.seconds > 0 for row in rows.values())
    assert all(row.quality >= 0.5 and row.asks >= 1 for row in rows.values())
    second = rows["second", "y"]
    assert second.footprint.adapter == shelf.get("y").id and second.footprint.adapter_rank == 4
    assert second.footprint.checkpoint_mib == pytest.approx(checkpoint_mib(tiny_base))
    # Per layer and slot: 8 rows of each linear layer's two ends, fp32.
    assert second.footprint.slot_mib == pytest.approx(slot_mib(tiny_base, engine)) and slot_mib(tiny_base, engine) > 0
    assert second.shared_tokens["first"] > 0  # both begin with the puzzle
    assert (tmp_path / "probe" / "replies.jsonl").read_text().count("\n") < 2 * 6 * 5  # first's replies were reused

    async def assign() -> None:
        settings = AssignSettings(quality_loss=1.0)
        await run_assign(tmp_path / "probe", settings, out=tmp_path / "a.yaml", check="tune:4:1")

    anyio.run(assign)
    assert set(load_assignment(tmp_path / "a.yaml").roles) == {"first", "second"}
    run = RunOptions(
        workflow=options.workflow, tasks="tune:2:2", assignment=str(tmp_path / "a.yaml"), base=options.base,
        overrides=overrides,
    )  # fmt: skip
    anyio.run(run_workflow, run, tmp_path / "runs.db")
    with RunStore(tmp_path / "runs.db") as store:
        (batch,) = store.batches()
        assert [run.state for run in store.runs(batch.id)] == ["finished"] * 2
