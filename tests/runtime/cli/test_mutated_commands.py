"""Whole commands on mutated files: each ends with an exit status of its own and one named error, never a traceback."""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from metier.agents import Message, TrafficRow, write_traffic
from metier.runtime import RunStore
from metier.runtime.cli.ending import end_with
from metier.runtime.cli.main import app
from metier.specializers import Shelf
from tests.mutated_text import mutated
from tests.runtime.cli.test_mutated_files import RECIPE, SETTINGS
from tests.tiny_model import write_random_lora

SEED = 21
LONGEST_S = 60
HERE = Path(__file__).parents[2]

ASSIGNMENT = """default: base
roles:
  planner: base
  solver: {variant: base, rounds: {2: base}, reason: second tries are short}
"""
SETS = """concurrency=4
limits.max_tokens=1000
engine.kv_cache_mib=256
server.watchers=10
priority.order=first_come
"""
NO_ROWS = """name: solver
data: {traffic: rows.jsonl, role: nobody}
methods:
  - {method: lora, rank: 8}
"""


class Verb(NamedTuple):
    """A command and the file of its folder that is mutated; how it ends with the good file.

    `{text}` in `words` stands for the file's text, `{sets}` for a `--set` for each of its lines.
    """

    file: str
    words: str
    ends: int = 0


RUN = "run flow.py --tasks test:2 --engine scripted --store new.db"
PROBE = "probe probed.py --tasks tune:2 --variants base,brief --engine scripted --out probe"
VERBS = {
    "run, workflow": Verb("flow.py", RUN),
    "run, assignment": Verb("assignment.yaml", f"{RUN} --assignment assignment.yaml"),
    "run, settings": Verb("settings.yaml", f"{RUN} --settings settings.yaml"),
    "run, --set": Verb("sets", f"{RUN} {{sets}}"),
    "run, --input": Verb("input.json", "run flow.py --engine scripted --store new.db --input {text}"),
    "resume, --answer": Verb("answer.json", "resume RUN --store waiting.db --answer {text}"),
    "make, recipe": Verb("recipe.yaml", "make recipe.yaml --base none", 2),
    "make, rows": Verb("rows.jsonl", "make no-rows.yaml --base base", 2),
    "make, config": Verb("base/config.json", "make no-rows.yaml --base base", 2),
    "make, tokenizer": Verb("base/tokenizer_config.json", "make no-rows.yaml --base base", 2),
    "make, index": Verb("sharded/model.safetensors.index.json", "make no-rows.yaml --base sharded", 2),
    "variants": Verb("shelf/one/variant.json", "variants --verify"),
    "variants export": Verb("shelf/one/variant.json", "variants export one out/one"),
    "variants add": Verb("lora/adapter_config.json", "variants add lora --name two --base base --set shelf=other"),
    "probe, incumbent": Verb("probe-assignment.yaml", f"{PROBE} --incumbent probe-assignment.yaml"),
    "probe, runs": Verb("probe/runs.jsonl", PROBE),
    "probe, replies": Verb("probe/replies.jsonl", PROBE),
    "probe, engine work": Verb("probe/engine_work.jsonl", PROBE),
    "probe, profiles": Verb("probe/profiles.jsonl", PROBE),
    "assign, options": Verb("probe/probe.json", "assign --probe probe --out new.yaml --minimise tokens"),
    "assign, profiles": Verb("probe/profiles.jsonl", "assign --probe probe --out new.yaml --minimise tokens"),
    "report, profiles": Verb("probe/profiles.jsonl", "report --store waiting.db --probe probe --markdown new.md"),
    "bench, trace": Verb("rows.jsonl", "bench rows.jsonl --settings none.yaml", 2),
    "graph": Verb("flow.py", "graph flow.py"),
    "serve, assignment": Verb(
        "assignment.yaml", "serve flow.py --assignment assignment.yaml --engine scripted --host 203.0.113.1", 2
    ),
}
WRITTEN = ("new.db", "new.yaml", "new.md", "out", "other", "shelf/.work")
"""What the commands write, removed before each."""


