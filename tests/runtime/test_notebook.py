"""A real notebook in a real kernel: plain and `async` cells run beside its loop, and what they end with is drawn."""

from __future__ import annotations

import base64
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import BaseModel

from metier.agents import MetierError, Role, TaskGraph
from metier.agents.graphs.svg import MOST_STEPS_DRAWN
from metier.runtime import RunResult, RunStore
from metier.runtime.events import Event
from metier.runtime.notebook import NotebookProgress
from metier.runtime.report import render_report
from metier.runtime.runs.run_plan import MOST_SHOWN

CELLS = (
    """
from pydantic import BaseModel
from metier.agents import Role, ScriptedBackend, TaskGraph
from metier.runtime import open_session, run

class Puzzle(BaseModel):
    text: str

graph = TaskGraph("solve", takes=Puzzle, gives=int)
solve = graph.step(Role("solver", takes=Puzzle, gives=int))
def opened():
    return open_session(backend=ScriptedBackend(default=lambda ask: 4), store=":memory:")
graph
""",
    """
with opened() as session:
    results = session.map(graph, [Puzzle(text=str(n)) for n in range(200)])
    report = session.report()
report
""",
    "results[0]",
    """
async with opened() as session:
    answer = await session.run(graph, Puzzle(text="2 + 2"))
answer
""",
    "session = opened().start()",
    "session.run(graph, Puzzle(text='2 + 2'))",
    """
session.close()
run(graph, Puzzle(text='2 + 2'), backend=ScriptedBackend(default=lambda ask: 5), store=':memory:')
""",
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each cell of the notebook has put out."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    home = tmp_path_factory.mktemp("jupyter")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(home / name.lower()))
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS])
        nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return [cell.outputs for cell in notebook.cells]


def value(outputs: list[dict[str, Any]], kind: str = "text/plain") -> str:
    """What the last line of a cell is shown as."""
    (shown,) = (output["data"][kind] for output in outputs if output["output_type"] == "execute_result")
    return str(shown)


def test_plain_and_async_cells_run(outputs: list[list[dict[str, Any]]]) -> None:
    assert [value(outputs[at]) for at in (3, 5, 6)] == ["4", "4", "5"]


def test_graph_report_and_result_draw_themselves(outputs: list[list[dict[str, Any]]]) -> None:
    assert "<img" in value(outputs[0], "text/html")
    assert "<iframe sandbox" in value(outputs[1], "text/html") and "# metier report" in value(outputs[1])
    assert "<pre>4</pre>" in value(outputs[2], "text/html")


def test_progress_is_one_output_below_its_cell(outputs: list[list[dict[str, Any]]]) -> None:
    for at in (1, 3, 5, 6):
        kinds = [output["output_type"] for output in outputs[at]]
        assert kinds == ["display_data", "execute_result"]
    (shown,) = (output["data"] for output in outputs[1] if output["output_type"] == "display_data")
    assert shown["text/plain"].startswith("200 of 200 runs ended, 200 asks")
    assert shown["text/html"] == f"<pre>{shown['text/plain']}</pre>"


class Puzzle(BaseModel):
    text: str


def test_a_graph_is_a_picture_with_its_names_as_text() -> None:
    graph = TaskGraph("a <b>", takes=Puzzle, gives=str)
    with graph.loop("attempt", max_rounds=3, until=lambda s: True):
        graph.step(Role("solver", takes=Puzzle, gives=str), name="s<script>&" + "n" * 500)
    html = graph.build()._repr_html_()
    assert html == graph._repr_html_() and "<script" not in html and "a &lt;b&gt;" in html
    found = re.fullmatch(r'<img [^>]*src="data:image/svg\+xml;base64,([^"]+)">', html)
    assert found is not None
    drawn = ElementTree.fromstring(base64.b64decode(found[1]))
    texts = [text.text or "" for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "solver → str" in texts and "s<script>&" + "n" * 70 in texts
    many = TaskGraph("many", takes=Puzzle, gives=str)
    for number in range(MOST_STEPS_DRAWN + 1):
        many.step(Role("solver", takes=Puzzle, gives=str), name=f"s{number}")
    many.returns("s0")
    assert "201 steps" in many._repr_html_() and len(many._repr_html_()) < 300


def test_a_graph_that_cannot_be_built_says_why() -> None:
    html = TaskGraph("<i>", takes=Puzzle, gives=str)._repr_html_()
    assert "has no steps" in html and "<i>" not in html


def test_a_report_without_runs_and_a_result_with_an_error_are_text() -> None:
    with RunStore(":memory:") as store:
        assert render_report(store, [])._repr_html_().startswith("<pre># metier report")
    html = RunResult("run", error=MetierError("<script>" + "x" * 10_000))._repr_html_()
    assert "&lt;script&gt;" in html and "<script" not in html and len(html) < MOST_SHOWN + 500


def test_progress_says_what_went_wrong_and_what_is_waited_for() -> None:
    progress = NotebookProgress()
    progress._draw = lambda: None  # type: ignore[method-assign]
    progress._handle = object()
    for event in (
        Event(kind="engine_starting", data={"engine": "base", "note": "it compiles"}),
        *(Event(kind="run_started", run_id=str(n)) for n in range(3)),
        Event(kind="run_failed", run_id="0", data={"error": "no"}),
        Event(kind="run_interrupted", run_id="1"),
        Event(kind="run_scored", run_id="2", data={"score": 1.0}),
    ):
        progress.on_event(event)
    assert "2 of 3 runs ended, 1 failed, 1 waiting for a person, 1 of 1 solved" in progress.line()
    assert progress.line().endswith("it compiles")
