"""Which engine answers: every name, URLs, and what is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import pytest

from metier.agents import ProfileError, SettingsError
from metier.router import read_profiles
from metier.router.probing.probe import ProbeSettings
from metier.router.solving.assigned import AssignSettings
from metier.router.solving.limits import Limits
from metier.runtime.backends import ENGINES, BackendRequest, check_engine, engine_help, on_servers, open_backend
from metier.runtime.bench.command import BenchOptions, run_bench
from metier.runtime.bench.load import LoadLevel
from metier.runtime.bench.workload import SyntheticMix
from metier.runtime.cli.run import RunOptions
from metier.runtime.settings.session import load_settings
from metier.runtime.trials.probe_options import ProbeOptions
from metier.runtime.trials.run_assign import run_assign
from metier.runtime.trials.run_probe import run_probe
from metier.specializers import Shelf
from tests import workflow_for_probe
from tests.runtime.served import server

TWO = "http://a:8000,https://b/v1"


@pytest.mark.parametrize("engine", [*ENGINES, "http://a:8000", TWO])
def test_every_engine_can_be_named_in_every_place(engine: str) -> None:
    assert check_engine(engine) == engine
    assert RunOptions(workflow="", engine=engine).engine == engine
    assert ProbeOptions(workflow="w", tasks="t", variants=("base",), engine=engine).engine == engine
    assert on_servers(engine) == (engine == "fleet" or engine.startswith("http"))
    assert engine in engine_help() or engine.startswith("http")


@pytest.mark.parametrize("engine", ["", "vllm", "http:/a", "http://a,ray", "embedded,supervised"])
def test_others_are_refused(engine: str) -> None:
    for refused in (
        lambda: check_engine(engine),
        lambda: RunOptions(workflow="", engine=engine),
        lambda: open_backend(engine, BackendRequest(Shelf(Path("none")), load_settings())),
    ):
        with pytest.raises(SettingsError, match="expected embedded, supervised, scripted, ray, fleet, or the URL of a"):
            refused()


def test_a_fake_belongs_to_a_workflow(tmp_path: Path) -> None:
    mix = SyntheticMix(requests=2)
    options = BenchOptions(mix=mix, levels=(LoadLevel(concurrency=1),), engine="scripted")
    with pytest.raises(SettingsError, match="scripted answers for a workflow file"):
        anyio.run(run_bench, options, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_options_that_were_written_before_shelves_were_called_so_are_read() -> None:
    assert RunOptions.model_validate({"workflow": "w.py", "variants": ["a"]}).shelf == ["a"]
    old = {"workflow": "w.py", "tasks": "tune:4", "variants": ["base"], "also": ["a"]}
    assert ProbeOptions.model_validate_json(json.dumps(old)).shelf == ("a",)


@pytest.mark.parametrize("servers", [1, 2])
def test_a_probe_asks_the_server_that_it_names(tmp_path: Path, servers: int) -> None:
    """No engine starts here; memory is unknown, and nothing is assigned by what was not measured."""
    backend = workflow_for_probe.scripted()
    names = ["sharp", "brief"]
    (tmp_path / "sharp.yaml").write_text("default: sharp\n")
    with server(backend, variants=names) as one, server(backend, variants=names) as two:
        options = ProbeOptions(
            workflow=workflow_for_probe.__file__,
            tasks="tune:8",
            variants=tuple(names),
            incumbent=str(tmp_path / "sharp.yaml"),
            engine=",".join([one.url, two.url][:servers]),
            base="no such model",
            probe=ProbeSettings(batch_tasks=8),
        )
        anyio.run(run_probe, options, tmp_path / "probe")
        assert backend.asks
        rows = read_profiles(tmp_path / "probe" / "profiles.jsonl")
        assert {row.variant for row in rows} == set(names)
        assert not any(row.footprint.memory_known for row in rows)

        async def assign(settings: AssignSettings) -> None:
            await run_assign(tmp_path / "probe", settings, out=tmp_path / "a.yaml")

        for settings, says in (
            (AssignSettings(minimise="tokens", limits=Limits(memory_mib=1000)), "memory is not known"),
            (AssignSettings(minimise="memory_mib"), "memory is not known"),
            (AssignSettings(minimise="cpu_s"), "report no CPU-seconds"),
            (AssignSettings(minimise="tokens", limits=Limits(latency_s=1)), "report no seconds"),
        ):
            with pytest.raises(ProfileError, match=says):
                anyio.run(assign, settings)
        assert not (tmp_path / "a.yaml").exists()
        anyio.run(assign, AssignSettings(minimise="tokens", quality_loss=0.0))
        assert ", – MiB" in (tmp_path / "a.yaml").read_text()
