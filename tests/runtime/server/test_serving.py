"""`metier serve` as a process: its address, its key, SIGTERM; and its OpenAPI document against arbitrary requests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metier.agents.errors import ServerError
from metier.runtime.server.request_checks import is_loopback
from metier.runtime.server.serving import api_key, listen_on
from tests import workflow_for_cli
from tests.runtime.served import WORKFLOWS, Served, scripted, server

WORKFLOW = Path(workflow_for_cli.__file__)


def test_workflows_of_several_files_have_no_script_in_common(tmp_path: Path) -> None:
    other = Path(WORKFLOW).with_name("workflow_with_tools.py")
    program = [sys.executable, "-c", "from metier.runtime.cli.main import main; main()"]
    options = ["--engine", "scripted", "--store", str(tmp_path / "runs.db"), "--port", "0"]
    done = subprocess.run(
        [*program, "serve", f"{WORKFLOW}:graph", str(other), *options], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "workflows of several files on the scripted engine" in done.stderr


def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from metier.runtime.cli.main import main; main()"]
    options = ["--engine", "scripted", "--store", str(tmp_path / "runs.db"), "--port", "0"]
    call = [*program, "serve", f"{WORKFLOW}:graph", *options]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        address = next(line for line in process.stderr if "serving" in line).split()[1].removesuffix("/v1")
        chat = {"model": "chain", "messages": [{"role": "user", "content": "7"}]}
        answer = httpx.post(f"{address}/v1/chat/completions", json=chat).json()
        assert answer["choices"][0]["message"]["content"] == '{"value":7}'
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert "stopped" in process.stderr.read()
    finally:
        process.kill()
        process.wait()
    # What was served is in the store as any other run, with what `metier resume` needs.
    from metier.runtime import RunStore

    with RunStore(tmp_path / "runs.db") as store:
        (batch,) = store.batches()
        assert batch.label == "served" and batch.options["workflow"] == f"{WORKFLOW}:graph"


def test_a_second_signal_does_not_wait_and_shows_no_traceback(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from metier.runtime.cli.main import main; main()"]
    options = ["--engine", "scripted", "--store", str(tmp_path / "runs.db"), "--port", "0"]
    process = subprocess.Popen(
        [*program, "serve", f"{WORKFLOW}:graph", *options],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    try:
        port = int(next(line for line in process.stderr if "serving" in line).split(":")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as client:  # a body that never comes keeps the server
            head = "POST /v1/runs HTTP/1.1", "Host: localhost", "Content-Length: 9", "Expect: 100-continue", "", ""
            client.sendall("\r\n".join(head).encode())
            assert client.recv(1 << 10).startswith(b"HTTP/1.1 100")  # it waits for the body now
            process.send_signal(signal.SIGINT)
            said = next(line for line in process.stderr if "stopping" in line)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        said += process.stderr.read()
        assert "stopped; runs that were under way" in said and "Traceback" not in said
    finally:
        process.kill()
        process.wait()


def test_a_port_that_is_taken_and_an_open_address_without_a_key_are_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with listen_on("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"cannot listen on 127.0.0.1 port {port}: .*in use.*--port"):
            listen_on("127.0.0.1", port)
    with pytest.raises(ServerError, match="cannot listen on 203.0.113.1"):
        listen_on("203.0.113.1", 0)
    monkeypatch.delenv("METIER_API_KEY", raising=False)
    assert api_key("127.0.0.1") is None
    with pytest.raises(ServerError, match=r"host 0\.0\.0\.0 can be reached .* METIER_API_KEY is not set"):
        api_key("0.0.0.0")
    monkeypatch.setenv("METIER_API_KEY", "secret")
    assert api_key("0.0.0.0") == "secret"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("localhost", True), ("127.3.2.1", True), ("::1", True), ("0.0.0.0", False), ("localhost.example.org", False)],
)
def test_which_addresses_are_this_machines_own(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


# --- whatever is sent -----------------------------------------------------------------------------------------

SMALL_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]), "content": st.text(max_size=30)}
)


def _body(document: dict[str, Any], schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Bodies near a schema of the document: its fields, some as they should be and some as anything."""
    name = schema["$ref"].rsplit("/", 1)[1]
    fields = document["components"]["schemas"][name]["properties"]
    good: dict[str, st.SearchStrategy[Any]] = {
        "model": st.sampled_from(["chain", "planner", "base", "variant:base", "chain/solver", "nobody"]),
        "messages": st.lists(MESSAGE, max_size=3),
        "stream": st.booleans(),
        "workflow": st.sampled_from(["chain", "nobody"]),
        "input": st.fixed_dictionaries({"text": st.text(max_size=20)}),
        "thinking": st.integers(-2, 64) | st.just("off") | st.fixed_dictionaries({"max_tokens": st.integers()}),
        "response_format": st.fixed_dictionaries(
            {
                "type": st.sampled_from(["text", "json_object", "json_schema"]),
                "json_schema": st.fixed_dictionaries({"name": st.text(), "schema": SMALL_JSON}),
            }
        ),
    }
    each = {field: good[field] | SMALL_JSON if field in good else SMALL_JSON for field in fields}
    required = {field: each.pop(field) for field in ("model", "messages", "workflow", "input") if field in each}
    return st.fixed_dictionaries(required, optional=each) | SMALL_JSON


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with server(scripted(), workflows=WORKFLOWS) as running:
        yield running


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_no_request_whatever_gets_a_5xx(served: Served, data: st.DataObject) -> None:
    with httpx.Client(base_url=served.url) as client:
        document = client.get("/openapi.json").json()
        endpoints = [
            (method, path, endpoint)
            for path, methods in document["paths"].items()
            for method, endpoint in methods.items()
            if path not in ("/v1/events",)  # endless
        ]
        method, path, endpoint = data.draw(st.sampled_from(endpoints))
        query: dict[str, Any] = {}
        for parameter in endpoint.get("parameters", ()):
            if parameter["in"] == "path":
                piece = data.draw(st.text(st.characters(codec="utf-8", exclude_characters="/?#."), min_size=1))
                path = path.replace(f"{{{parameter['name']}}}", quote(piece, safe=""))
            elif parameter["in"] == "query" and data.draw(st.booleans()):
                query[parameter["name"]] = data.draw(st.text() | st.integers())
        body = None
        if "requestBody" in endpoint:
            schema = endpoint["requestBody"]["content"]["application/json"]["schema"]
            body = data.draw(_body(document, schema if "$ref" in schema else schema["anyOf"][0]))
        answer = client.request(method, path, params=query, json=body)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_schemathesis_finds_no_5xx(served: Served, tmp_path: Path) -> None:
    environment = {**os.environ, "NO_COLOR": "1"}
    call = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{served.url}/openapi.json"]
    options = ["--checks", "not_a_server_error", "--max-examples", "6", "--seed", "1", "--phases", "fuzzing"]
    endless = ["--exclude-path", "/v1/events", "--generation-database", "none"]
    whole = [*call, *options, *endless]
    done = subprocess.run(whole, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
