"""The full report: every number from the store, sections only where there is data, one page that needs nothing else."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import html5lib
import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from metier.agents import Message, ProfileError, SettingsError, Task, TaskGraph
from metier.agents.errors import VariantError
from metier.agents.graphs.layout import lay_out
from metier.agents.graphs.workflow_shape import StepShape, workflow_shape
from metier.agents.messages import Usage
from metier.runtime import RunStore
from metier.runtime.meters.energy import Energy
from metier.runtime.report import render_html, render_markdown, render_report
from metier.runtime.report.comparison import compare
from metier.runtime.report.costs import by_round, by_step, workflow_figures
from metier.runtime.report.critical_path import critical_path_s, longest_chain_s
from metier.runtime.report.ledger import read_ledger
from metier.runtime.report.slot_timeline import engine_timelines, merged, without_pauses
from metier.runtime.runs.batches import new_batch
from metier.runtime.store.records import AskRecord, StepRecord
from metier.specializers.methods.thinking.curves import Saturation, ThinkingPoint
from metier.specializers.shelf.variant import EngineSpec, Variant
from tests.agents.workflow import Puzzle, critic, planner, solver


def looped() -> TaskGraph:
    """Two rounds at most of planner, solver and critic."""
    graph = TaskGraph("solve-and-check", takes=Puzzle, gives=solver.gives)
    with graph.loop("attempt", max_rounds=2, until=lambda s: s[check].correct):
        plan = graph.step(planner)
        solve = graph.step(solver, after=plan)
        check = graph.step(critic, after=solve)
    return graph


def record(store: RunStore, *, runs: int = 4, label: str = "team", decode_s: float = 1.0, broken: bool = False) -> str:
    """A batch at 1000 s: run i takes one round, odd ones two; the last of a broken batch has only begun."""
    tasks = [Task(str(i), Puzzle(text=f"{i}")) for i in range(runs)]
    batch, records, _ = new_batch(looped().build(), tasks, 0, label, {"assignment": {"roles": {"solver": "lora"}}})
    store.add_batch(batch, records)
    for index, run in enumerate(records):
        store.start_run(run.id)
        now = 1000.0 + 10 * index
        rounds = 1 + index % 2
        left = broken and index == runs - 1
        for number in range(1, rounds + 1):
            for role in ("planner", "solver", "critic")[: 1 if left else 3]:
                usage = Usage(
                    prompt_tokens=40, cached_tokens=8, answer_tokens=5, thinking_tokens=2, queue_s=0.5, prefill_s=0.25,
                    decode_s=decode_s, cpu_s=0.125, swaps=int(role == "solver"), swap_s=0.25 * (role == "solver"),
                    slot_wait_s=0.125 * (role == "solver"),
                )  # fmt: skip
                took = 0.75 + decode_s + usage.swap_s
                ask = AskRecord(
                    0, role, "lora" if role == "solver" else None, "", 1, (Message(role="user", content="x"),), now,
                    now + took, "{}", finish_reason="stop", engine="base", usage=usage,
                )  # fmt: skip
                now += took
                path = f"attempt[{number}]/{role}"
                store.record_step(run.id, StepRecord(path, role, "done", "{}", "k", now - took, now, asks=[ask]))
        if not left:
            score = float(index % 2 == 0)
            store.end_run(run.id, "finished", output="{}", score=score, busy_s=now - 1000.0 - 10 * index)
    data = {"adapter": "lora", "id": "1", "engine": "base", "seconds": 0.25}
    store.record_engine_event(batch.id, "adapter_loaded", data)
    store.record_engine_totals(batch.id, "base@1", {"prefill_tokens": 1, "cpu_s": 2.0})
    return batch.id


@pytest.fixture
def store() -> Any:
    with RunStore(":memory:") as store:
        yield store


def test_figures_of_a_batch_are_what_its_asks_add_up_to(store: RunStore) -> None:
    ledger = read_ledger(store, record(store))
    figures = workflow_figures(ledger)
    assert (figures.runs, figures.solved, figures.scored) == (4, 2, 4)
    assert figures.total.asks == 18 and figures.total.prompt_tokens == 720 and figures.total.prefilled_tokens == 576
    assert figures.cost_of_pass == {"CPU-s": 18 * 0.125 / 2, "tokens": 18 * 47 / 2, "run s": 18 * (1.75 + 0.25 / 3) / 2}
    # A round is three asks of 1.25 s in the engine; each waits half a second, and the solver for its adapter.
    assert figures.bound_s == (3.75, 7.5, 3.75, 7.5)
    assert figures.over_bound == pytest.approx([5.5 / 3.75] * 4)
    assert [(key, cost.asks) for key, cost in by_round(ledger).items()][:2] == [
        (("planner", 1), 4),
        (("planner", 2), 2),
    ]
    assert by_step(ledger)["attempt[2]/critic"].answer_tokens == 10


@given(st.lists(st.tuples(st.sets(st.integers(0, 6), max_size=3), st.floats(0, 10)), min_size=1, max_size=7))
def test_the_longest_chain_is_networkxs_longest_path(drawn: list[tuple[set[int], float]]) -> None:
    """Random acyclic graphs, the weight of a step on the edges that leave it."""
    body, graph = [], nx.DiGraph()
    for at, (before, seconds) in enumerate(drawn):
        after = tuple(str(b) for b in sorted(before) if b < at)
        body.append(StepShape(name=str(at), kind="role", after=after))
        graph.add_edge(str(at), "end", weight=seconds)
        graph.add_edges_from((b, str(at), {"weight": drawn[int(b)][1]}) for b in after)
    times = {str(at): seconds for at, (_, seconds) in enumerate(drawn)}
    assert longest_chain_s(body, times) == pytest.approx(nx.dag_longest_path_length(graph))


def test_rounds_follow_each_other_and_items_run_side_by_side() -> None:
    inner = StepShape(name="b", kind="role")
    body = [
        StepShape(name="each", kind="graph", each=True, body=(inner,)),
        StepShape(name="loop", kind="loop", rounds=3, after=("each",), body=(inner, StepShape(name="c", kind="role"))),
    ]
    times = {"each#0/b": 1.0, "each#1/b": 3.0, "loop[1]/b": 1.0, "loop[1]/c": 2.0, "loop[2]/b": 4.0}
    assert longest_chain_s(body, times) == 3.0 + 2.0 + 4.0


def test_batches_are_compared_over_the_tasks_that_both_ran(store: RunStore) -> None:
    one, two = record(store, runs=4), record(store, runs=6, label="faster", decode_s=0.5)
    found = compare(read_ledger(store, one), read_ledger(store, two))
    assert (found.pairs, found.baseline_runs, found.other_runs) == (4, 4, 6)
    by_name = {difference.name: difference for difference in found.differences}
    assert by_name["score"].difference == 0 and by_name["score"].verdict == ""
    assert by_name["completion"].difference == pytest.approx(-0.5 * 4.5)
    assert by_name["completion"].verdict == "better"
    low, high = by_name["completion"].interval
    assert -3.0 <= low < high <= -1.5


def test_spans_and_pauses() -> None:
    assert merged([(3, 4), (0, 1), (0.5, 2)]) == [(0, 2), (3, 4)]
    assert merged([(0, 1), (1.5, 2)], gap=0.5) == [(0, 2)]
    squeezed, pauses = without_pauses([(100, 110), (105, 112), (1000, 1003)], pause_s=5)
    assert [squeezed(t) for t in (100, 112, 500, 1000, 1003)] == [0, 12, 12, 12, 15]
    assert pauses == [12]


def test_the_timeline_says_what_was_resident_in_use_and_waiting(store: RunStore) -> None:
    batch = record(store, runs=1)
    # The store stamps events when they are recorded; here the adapter came while the solver waited for it.
    store.query("UPDATE engine_events SET at = 1002.125")
    (line,) = engine_timelines(read_ledger(store, batch))
    lane = next(lane for lane in line.lanes if lane.variant == "lora")
    assert lane.adapter and line.length_s == 5.5
    assert lane.loading == [(pytest.approx(1.875), pytest.approx(2.125))]
    assert lane.resident == [(pytest.approx(2.125), pytest.approx(5.5))]
    assert lane.waiting == [(pytest.approx(1.75), pytest.approx(2.125))]
    assert lane.using == [(pytest.approx(2.5), pytest.approx(3.75))]
    assert max(line.running) == max(line.queued) == max(line.for_slot) == 1


def test_boxes_do_not_overlap_and_lie_in_their_frames() -> None:
    shape = workflow_shape(looped().build())
    drawing = lay_out(shape.body, lambda path, step: (100.0, 50.0))
    frame, *boxes = drawing.boxes
    for box in boxes:
        assert frame.x < box.x and box.x + box.width < frame.x + frame.width
        assert frame.y < box.y and box.y + box.height < frame.y + frame.height
    lefts = [box.x for box in boxes]
    assert lefts == sorted(lefts) and all(b - a > 100 for a, b in zip(lefts, lefts[1:], strict=False))
    assert sum(line.returns for line in drawing.lines) == 1


def test_lines_pass_between_boxes() -> None:
    """Whatever the graph, an edge over several layers crosses no box of those between."""
    body = [
        StepShape(name="a", kind="role"),
        StepShape(name="wide", kind="loop", rounds=2, after=("a",), body=(StepShape(name="x", kind="role"),)),
        StepShape(name="beside", kind="role", after=("a",)),
        StepShape(name="end", kind="role", after=("a", "wide", "beside")),
    ]
    drawing = lay_out(body, lambda path, step: (300.0 if path == "wide/x" else 80.0, 50.0))
    passing = next(line for line in drawing.lines if len(line.points) > 2)
    (_, y), (_, same) = passing.points[1:3]
    assert y == same
    for name in ("wide", "beside"):
        box = drawing.box(name)
        assert not box.y < y < box.y + box.height
        assert passing.points[1][0] <= box.x and box.x + box.width <= passing.points[2][0]


def parsed(page: str) -> Any:
    """The page as a browser understands it; raises on anything that the HTML standard calls a parse error."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)


