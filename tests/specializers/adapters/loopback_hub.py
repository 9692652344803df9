"""A hub of our own on loopback: the few endpoints of Hugging Face's that pushing and pulling a folder uses."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


class LoopbackHub:
    """Repositories as files by path; `requests` are what was asked, `url` is where it listens."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = ""

    def sha(self, repo: str) -> str:
        """The repository's commit, named by its content."""
        content = json.dumps({path: hashlib.sha256(data).hexdigest() for path, data in self.repos[repo].items()})
        return hashlib.sha1(content.encode()).hexdigest()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Status, body (JSON, or bytes) and headers."""
        parts = unquote(path.partition("?")[0]).strip("/").split("/")
        match (method, parts):
            case ("POST", ["api", "repos", "create"]):
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                if repo in self.repos:
                    return 409, {"url": f"{self.url}/{repo}"}, {}
                self.repos[repo], self.private[repo] = (
                    {},
                    asked.get("visibility") == "private" or bool(asked.get("private")),
                )
                return 200, {"url": f"{self.url}/{repo}"}, {}
            case ("POST", ["api", "models", owner, name, "preupload", _]):
                files = [
                    {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                     "shouldIgnore": False, "oid": None}
                    for one in json.loads(body)["files"]
                ]  # fmt: skip
                return 200, {"files": files}, {}
            case ("POST", [*_, "info", "lfs", "objects", "batch"]):
                objects = [
                    one | {"actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]
                return 200, {"transfer": "basic", "objects": objects}, {}
            case ("PUT", ["lfs", oid]):
                assert hashlib.sha256(body).hexdigest() == oid
                self.stored[oid] = body
                return 200, {}, {}
            case ("POST", ["api", "models", owner, name, "commit", _]):
                return 200, self._commit(f"{owner}/{name}", body), {}
            case (_, [*_]) if not any("/".join(parts[at : at + 2]) in self.repos for at in (0, 2)):
                return 404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"}
            case ("GET", ["api", "models", owner, name, *_]) if "tree" not in parts:
                return 200, {"id": f"{owner}/{name}", "sha": self.sha(f"{owner}/{name}"), "siblings": []}, {}
            case ("GET", ["api", "models", owner, name, "tree", *_]):
                files = self.repos[f"{owner}/{name}"]
                return 200, [{"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in files.items()], {}
            case (_, [owner, name, "resolve", commit, *file]):
                data = self.repos[f"{owner}/{name}"]["/".join(file)]
                return 200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return 404, {"error": f"{method} {path}"}, {}

    def _commit(self, repo: str, body: bytes) -> dict[str, Any]:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.stored[value["oid"]]
        oid = self.sha(repo)
        return {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A hub that listens while the block runs."""
    hub = LoopbackHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {self.path}")
            status, answer, headers = hub.answer(self.command, self.path, body)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = _do

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
