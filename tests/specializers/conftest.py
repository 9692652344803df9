"""A tiny base model, and rows to train on, for every test of this room."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.agents import Message, TrafficRow
from tests.tiny_model import write_tiny_llama


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def rows() -> list[TrafficRow]:
    return [
        TrafficRow(
            role="solver",
            messages=(
                Message(role="system", content="Do your own step."),
                Message(role="user", content=f"{a} plus {b}" + " please" * (b % 3)),
            ),
            reply=f'{{"value":{a + b}}}',
            score=1.0,
        )
        for a in range(6)
        for b in range(6)
    ]
