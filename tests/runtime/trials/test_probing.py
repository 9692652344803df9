"""`metier probe` and `metier assign` as they are typed, on a fake that knows its variants; and replayed asks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from metier.agents import Ask, Message, ScriptedBackend, Usage
from metier.agents.messages import Reply
from metier.router import Candidate, Journal, load_assignment, read_profiles
from metier.router.probing.outcomes import Outcome
from metier.runtime.report.figures import FrontPoint, draw_front
from metier.runtime.trials.probe_options import ProbeOptions
from metier.runtime.trials.replayed_backend import RecordedReply, ReplayedBackend, common_prefix
from metier.runtime.trials.run_assign import serving_of
from metier.runtime.trials.run_probe import open_trials, run_probe

ROOT = Path(__file__).parents[2]
WORKFLOW = str(ROOT / "workflow_for_probe.py")
SHARP = "default: sharp\n"


def metier(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line and wait for it."""
    command = [sys.executable, "-c", "from metier.runtime.cli.main import main; main()", *words]
    env = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def probe_words(tasks: str = "tune:24") -> tuple[str, ...]:
    return (
        "probe", WORKFLOW, "--tasks", tasks, "--variants", "base,sharp", "--variants", "brief,wrong",
        "--incumbent", "sharp.yaml", "--engine", "scripted",
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sharp.yaml").write_text(SHARP)
    return tmp_path


def test_from_probe_to_assignment_to_run(folder: Path) -> None:
    """Three commands, and the workflow runs on the assignment: right answers in fewer words."""
    probed = metier(*probe_words(), cwd=folder)
    assert probed.returncode == 0, probed.stderr
    assert "planner[1] on wrong is dropped: at least" in probed.stderr and "reused from other runs" in probed.stderr
    rows = {(str(r.part), r.variant): r for r in read_profiles(folder / "runs/probe/profiles.jsonl")}
    assert len(rows) == 6 * 4
    assert rows["solver[1]", "brief"].quality == 1.0 and rows["solver[1]", "sharp"].gain == 0.0
    assert rows["planner[1]", "brief"].role_quality == 0.0 and rows["planner[1]", "sharp"].role_quality == 1.0
    assert rows["solver[1]", "brief"].elsewhere_tokens < 0  # the critic has less to read
    assigned = metier(
        "assign", "--minimise", "tokens", "--quality-loss", "0", "--measure-baselines", "--out", "a.yaml", cwd=folder
    )
    assert assigned.returncode == 0, assigned.stderr
    chosen = load_assignment(folder / "a.yaml")
    assert {name: role.variant for name, role in chosen.roles.items()} == {
        "planner": "sharp", "solver": "brief", "critic": "brief",
    }  # fmt: skip
    assert "dropped by the probe" in assigned.stdout and "oracle of the measured" in assigned.stdout
    text = (folder / "a.yaml").read_text()
    assert "measured on 24 held-out tasks: quality 1.000" in text and "scores 1.000 of 1.000" in text
    figure = json.loads((folder / "runs/probe/front.json").read_text())
    assert figure["parts"][0] == "planner[1]" and figure["table"][0]["measured"]["quality"] == 1.0
    assert "<svg" in (folder / "runs/probe/front.svg").read_text()
    done = metier("run", WORKFLOW, "--tasks", "test:6", "--engine", "scripted", "--assignment", "a.yaml", cwd=folder)
    assert done.returncode == 0 and "6 of 6" in done.stdout


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_probe_that_is_stopped_goes_on(folder: Path, how: signal.Signals) -> None:
    """Killed or stopped at its 40th ask, the same command ends with the profiles of a probe that was left alone."""
    words = probe_words("tune:12")
    if how == signal.SIGKILL:
        dead = metier(*words, cwd=folder, TEST_DIE_AT="40")
        assert dead.returncode == -signal.SIGKILL
    else:
        here, there = os.pipe()
        command = [sys.executable, "-c", "from metier.runtime.cli.main import main; main()", *words]
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "TEST_HANG": str(there)}, stderr=subprocess.PIPE, text=True,
            pass_fds=[there],
        )  # fmt: skip
        os.close(there)
        assert os.read(here, 4) == b"here"
        os.close(here)
        process.send_signal(how)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130 and "the same command" in said and "Traceback" not in said
    replies = (folder / "runs/probe/replies.jsonl").read_text().splitlines()
    assert len(replies) >= 10 and not (folder / "runs/probe/profiles.jsonl").exists()
    again = metier(*words, cwd=folder)
    assert again.returncode == 0, again.stderr
    (folder / "whole").mkdir()
    (folder / "whole/sharp.yaml").write_text(SHARP)
    whole = metier(*words, cwd=folder / "whole")
    assert read_profiles(folder / "runs/probe/profiles.jsonl") == read_profiles(
        folder / "whole/runs/probe/profiles.jsonl"
    )
    assert whole.stdout == again.stdout
    known = metier(*words, cwd=folder)
    assert known.stdout == again.stdout and "0 runs made" in known.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("assign",), "ProfileError: runs/probe/probe.json is no record of a probe: no such file"),
        (("assign", "--min-quality", "1.5"), "SettingsError: --min-quality 1.5"),
        (("probe", WORKFLOW, "--tasks", "tune:4", "--variants", ","), "SettingsError: no --variants"),
        (("probe", WORKFLOW, "--tasks", "tune:4", "--variants", "a@b"), "AssignmentError: candidate 'a@b'"),
        (
            ("probe", WORKFLOW, "--tasks", "tune:4", "--variants", "wrong", "--engine", "scripted"),
            "ProfileError: none of 128 runs under different assignments solved its task",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = metier(*words, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert says in done.stderr


def test_limits_that_nothing_meets_leave_no_file(folder: Path) -> None:
    assert metier(*probe_words("tune:8"), cwd=folder).returncode == 0
    done = metier("assign", "--max-tokens", "10", "--out", "a.yaml", cwd=folder)
    assert done.returncode == 2 and "InfeasibleError: no assignment meets the limits" in done.stderr
    assert "tokens=10 (nearest feasible: " in done.stderr and not (folder / "a.yaml").exists()
    same = metier("assign", "--check", "tune:8", "--out", "a.yaml", cwd=folder)
    assert same.returncode == 2 and "every task of --check tune:8 was probed on" in same.stderr
    missing = metier("assign", "--variants", "sharp,nope", "--out", "a.yaml", cwd=folder)
    assert missing.returncode == 2 and "no profile of nope at planner[1]" in missing.stderr


# ---- reuse --------------------------------------------------------------------------------------------------


def ask(run: str, text: str, **fields: object) -> Ask:
    values = {"step_path": "solve", "role": "solver", "messages": (Message(role="user", content=text),), **fields}
    return Ask.model_validate({"run_id": run, **values})


@pytest.mark.anyio
async def test_equal_asks_are_asked_once_and_cost_what_they_had_cost(tmp_path: Path) -> None:
    class Costly:
        def __init__(self) -> None:
            self.asks: list[Ask] = []

        async def reply(self, ask: Ask, *, on_text: object = None) -> Reply:
            self.asks.append(ask)
            return Reply(
                text="4", usage=Usage(prompt_tokens=64, answer_tokens=1, cpu_s=0.5, prefill_s=0.1, decode_s=0.2)
            )

    costly = Costly()
    text = "x" * 60 + "tail"
    with Journal(tmp_path / "r.jsonl", RecordedReply) as journal:
        backend = ReplayedBackend(costly, journal, variants={"a": "1" * 16, "also-a": "1" * 16}, block_tokens=16)
        await backend.reply(ask("run.0", text, variant="a"))
        heard: list[str] = []
        reply = await backend.reply(
            ask("run.1", text, variant="also-a", step_path="other", round=2), on_text=heard.append
        )
        assert reply.text == "4" and heard == ["4"] and len(costly.asks) == 1
        for other in ({"variant": "b"}, {"seed": 1, "temperature": 1.0}, {"max_tokens": 9}, {"task": "t"}, {}):
            await backend.reply(ask("run.2", text + "?" if not other else text, **{"variant": "a", **other}))
        assert len(costly.asks) == 6
        taken = backend.take("run.1")
        (cost,) = taken.asks
        assert cost.reused and cost.cpu_s == 0.5 and cost.seconds == pytest.approx(0.3) and cost.round == 2
        assert backend.take("run.1").asks == []
        later = backend.take("run.2").asks
        assert later[0].shared_tokens == {"": 64} and later[-1].shared_tokens == {"solver[1]": 48}
    with Journal(tmp_path / "r.jsonl", RecordedReply) as journal:
        again = ReplayedBackend(costly, journal, variants={"a": "1" * 16})
        await again.reply(ask("run.9", text, variant="a"))
    assert len(costly.asks) == 6


@pytest.mark.parametrize(("one", "other"), [("", ""), ("abc", "abd"), ("abc", "abc"), ("abc", "abcdef"), ("x", "y")])
def test_common_prefix(one: str, other: str) -> None:
    assert common_prefix(one, other) == len(os.path.commonprefix([one, other]))


@pytest.mark.anyio
async def test_runs_share_every_step_that_is_asked_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing the critic asks no planner and no solver again; replacing the planner by its equal asks nobody else."""
    monkeypatch.chdir(folder)
    options = ProbeOptions(workflow=WORKFLOW, tasks="tune:4", variants=("sharp", "brief"), engine="scripted")
    async with open_trials(options, folder / "trials") as trials:
        tasks = trials.file.tasks("tune:4")
        evaluator = trials.evaluator(tasks)
        incumbent = trials.space.uniform(Candidate("sharp"))
        await evaluator.outcomes(incumbent, [task.id for task in tasks])
        assert evaluator.counts.asks == 12 and evaluator.counts.asks_reused == 0
        critic = next(part for part in trials.space.parts if str(part) == "critic[1]")
        await evaluator.outcomes({**incumbent, critic: Candidate("brief")}, [task.id for task in tasks])
        assert evaluator.counts.asks == 16 and evaluator.counts.asks_reused == 8
        later = next(part for part in trials.space.parts if str(part) == "solver[2+]")
        await evaluator.outcomes({**incumbent, later: Candidate("brief")}, [task.id for task in tasks])
        assert evaluator.counts.asks == 16 and evaluator.counts.asks_reused == 8 + 12


@pytest.mark.anyio
async def test_supervised_engines_hold_a_process_each(folder: Path) -> None:
    options = ProbeOptions(workflow=WORKFLOW, tasks="tune:4", variants=("sharp",), engine="scripted")
    async with open_trials(options, folder / "trials") as trials:
        here = serving_of(trials)
        apart = serving_of(replace(trials, options=options.model_copy(update={"engine": "supervised"})))
    assert here.process_mib > 0 == apart.process_mib
    assert apart.engine_mib == here.engine_mib + here.process_mib


TWO_WRITERS = """
from pydantic import BaseModel
from metier.agents import Role, ScriptedBackend, Task, TaskGraph, TaskSet

class Line(BaseModel):
    text: str

class Draft(BaseModel):
    draft: str

class Final(BaseModel):
    final: str

graph = TaskGraph("g", takes=Line, gives=Final)
draft = graph.step(Role("writer", takes=Line, gives=Draft), name="first")
graph.step(Role("writer", takes=Draft, gives=Final), name="second", after=draft)
verifiers = {"writer": lambda task, answer: isinstance(answer, Draft | Final)}

def tasks(split, size, seed):
    made = tuple(Task(str(i), Line(text=str(i)), key=i) for i in range(size))
    return TaskSet("lines", "tune", made, lambda task, output: float(output is not None))

def scripted():
    return ScriptedBackend({"writer": lambda ask: {"draft": "x"} if ask.step_path == "first" else {"final": "x"}})
"""


@pytest.mark.anyio
async def test_an_answer_is_verified_as_what_its_own_step_gives(tmp_path: Path) -> None:
    """Two roles of one name that give different types: each answer is read as its own, not as the last one's."""
    (tmp_path / "writers.py").write_text(TWO_WRITERS)
    options = ProbeOptions(workflow=str(tmp_path / "writers.py"), tasks="tune:1", variants=("base",), engine="scripted")
    async with open_trials(options, tmp_path / "trials") as trials:
        tasks = trials.file.tasks("tune:1")
        (outcome,) = await trials.evaluator(tasks).outcomes(trials.space.uniform(Candidate("base")), ["0"])
    assert outcome.role_scores == {"writer": 1.0}


def test_an_error_of_the_engine_is_no_score(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that cannot be made says so, rather than count as unsolved."""
    from metier.agents.errors import EngineDeadError

    async def dead(self: object, ask: Ask, *, on_text: object = None) -> Reply:
        raise EngineDeadError("gone")

    monkeypatch.setattr(ScriptedBackend, "reply", dead)
    options = ProbeOptions(
        workflow=WORKFLOW, tasks="tune:4", variants=("sharp",), incumbent=str(folder / "sharp.yaml"), engine="scripted"
    )
    with pytest.raises(EngineDeadError):
        anyio.run(run_probe, options, folder / "p")
    with Journal(folder / "p/runs.jsonl", Outcome) as runs:
        assert len(runs) == 0


def test_the_same_data_draw_the_same_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    front = [FrontPoint(0.1, 0.2), FrontPoint(0.3, 0.8)]
    named = [FrontPoint(0.2, 0.7, "assigned, measured", (0.6, 0.8))]
    for name in ("a.svg", "b.svg"):
        draw_front(tmp_path / name, front, named)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "predicted front" in (tmp_path / "a.svg").read_text()


# ---- machines -----------------------------------------------------------------------------------------------


def here(folder: Path) -> set[str]:
    """The processors' instructions that the profiles were measured with; oneDNN's variable stands for another one."""
    return {" ".join(row.machine.capabilities) for row in read_profiles(folder / "runs/probe/profiles.jsonl")}


def test_what_another_machine_measured_is_not_mixed_with_what_this_one_does(folder: Path) -> None:
    other = {"ONEDNN_MAX_CPU_ISA": "SSE41"}
    assert metier(*probe_words("tune:8"), cwd=folder, **other).returncode == 0
    assert here(folder) == {""}
    words = ("assign", "--minimise", "tokens", "--out", "a.yaml")
    refused = metier(*words, cwd=folder)
    assert refused.returncode == 2 and not (folder / "a.yaml").exists()
    assert "profiles were measured on" in refused.stderr and "capabilities" in refused.stderr
    assert "--rescale" in refused.stderr and "--mix-machines" in refused.stderr
    assert metier(*words, cwd=folder, **other).returncode == 0, "where it was measured"
    mixed = metier(*words, "--mix-machines", cwd=folder)
    assert mixed.returncode == 0 and "costs of several machines are mixed" in mixed.stderr
    rescaled = metier(*words, "--rescale", cwd=folder)
    assert rescaled.returncode == 0, rescaled.stderr
    assert "costs are multiplied by 1.00" in rescaled.stderr  # a fake costs nothing anywhere


def test_a_probe_on_another_machine_measures_again_in_the_same_folder(folder: Path) -> None:
    words = probe_words("tune:8")
    assert metier(*words, cwd=folder, ONEDNN_MAX_CPU_ISA="SSE41").returncode == 0
    mixed = metier(*words, "--mix-machines", cwd=folder)
    assert mixed.returncode == 0 and "0 runs made" in mixed.stderr and "mixed with those of" in mixed.stderr
    again = metier(*words, cwd=folder)
    assert again.returncode == 0 and "is measured again" in again.stderr
    assert "0 runs made" not in again.stderr and " 0 known from before" in again.stderr
    assert here(folder) != {""} and len(here(folder)) == 1
    known = metier(*words, cwd=folder)
    assert "0 runs made" in known.stderr
    back = metier(*words, cwd=folder, ONEDNN_MAX_CPU_ISA="SSE41")
    assert "0 runs made" in back.stderr, "each machine finds its own"
    assert metier("assign", "--minimise", "tokens", "--out", "a.yaml", cwd=folder).returncode == 0


def test_a_probe_from_before_machines_were_noted_goes_on_with_a_warning(folder: Path) -> None:
    words = probe_words("tune:8")
    assert metier(*words, cwd=folder).returncode == 0
    place = folder / "runs/probe"
    for file in place.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "machine"}) + "\n" for r in rows))
    (place / "machines.jsonl").unlink()
    known = metier(*words, cwd=folder)
    assert known.returncode == 0 and "0 runs made" in known.stderr and "of an unknown machine" in known.stderr
    (place / "profiles.jsonl").write_text(
        "".join(
            json.dumps({k: v for k, v in json.loads(line).items() if k != "machine"}) + "\n"
            for line in (place / "profiles.jsonl").read_text().splitlines()
        )
    )
    done = metier("assign", "--minimise", "tokens", "--out", "a.yaml", cwd=folder)
    assert done.returncode == 0 and "profiles of an unknown machine" in done.stderr
