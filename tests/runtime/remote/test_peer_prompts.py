"""The peers' benchmark asks what our own programs ask: the same prompts, to the letter."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from metier.agents import Ask, ScriptedBackend
from metier.runtime import open_session

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

pytestmark = pytest.mark.anyio


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS / "peers"), str(BENCHMARKS), *sys.path])
    for name in ("workflow", "programs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return import_module("workflow"), import_module("programs")


async def test_peers_ask_our_prompts(modules: tuple[Any, Any]) -> None:
    peer, programs = modules
    said = {"planner": "a plan", "solver": "a draft", "critic": "a critique"}

    def script(ask: Ask) -> str:
        return said[ask.role]

    backend = ScriptedBackend(dict.fromkeys(said, script))
    [text] = peer.briefs("one", 1)
    async with open_session(backend=backend, store=":memory:") as session:
        await session.run(programs.graph, programs.Brief(text=text))
    assert len(backend.asks) == peer.ASKS_PER_PROGRAM

    inputs: dict[str, str | None] = {"brief": text, "plan": "a plan"}
    expected = [peer.prompt("planner", {"brief": text})]
    for critique in (None, "a critique"):
        expected.append(peer.prompt("solver", {**inputs, "critique": critique}))
        expected.append(peer.prompt("critic", {**inputs, "draft": "a draft"}))
    assert [ask.messages[-1].content for ask in backend.asks] == expected
    assert {ask.messages[0].content for ask in backend.asks} == {peer.SYSTEM}
    assert {ask.max_tokens for ask in backend.asks} == {peer.TOKENS_PER_ASK}
