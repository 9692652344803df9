"""Runs over HTTP: started, watched, cancelled, resumed and answered; and the page that shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from metier.runtime.events import Event
from metier.runtime.server.event_hub import EventHub
from metier.runtime.server.served_models import ServedWorkflow
from metier.runtime.settings.server import ServerSettings
from metier.runtime.settings.session import load_settings
from tests import workflow_for_cli, workflow_of_questions
from tests.runtime.browser import CHROMIUM, open_browser
from tests.runtime.served import WORKFLOWS, Gate, Served, scripted, server

ASKING = [
    *WORKFLOWS,
    ServedWorkflow(workflow_for_cli.asking.build()),
    ServedWorkflow(workflow_of_questions.graph.build()),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with server(scripted(), workflows=ASKING) as running:
        yield running


def start(served: Served, workflow: str = "chain", **more: Any) -> dict[str, Any]:
    answer = httpx.post(f"{served.url}/v1/runs", json={"workflow": workflow, "input": {"text": "2 cows"}, **more})
    assert answer.status_code == 201, answer.text
    run: dict[str, Any] = answer.json()
    return run


def events(served: Served, run_id: str, **query: Any) -> list[tuple[str, Any]]:
    """Everything a watcher hears until the stream ends."""
    text = httpx.get(f"{served.url}/v1/runs/{run_id}/events", params=query, timeout=30).text
    heard = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if lines:
            heard.append((lines["event"], json.loads(lines["data"])))
    return heard


def test_a_run_is_started_watched_to_its_end_and_found_again() -> None:
    gate = Gate()
    with server(gate) as served:
        run = start(served, seed=3)
        assert run["workflow"] == "chain" and run["input"] == {"text": "2 cows"}
        with httpx.stream("GET", f"{served.url}/v1/runs/{run['id']}/events?text=true", timeout=30) as watching:
            lines = watching.iter_lines()
            assert next(lines) == "event: run"
            gate.open()
            kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        assert kinds[-2:] == ["run_finished", "run"] and "text" in kinds
        assert kinds.count("step_started") + kinds.count("step_finished") >= 3
        found = httpx.get(f"{served.url}/v1/runs/{run['id']}").json()
        assert found["state"] == "finished" and found["output"] == {"value": 4}
        assert [step["path"] for step in found["steps"]] == ["planner", "solver"]
        assert httpx.get(f"{served.url}/v1/runs?limit=1").json()["data"][0]["id"] == run["id"]
        state = httpx.get(f"{served.url}/v1/state").json()
        assert state["roles"]["planner"]["asks"] == 1 and state["running"] == {}


def test_a_watcher_comes_back_to_what_it_has_missed(served: Served) -> None:
    run_id = start(served)["id"]
    while httpx.get(f"{served.url}/v1/runs/{run_id}").json()["state"] != "finished":
        pass
    heard = events(served, run_id, after=0)
    assert [kind for kind, _ in heard][:2] == ["run", "run_started"] and heard[-1][0] == "run_finished"
    assert [kind for kind, _ in events(served, run_id)] == ["run"]


def test_a_run_is_cancelled_and_resumed_without_asking_again() -> None:
    gate = Gate()
    with server(gate) as served:
        run_id = start(served)["id"]
        assert gate.arrived.acquire(timeout=10)
        assert httpx.post(f"{served.url}/v1/runs/{run_id}/resume").status_code == 409
        assert httpx.post(f"{served.url}/v1/runs/{run_id}/cancel").json() == {"id": run_id, "cancelled": True}
        assert gate.cancelled.acquire(timeout=10)
        again = httpx.post(f"{served.url}/v1/runs/{run_id}/cancel")
        assert again.status_code == 409 and again.json()["error"]["code"] == "run_not_running"
        stopped = httpx.get(f"{served.url}/v1/runs/{run_id}").json()
        assert stopped["state"] == "stopped" and stopped["error"] == "cancelled"
        gate.open()
        assert httpx.post(f"{served.url}/v1/runs/{run_id}/resume").status_code == 202
        assert events(served, run_id, after=0)[-1][0] in ("run", "run_finished")
        assert httpx.get(f"{served.url}/v1/runs/{run_id}").json()["output"] == {"value": 4}
        assert httpx.post(f"{served.url}/v1/runs/{run_id}/resume").json()["error"]["code"] == "run_cannot_resume"


def test_a_run_that_waits_for_a_person_is_answered_over_http(served: Served) -> None:
    run_id = start(served, "asking")["id"]
    events(served, run_id)
    waiting = httpx.get(f"{served.url}/v1/runs/{run_id}").json()
    assert waiting["state"] == "interrupted" and waiting["questions"] == {"approve": "Is 2 + 2 fine?"}
    resume = f"{served.url}/v1/runs/{run_id}/resume"
    misfit = httpx.post(resume, json={"answers": {"approve": {"ok": "perhaps"}}})
    assert misfit.status_code == 409 and "does not fit the question" in misfit.json()["error"]["message"]
    assert httpx.post(resume, json={"answers": {"approve": {"ok": True}}}).status_code == 202
    events(served, run_id)
    assert httpx.get(f"{served.url}/v1/runs/{run_id}").json()["output"] == {"value": 4}
    # As a chat, the same workflow says where to answer.
    error = httpx.post(
        f"{served.url}/v1/chat/completions", json={"model": "asking", "messages": [{"role": "user", "content": "x"}]}
    ).json()["error"]
    assert error["code"] == "run_waits_for_person" and "/resume" in error["message"]


def test_open_questions_are_in_the_state_and_what_a_run_did_is_shown(served: Served) -> None:
    run_id = start(served, "asking")["id"]
    events(served, run_id)
    state = httpx.get(f"{served.url}/v1/state").json()
    (question,) = [one for one in state["questions"] if one["run"] == run_id]
    assert (question["path"], question["question"], question["gives"]) == (
        "approve", "Is 2 + 2 fine?", '{"ok": true or false}'
    )  # fmt: skip
    resume = f"{served.url}/v1/runs/{run_id}/resume"
    assert httpx.post(resume, json={"answers": {"approve": {"ok": True}}}).status_code == 202
    events(served, run_id)
    twice = httpx.post(resume, json={"answers": {"approve": {"ok": True}}})
    assert twice.status_code == 409 and "is finished" in twice.json()["error"]["message"]
    shown = httpx.get(f"{served.url}/v1/runs/{run_id}?texts=true").json()["shown"]
    assert [step["path"] for step in shown["steps"]] == ["planner", "solver"]
    assert shown["steps"][0]["asks"][0]["messages"][-1]["content"].startswith("# puzzle\n2 cows")
    assert shown["questions"][0]["answer"] == {"ok": True}
    assert "shown" not in httpx.get(f"{served.url}/v1/runs/{run_id}").json()


def test_a_server_may_keep_prompts_and_answers_to_itself() -> None:
    settings = load_settings(overrides={"server.drain_s": 1.0, "report.texts": False})
    with server(scripted(), settings=settings) as served:
        run_id = start(served)["id"]
        refused = httpx.get(f"{served.url}/v1/runs/{run_id}?texts=true")
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "texts_off"
        assert httpx.get(f"{served.url}/v1/state").json()["texts"] is False


def test_two_questions_of_one_name_are_answered_apart_over_http(served: Served) -> None:
    run_id = start(served, "order", input={"name": "tea"})["id"]
    events(served, run_id)
    resume = f"{served.url}/v1/runs/{run_id}/resume"
    answers: dict[str, Any] = {"budget/approve": {"euros": 3}, "owner/approve": {"euros": 3}}
    misfit = httpx.post(resume, json={"answers": answers})
    assert misfit.status_code == 409 and "the question at 'owner/approve'" in misfit.json()["error"]["message"]
    assert httpx.post(resume, json={"answers": {"owner/approve": {"who": "Ada"}}}).status_code == 202
    events(served, run_id)
    assert httpx.get(f"{served.url}/v1/runs/{run_id}").json()["questions"] == {"budget/approve": "How much for tea?"}
    assert httpx.post(resume, json={"answers": {"budget/approve": {"euros": 4}}}).status_code == 202
    events(served, run_id)
    assert httpx.get(f"{served.url}/v1/runs/{run_id}").json()["output"] == {"text": "Ada: 4"}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/runs", {"workflow": "nobody", "input": {}}, 404, "workflow_not_found"),
        ("/v1/runs", {"workflow": "chain", "input": {"txt": 1}}, 400, "invalid_input"),
        ("/v1/runs", {"workflow": "chain", "input": {"text": "x"}, "max_tokens": 0}, 400, "invalid_request"),
        ("/v1/runs/nobody/cancel", None, 404, "run_not_found"),
        ("/v1/runs/nobody/resume", {"answers": {}}, 404, "run_not_found"),
    ],
)
def test_what_cannot_be_run_is_said(served: Served, path: str, body: Any, status: int, code: str) -> None:
    answer = httpx.post(served.url + path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_watchers_are_bounded() -> None:
    settings = load_settings(overrides={"server.watchers": 1, "server.watch_backlog": 2, "server.drain_s": 1.0})
    with server(scripted(), settings=settings) as served, httpx.Client(base_url=served.url) as client:
        with client.stream("GET", "/v1/events") as watching:
            lines = watching.iter_lines()
            assert next(lines) == ": watching"
            late = httpx.get(f"{served.url}/v1/events")
            assert late.status_code == 429 and late.json()["error"]["code"] == "too_many_watchers"


def test_a_watcher_that_falls_behind_is_let_go_and_may_come_back() -> None:
    async def main() -> None:
        hub = EventHub(ServerSettings(watch_backlog=2, events_kept=3))
        async with hub.watch() as events, hub.watch("another run") as others:
            for number in range(5):
                hub.on_event(Event(kind="step_started", run_id="r", step_path=str(number)))
            assert [event.step_path async for _, event in events] == ["0", "1"]
            assert others.statistics().current_buffer_used == 0
        async with hub.watch(after=2) as events:
            hub.close()
            assert [event.step_path async for _, event in events] == ["2", "3", "4"]

    anyio.run(main)


def test_figures_for_prometheus_equal_the_sums_of_the_store(served: Served) -> None:
    run_id = start(served)["id"]
    events(served, run_id)
    text = httpx.get(f"{served.url}/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    for role in ("planner", "solver"):
        for kind in ("prompt", "answer"):
            sums = f"SELECT sum({kind}_tokens) AS n FROM asks WHERE role = ?"
            (row,) = served.store.query(sums, role)
            found = figures[f'metier_tokens_total{{kind="{kind}",role="{role}",variant="base"}}']
            assert float(found) == row["n"]


# --- the page -------------------------------------------------------------------------------------------------


class Outside(HTMLParser):
    """Collects what a page would fetch from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href") and value and not value.startswith("data:"):
                self.fetched.append(value)
            if name == "id" and value:
                self.ids.add(value)