def ended(words: list[str]) -> tuple[int, str]:
    """The exit status and all output of a command in this process; what would be a traceback is raised."""
    said = io.StringIO()
    command: Any = typer.main.get_command(app)
    with redirect_stdout(said), redirect_stderr(said), within(LONGEST_S):
        try:
            end_with(lambda: command(args=words, prog_name="metier"))
        except SystemExit as end:
            assert end.code is None or isinstance(end.code, int), end.code
            return end.code or 0, said.getvalue()


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with everything the commands read, as it should be."""
    folder = tmp_path_factory.mktemp("whole")
    texts = {
        "flow.py": (HERE / "workflow_for_cli.py").read_text(),
        "probed.py": (HERE / "workflow_for_probe.py").read_text(),
        "assignment.yaml": ASSIGNMENT,
        "probe-assignment.yaml": ASSIGNMENT,
        "settings.yaml": SETTINGS,
        "sets": SETS,
        "input.json": '{"text": "4"}',
        "answer.json": '{"ok": true}',
        "recipe.yaml": RECIPE,
        "no-rows.yaml": NO_ROWS,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    write_traffic(
        folder / "rows.jsonl",
        [
            TrafficRow(role="solver", messages=(Message(role="user", content=str(n)),), reply=str(n), score=1.0)
            for n in range(4)
        ],
    )
    shutil.copytree(tiny_base, folder / "base")
    shutil.copytree(tiny_base, folder / "sharded")
    tensors = json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}, indent=1)
    (folder / "sharded" / "model.safetensors.index.json").write_text(tensors)
    write_random_lora(folder / "lora", folder / "base", rank=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert ended("variants add lora --name one --base base --set shelf=shelf".split())[0] == 0
        (added,) = Shelf(folder / "shelf").list()
        (folder / "shelf" / added.id).rename(folder / "shelf" / "one")
        assert ended(PROBE.split())[0] == 0
        assert (
            ended([*"run flow.py:asking --engine scripted --store waiting.db --input".split(), texts["input.json"]])[0]
            == 3
        )
    return folder


def campaign(whole: Path, folder: Path, name: str, count: int) -> dict[int, int]:
    """Do a command on `count` mutations of its file; exit status → how often. Anything unforeseen is raised."""
    verb = VERBS[name]
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    with RunStore(folder / "waiting.db") as store:
        run = store.runs(store.batches()[0].id)[0].id
    path, good = folder / verb.file, (whole / verb.file).read_text()
    statuses: dict[int, int] = {}
    for number in range(-1, count):
        for left in (*WRITTEN, "probe"):
            shutil.rmtree(folder / left, ignore_errors=True)
            (folder / left).unlink(missing_ok=True)
        for kept in ("probe", "waiting.db"):
            place = whole / kept
            (shutil.copytree if place.is_dir() else shutil.copyfile)(place, folder / kept)
        content = mutated(good, random.Random(f"{SEED}|{name}|{number}")) if number >= 0 else good.encode()
        path.write_bytes(content)
        words = list(written(verb.words, content, run))
        try:
            status, said = ended(words)
            assert "Traceback" not in said and status in (0, 1, 2, 3), (status, said)
            assert status == 0 or 0 < len(said) < 20_000, said[:3000]
        except BaseException as error:
            error.add_note(f"{name}, mutation {number}: {words} {content[:500]!r}")
            raise
        if number < 0:
            assert status == verb.ends, said
        else:
            statuses[status] = statuses.get(status, 0) + 1
    return statuses


def written(words: str, content: bytes, run: str) -> Iterator[str]:
    """The words of a command, with a file's content in their places as a shell would hand it over."""
    text = content.decode("utf-8", "surrogateescape").replace("\0", "")
    for word in words.split():
        if word == "{sets}":
            yield from (part for line in text.splitlines() for part in ("--set", line))
        else:
            yield text if word == "{text}" else run if word == "RUN" else word


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METIER_SHELF", str(tmp_path / "shelf"))
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("METIER_API_KEY", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", VERBS)
def test_a_command_on_a_mutated_file_ends_by_name(whole: Path, there: Path, name: str) -> None:
    statuses = campaign(whole, there, name, 12)
    assert statuses.get(2, 0) > 0, statuses


@pytest.mark.faults
@pytest.mark.parametrize("name", VERBS)
def test_ten_thousand_commands_on_mutated_files(whole: Path, there: Path, name: str) -> None:
    assert campaign(whole, there, name, 400).get(2, 0) > 20