def test_the_page_is_valid_whole_and_needs_nothing_from_elsewhere(store: RunStore) -> None:
    batches = [record(store), record(store, label='<faster> & "better"', decode_s=0.5, broken=True)]
    store.record_energy(batches[0], Energy(10.0, 100.0, ("intel-rapl:0 package-0",)))
    page = render_html(store, batches)
    tree = parsed(page)
    heads = ["".join(head.itertext()) for head in tree.iter("h2")]
    faster = '<faster> & "better"'
    assert heads == [f"{faster} against team", "Completion", "team", faster, "How to read it"]
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert not re.search(r"<script|@import|<link|\bsrc=|url\((?!#)|href=\"(?!#)", page)
    text = " ".join(tree.itertext())
    assert "The machine drew 100 J" in text and "1 running" in text
    assert "50.0" in text  # joules per solved task
    assert page == render_html(store, batches)


def test_sections_without_data_are_left_out(store: RunStore) -> None:
    tasks = [Task("0", Puzzle(text="0"))]
    batch, runs, _ = new_batch(looped().build(), tasks, 0, "idle", {})
    store.add_batch(batch, runs)
    for text in (render_html(store, [batch.id]), render_markdown(store, [batch.id])):
        assert "Nothing was asked." in text and "Energy is not shown" in text
        for absent in ("Rounds", "Steps", "Assignment", "Engines", "Runs that failed", "over time", "per solved task"):
            assert absent not in text
    parsed(render_html(store, [batch.id]))


