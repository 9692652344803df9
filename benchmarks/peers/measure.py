"""The same workflow by peers and by ours, in paired rounds: `python benchmarks/peers/measure.py --rounds 3`.

24 programs, 16 at a time: a planner, then two rounds of solver and critic, an adapter per role, 32 tokens an ask.
LangGraph, pydantic-ai and the OpenAI client ask vLLM's own server (no plugin of ours), and the same clients ask
`metier serve`; beside them a metier session with the engine inside, and one with all roles on the base: the
ceiling. One engine is alive at a time; starting it and a first small batch are not measured. Each measured batch is a
line of the journal, and what is there is not measured again, so a stopped run goes on; `--table` prints it.
`make clients` makes the clients' environment.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from install_size import installed_mib
from ours import BENCHMARKS, make_parts
from servers import Served, server
from workflow import briefs

HERE = Path(__file__).parent
sys.path.insert(0, str(BENCHMARKS))
from harness import append_row, arguments, in_turns, read_rows  # noqa: E402
from table import markdown  # noqa: E402

CLIENTS = BENCHMARKS.parent / ".venv-clients/bin/python"
PEERS = {"langgraph": "langgraph_client.py", "pydantic-ai": "pydantic_ai_client.py", "openai": "openai_client.py"}
ARMS = {
    **{f"stock/{peer}": ("stock", peer) for peer in PEERS},
    **{f"ours/{peer}": ("ours", peer) for peer in PEERS},
    "embedded": ("embedded", "session"),
    "ceiling": ("ceiling", "session"),
}
INSTALLED = {
    "langgraph": ("langgraph", "langchain-openai"),
    "pydantic-ai": ("pydantic-ai-slim", "openai"),
    "openai": ("openai",),
}
"""What a user installs for each client."""

WARM_UP_PROGRAMS = 2


class Client:
    """A client process, given batches of programs in turn."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, texts: list[str], at_once: int) -> dict[str, Any]:
        """What the batch took, as `workflow.Batch`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"texts": texts, "at_once": at_once}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} has ended with {self._process.wait()}")
        batch: dict[str, Any] = json.loads(line)
        return batch

    def resident_mib(self) -> float:
        """Resident memory of the client, or of session and engine together."""
        import psutil

        return float(psutil.Process(self._process.pid).memory_full_info().pss / (1 << 20))

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def client(command: list[str]) -> Iterator[Client]:
    """A client process for the length of a block."""
    opened = Client(command)
    try:
        yield opened
    finally:
        opened.close()


def commands(host: str, name: str, folder: Path, served: Served | None) -> list[str]:
    """How an arm's client is started."""
    if served is not None:
        return [str(CLIENTS), str(HERE / PEERS[name]), f"{served.url}/v1"]
    bare = ["--no-adapters"] if host == "ceiling" else []
    return [sys.executable, str(HERE / "embedded.py"), str(folder), *bare]


def measure(arm: str, number: int, served: Served | None, options: argparse.Namespace) -> dict[str, Any]:
    """One batch of an arm, after a small one that warms it."""
    host, name = ARMS[arm]
    with client(commands(host, name, options.folder, served)) as asking:
        asking.run(briefs(f"{arm} {number} warm", WARM_UP_PROGRAMS), WARM_UP_PROGRAMS)
        before_s = served.cpu_s() if served else 0.0
        batch = asking.run(briefs(f"{arm} {number}", options.programs), options.at_once)
        row = {"arm": arm, "round": number, "programs": options.programs, "at_once": options.at_once, **batch}
        row["server_cpu_s"] = served.cpu_s() - before_s if served else 0.0
        row["server_mib"] = served.resident_mib() if served else 0.0
        row["client_mib"] = asking.resident_mib()
    if name in INSTALLED:
        row["client_installed_mib"] = installed_mib(CLIENTS, INSTALLED[name])
    return row


def run_round(number: int, wanted: list[str], options: argparse.Namespace, done: set[tuple[str, int]]) -> None:
    """All wanted arms of a round that the journal does not have; hosts take turns at going first."""
    hosts = list(dict.fromkeys(ARMS[arm][0] for arm in wanted))
    for host in in_turns(hosts, number):
        arms = [arm for arm in wanted if ARMS[arm][0] == host and (arm, number) not in done]
        if not arms or time.monotonic() > options.end_s:
            continue
        with server(host, options.folder) if host in ("stock", "ours") else nullcontext() as served:
            for arm in arms if number % 2 else reversed(arms):
                if time.monotonic() > options.end_s:
                    return
                row = measure(arm, number, served, options)
                append_row(options.journal, row)
                print(f"round {number} {arm}: {row['wall_s']:.1f} s, {row['output_tokens']} tokens", flush=True)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = arguments(__doc__, rounds=3, base=True)
    parser.set_defaults(journal=Path("runs/peers/peers.jsonl"))
    parser.add_argument("--only", nargs="+", default=list(ARMS), choices=list(ARMS), help="arms to measure")
    parser.add_argument("--programs", type=int, default=24, help="programs in a batch")
    parser.add_argument("--at-once", type=int, default=16, help="programs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/peers"), help="base, adapters, logs")
    parser.add_argument("--stop-after-s", type=float, default=float("inf"), help="begin no batch later than this")
    parser.add_argument("--table", action="store_true", help="print the journal's table and measure nothing")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.end_s = time.monotonic() + options.stop_after_s
    # So that a time limit from outside stops the servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    if not options.table:
        make_parts(options.folder, options.base)
        done = {(row["arm"], row["round"]) for row in read_rows(options.journal)}
        for number in range(1, options.rounds + 1):
            run_round(number, options.only, options, done)
    print(markdown(read_rows(options.journal)))


if __name__ == "__main__":
    main()