def test_the_page_is_whole_in_one_file_and_fetches_from_its_server_only(served: Served) -> None:
    page = httpx.get(served.url)
    outside = Outside()
    outside.feed(page.text)
    assert (
        outside.fetched == [] and {"graphs", "roles", "runs", "slots", "decisions", "questions", "steps"} <= outside.ids
    )
    assert "default-src 'none'" in page.headers["content-security-policy"] and "http" not in page.text
    for path in ("/v1/state", "/v1/runs?limit=20"):
        assert path.partition("?")[0] in page.text and httpx.get(served.url + path).status_code == 200


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page is only parsed")
def test_the_page_in_a_browser_shows_what_runs_as_it_runs(tmp_path: Path) -> None:
    gate = Gate()
    with server(gate) as served, open_browser(tmp_path / "profile") as browser:
        browser.open(served.url)
        browser.wait("document.getElementById('status')?.textContent === 'live'")
        answer = httpx.post(f"{served.url}/v1/runs", json={"workflow": "chain", "input": "<b onclick=x>cows</b>"})
        run_id = answer.json()["id"]
        assert gate.arrived.acquire(timeout=10)
        browser.wait("document.querySelector('.node.on')?.dataset.path === 'planner'")
        assert browser.value("document.querySelectorAll('.node').length") == 3
        assert "<b onclick=x>" in browser.value("document.getElementById('runs').innerText")  # as text, not markup
        assert browser.value("document.querySelectorAll('#runs b').length") == 0
        gate.open()
        browser.wait("document.querySelector('#runs .finished') !== null")
        browser.wait("document.querySelectorAll('.node.on').length === 0")
        assert run_id in browser.value("document.getElementById('runs').innerText")
        assert "solver" in browser.value("document.getElementById('roles').innerText")
        picture = tmp_path / "page.png"
        browser.screenshot(picture)
        assert picture.stat().st_size > 10_000 and browser.console == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page is only parsed")
def test_the_page_asks_for_a_key_and_cancels_a_run(tmp_path: Path) -> None:
    gate = Gate()
    with server(gate, key="secret") as served, open_browser(tmp_path / "profile") as browser:
        browser.open(served.url)
        browser.wait("document.getElementById('key')?.hidden === false")
        browser.value(
            "document.querySelector('#key input').value = 'secret', document.querySelector('#key button').click()"
        )
        headers = {"authorization": "Bearer secret"}
        run = {"workflow": "chain", "input": "cows"}
        httpx.post(f"{served.url}/v1/runs", json=run, headers=headers).raise_for_status()
        browser.wait("document.querySelector('#runs button')?.textContent === 'cancel'")
        browser.value("document.querySelector('#runs button').click()")
        assert gate.cancelled.acquire(timeout=10)
        browser.wait("document.querySelector('#runs .stopped') !== null")