def test_a_store_from_before_workflows_were_kept_has_no_bound_and_no_picture(store: RunStore) -> None:
    batch = record(store)
    store.query("UPDATE batches SET shape = ''")
    assert critical_path_s(read_ledger(store, batch)) == {}
    page = render_html(store, [batch])
    assert 'class="workflow"' not in page and "critical path</dt>" not in page
    parsed(page)


def test_markdown_has_the_same_tables(store: RunStore) -> None:
    text = render_markdown(store, [record(store), record(store, label="faster", decode_s=0.5)])
    assert "| planner | base | 6 | 6 | 240 | 48 (20 %) | 192 | 12 | 30 |" in text
    assert "| planner | 2 | base | 2 | 2 |" in text and "| attempt[2]/solver | lora | 2 | 2 |" in text
    assert "## faster against team" in text and "```mermaid" in text


def markdown_cell(text: str, head: str) -> str:
    """The first row's cell under a head of a Markdown report's first table."""
    heads, _, first, *_ = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|"))
    return dict(zip(heads, first, strict=True))[head]


def test_terminal_page_and_markdown_print_the_same_p95(store: RunStore) -> None:
    """Four runs of unlike length, so that definitions of a percentile differ."""
    batch = record(store, runs=4)
    page = parsed(render_html(store, [batch])).find(".//table")
    heads = ["".join(head.itertext()) for head in page.find("thead").iter("th")]
    cells = ["".join(cell.itertext()) for cell in page.find("tbody/tr")]
    expected = np.quantile(workflow_figures(read_ledger(store, batch)).completion_s, 0.95)
    for head in ("run p50 s", "run p95 s", "CPU-s", "solved", "needed round 2"):
        on_page = cells[heads.index(head)]
        assert markdown_cell(render_report(store, [batch]), head) == on_page, head
        assert markdown_cell(render_markdown(store, [batch]), head) == on_page, head
    assert cells[heads.index("run p95 s")] == f"{expected:.1f}"


