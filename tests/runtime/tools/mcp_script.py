"""An MCP server over stdio for tests, in plain JSON: it starts at once, and can misbehave in named ways."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}


def send(message: dict[str, Any]) -> None:
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def listed(ways: set[str], starts: int) -> list[dict[str, Any]]:
    names = ["upper", "die", "hang", "huge", "flood", "fail", "environment"]
    names += [f"tool{number}" for number in range(100)] if "many" in ways else []
    names = [name for name in names if name != "fail"] if "changes" in ways and starts > 1 else names
    return [{"name": name, "description": f"Does {name}.\n\nMore.", "inputSchema": TEXT} for name in names]


def called(name: str, text: str, request: Any) -> dict[str, Any]:
    if name == "die":
        print("dying of", text, file=sys.stderr, flush=True)
        os._exit(3)
    if name == "hang":
        time.sleep(3600)
    if name == "huge":
        text = "x" * (3 << 20)
    if name == "flood":
        for number in range(5000):
            send({"method": "notifications/message", "params": {"level": "info", "data": f"{number}" * 20}})
    if name == "environment":
        text = json.dumps(dict(os.environ))
    return {"content": [{"type": "text", "text": text.upper() if name == "upper" else text}], "isError": name == "fail"}


def main() -> None:
    folder, ways = Path(sys.argv[1]), set(sys.argv[2:])
    with (folder / "starts").open("a") as file:
        file.write("x")
    starts = len((folder / "starts").read_text())
    if "mute" in ways:
        time.sleep(3600)
    if "chatty" in ways:
        print("Welcome! I am no JSON.", flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        method, request, params = message.get("method"), message.get("id"), message.get("params") or {}
        if request is None:
            continue
        if method == "initialize":
            info = {"name": "test", "version": "1"}
            result: Any = {
                "protocolVersion": params["protocolVersion"],
                "capabilities": {"tools": {}},
                "serverInfo": info,
            }
        elif method == "tools/list":
            result = {"tools": listed(ways, starts)}
        elif method == "tools/call" and params["name"] in {tool["name"] for tool in listed(ways, starts)}:
            result = called(params["name"], params["arguments"].get("text", ""), request)
        else:
            send({"id": request, "error": {"code": -32601, "message": f"no {params.get('name', method)}"}})
            continue
        send({"id": request, "result": result})


if __name__ == "__main__":
    main()
