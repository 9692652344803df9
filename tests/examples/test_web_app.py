"""The example of a web application: its handlers run workflows on one session."""

from __future__ import annotations

import json

import pytest

from metier.agents import ScriptedBackend
from metier.runtime import open_session

fastapi = pytest.importorskip("fastapi")


def test_its_handlers_run_workflows_and_stream_them() -> None:
    from fastapi.testclient import TestClient

    from metier.examples.web_app import make_app

    backend = ScriptedBackend({"solver": [{"value": 19}, {"value": 19}, "no", "no", "no", "no"]})
    with TestClient(make_app(lambda: open_session(backend=backend, store=":memory:"))) as client:
        assert client.post("/solve", json={"text": "12 + 7"}).json() == {"value": 19}
        events = [json.loads(line) for line in client.post("/watch", json={"text": "12 + 7"}).text.splitlines()]
        assert [events[0]["kind"], events[-1]["kind"]] == ["run_started", "run_finished"]
        assert client.post("/solve", json={"txt": "12 + 7"}).status_code == 422
        refused = client.post("/solve", json={"text": "12 + 7"})
        assert refused.status_code == 502 and "solver" in refused.json()["error"]