def test_a_terminal_has_the_same_figures_in_narrow_tables(store: RunStore) -> None:
    assert render_report(store, []) == "# metier report\n\nNo runs yet.\n"
    text = render_report(store, [record(store), record(store, label="faster", broken=True)])
    assert "| planner | base | 6 | 6 | 240 | 48 (20 %) | 192 | 12 | 30 |" in text and "| cached tokens |" in text
    assert "- base@1: computed prompt tokens 1, CPU-s 2.00\n" in text
    assert "- asks of this batch: computed prompt tokens 576, " in text
    assert "| team | 4 | 2 of 4 | 2 |" in text and "1 running" in text and "```mermaid" in text
    widest = max(line.count(" | ") + 1 for line in text.splitlines() if line.startswith("| "))
    assert widest <= 10
    assert "bound" not in text and "interval" not in text  # what only the full report shows is not explained either


def test_texts_of_others_are_no_markup(store: RunStore) -> None:
    nasty = "a|b `c` <script>\n# d &amp; *e* [f](http://g) \x1b[31m"
    batch = record(store, label=nasty, broken=True)
    store.query("UPDATE runs SET error = ?, state = 'failed' WHERE state = 'running'", nasty)
    plain = nasty.replace("\n", " ").replace("\x1b", " ")
    for text in (render_report(store, [batch]), render_markdown(store, [batch])):
        html = MarkdownIt("commonmark").enable("table").render(text)
        tree = html5lib.parse(html, namespaceHTMLElements=False)
        shown = ["".join(element.itertext()) for tag in ("td", "h2", "li") for element in tree.iter(tag)]
        assert sum(plain in one for one in shown) == 3, shown
        assert not list(tree.iter("script")) and not list(tree.iter("a")) and not list(tree.iter("em"))
        assert "\x1b" not in text


def test_a_probes_folder_is_shown_or_refused(store: RunStore, tmp_path: Path) -> None:
    batch = record(store)
    with pytest.raises(ProfileError):
        render_markdown(store, [batch], tmp_path)
    profile = {
        "key": "k", "workflow": "w", "tasks": "t", "incumbent": "i", "role": "solver", "variant": "lora", "n": 8,
        "quality": 0.75, "quality_interval": [0.5, 0.9],
    }  # fmt: skip
    (tmp_path / "profiles.jsonl").write_text(json.dumps(profile) + "\n")
    assert "| solver | lora | 8 | 0.750 |" in render_markdown(store, [batch], tmp_path)
    measured = {"cpu_s": 1.0, "quality": 0.8, "quality_interval": [0.7, 0.9]}
    front = {"front": [{"cpu_s": 1.0, "quality": 0.8}], "table": [{"name": "chosen", "measured": measured}]}
    (tmp_path / "front.json").write_text(json.dumps(front))
    page = render_html(store, [batch], tmp_path)
    parsed(page)
    assert "chosen" in page
    (tmp_path / "front.json").write_text("{}")
    with pytest.raises(ProfileError, match="front.json cannot be read"):
        render_html(store, [batch], tmp_path)


def test_thinking_curves_of_a_card_are_shown_or_refused(store: RunStore) -> None:
    batch = record(store)
    curve = Saturation(0.1, 0.9, 10.0, 1.0, 0.0)
    points = [ThinkingPoint("solver", b, curve.accuracy(b), (0.0, 1.0), float(b), 20.0 + b, 50) for b in (0, 8, 32)]
    card = {"role": "solver", "thinking": {"points": [asdict(p) for p in points], "curves": {"solver": asdict(curve)}}}
    swept = Variant(id="0" * 16, name="tuned", base="b", prompt_layout=1, engine=EngineSpec(base="b"), card=card)
    page = render_html(store, [batch], curves=[swept])
    parsed(page)
    assert "Thinking of solver: tuned" in page and "Thinking curves of tuned" in page
    text = render_markdown(store, [batch], curves=[swept])
    assert "| solver | 32 | 50 | 0.867 | 0.00 to 1.00 | 32.0 | 52.0 |" in text
    with pytest.raises(VariantError, match="no thinking curves on its card"):
        render_markdown(store, [batch], curves=[swept.model_copy(update={"card": {}})])


def test_without_matplotlib_the_page_is_refused_and_markdown_is_not(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = record(store)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SettingsError, match="eval.*--markdown"):
        render_html(store, [batch])
    assert "# solve-and-check" in render_markdown(store, [batch])
