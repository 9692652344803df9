"""MCP servers as tools: they answer, and whatever they do wrong is a named error or a result."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metier.agents import McpServer, Role, Tool, ToolError, mcp_tools
from metier.runtime.settings.tools import ToolSettings
from metier.runtime.tools.calling import CallResult, ToolCaller
from tests.agents.workflow import Answer, Puzzle
from tests.runtime.tools.server import server

pytest.importorskip("mcp")
pytestmark = pytest.mark.anyio

REAL_SERVER = """
import sys, uvicorn
from mcp.server.mcpserver import MCPServer
server = MCPServer("real")
@server.tool()
def add(one: int, other: int) -> int:
    "Adds."
    return one + other
@server.tool()
def fill(mib: int) -> str:
    "Fills."
    return mib * 2**20 * "x"
app = server.streamable_http_app(json_response="json" in sys.argv)
config = uvicorn.Config(app, port=0, log_level="error")
class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)
Server(config).run()
"""


async def tools(caller: ToolCaller, declared: McpServer) -> dict[str, Tool]:
    role = Role("solver", takes=Puzzle, gives=Answer, tools=[declared])
    return {each.name: each for each in await caller.tools_of(role)}


async def refused(declared: McpServer, **settings: Any) -> str:
    async with ToolCaller(ToolSettings(**settings)) as caller:
        with pytest.raises(ToolError) as error:
            await tools(caller, declared)
        return str(error.value)


def alive(folder: Path) -> bool:
    """Whether a server of this folder still runs."""
    found = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout.split()
    return bool(found)


async def test_a_server_is_one_connection_that_closes_with_the_session(tmp_path: Path) -> None:
    async with ToolCaller(ToolSettings()) as caller:
        found = await tools(caller, server(tmp_path))
        assert list(found)[:2] == ["upper", "die"] and found["upper"].description == "Does upper."
        assert found["upper"].parameters["required"] == ["text"]
        assert await caller.call(found["upper"], {"text": "a"}) == CallResult("A")
        assert await caller.call(found["fail"], {"text": "sorry"}) == CallResult("error: sorry", failed=True)
        await tools(caller, server(tmp_path))
        assert alive(tmp_path)
    assert (tmp_path / "starts").read_text() == "x" and not alive(tmp_path)


async def test_tools_are_narrowed_by_name(tmp_path: Path) -> None:
    async with ToolCaller(ToolSettings(mcp_max_tools=2)) as caller:
        assert list(await tools(caller, server(tmp_path, names=["hang", "upper"]))) == ["hang", "upper"]
    assert "has no tool 'nothing'; expected some of upper, die" in await refused(server(tmp_path, names=["nothing"]))
    assert "lists 107 tools; expected at most mcp_max_tools=64" in await refused(server(tmp_path, "many"))


async def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    assert "No such file" in await refused(mcp_tools(str(tmp_path / "nothing")))
    assert "it said: oops" in await refused(mcp_tools("sh -c 'echo oops >&2; exit 3'"))
    muted = await refused(server(tmp_path, "mute"), mcp_start_timeout_s=0.5)
    assert "did not list its tools within mcp_start_timeout_s=0.5" in muted
    assert not alive(tmp_path)
    assert "cannot be used" in await refused(mcp_tools("http://127.0.0.1:9/mcp"), mcp_start_timeout_s=5)


async def test_a_server_that_dies_is_started_again_within_bounds(tmp_path: Path) -> None:
    async with ToolCaller(ToolSettings(mcp_restarts=1)) as caller:
        found = await tools(caller, server(tmp_path))
        died = await caller.call(found["die"], {"text": "boredom"})
        assert died.failed and "the connection broke; it said: dying of boredom" in died.text
        assert await caller.call(found["upper"], {"text": "b"}) == CallResult("B")
        assert (await caller.call(found["die"], {"text": "x"})).failed
        gone = await caller.call(found["upper"], {"text": "c"})
        assert gone.failed and "it broke 2 times" in gone.text
    assert (tmp_path / "starts").read_text() == "xx"


async def test_a_tool_that_is_gone_after_a_restart_is_an_error_of_its_call(tmp_path: Path) -> None:
    async with ToolCaller(ToolSettings()) as caller:
        found = await tools(caller, server(tmp_path, "changes"))
        await caller.call(found["die"], {"text": ""})
        assert await caller.call(found["fail"], {"text": ""}) == CallResult("error: no fail", failed=True)


async def test_a_server_that_hangs_is_given_up_and_others_answer(tmp_path: Path) -> None:
    async with ToolCaller(ToolSettings()) as caller:
        found = await tools(caller, server(tmp_path, timeout_s=0.3))
        assert await caller.call(found["hang"], {"text": ""}) == CallResult(
            "error: no result within 0.3 s", failed=True
        )
        (tmp_path / "other").mkdir()
        other = await tools(caller, server(tmp_path / "other"))
        assert await caller.call(other["upper"], {"text": "a"}) == CallResult("A")
    assert not alive(tmp_path), "one that hangs is killed"


async def test_a_server_that_floods_is_read_to_its_answer_or_disconnected(tmp_path: Path) -> None:
    async with ToolCaller(ToolSettings(mcp_max_message_mib=1, max_result_characters=100)) as caller:
        found = await tools(caller, server(tmp_path, "chatty"))
        assert await caller.call(found["flood"], {"text": "after all"}) == CallResult("after all")
        huge = await caller.call(found["huge"], {"text": ""})
        assert huge.failed and "MCP server" in huge.text
        assert await caller.call(found["upper"], {"text": "a"}) == CallResult("A")


async def test_a_large_message_is_named(tmp_path: Path) -> None:
    async with ToolCaller(ToolSettings(mcp_max_message_mib=1)) as caller:
        found = await tools(caller, server(tmp_path))
        assert "it sent a message of more than 1 MiB" in (await caller.call(found["huge"], {"text": ""})).text


async def test_a_server_gets_no_secrets_but_those_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret-a")
    monkeypatch.setenv("OTHER_TOKEN", "secret-b")
    async with ToolCaller(ToolSettings()) as caller:
        found = await tools(caller, server(tmp_path, pass_env=["SOME_TOKEN"]))
        seen = (await caller.call(found["environment"], {"text": ""})).text
    assert "secret-a" in seen and "secret-b" not in seen and os.environ["PATH"] in seen


@pytest.fixture(params=["json", "events"])
def real_server(request: pytest.FixtureRequest) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", REAL_SERVER, request.param], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/mcp"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def test_a_server_over_http(real_server: str) -> None:
    async with ToolCaller(ToolSettings(mcp_max_message_mib=1)) as caller:
        found = await tools(caller, mcp_tools(real_server))
        assert found["add"].description == "Adds."
        assert await caller.call(found["add"], {"one": 2, "other": 3}) == CallResult("5")
        assert (await caller.call(found["add"], {"one": "x"})).failed
        flooded = await caller.call(found["fill"], {"mib": 20})
        assert flooded.failed and "no result within" not in flooded.text
        assert await caller.call(found["add"], {"one": 2, "other": 4}) == CallResult("6")
