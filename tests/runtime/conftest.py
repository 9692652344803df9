"""Fixtures for engine tests: one shared in-process engine on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from metier.agents.messages import Ask, Message
from metier.runtime.engines.inprocess.inprocess_engine import InProcessEngine
from metier.runtime.settings.engine import EngineSettings
from metier.specializers.shelf.base_model import base_fingerprint
from metier.specializers.shelf.variant import AskSpec, EngineSpec, Variant
from tests.tiny_model import write_random_lora, write_tiny_llama

# One thread: on a busy machine OpenMP barriers between two threads cost more than the arithmetic.
# float32: answers given alone are compared with answers given in a batch, and in bfloat16 another order of sums is
# another token now and then, on some processors and not on others.
TINY = EngineSettings(
    eager=True,
    dtype="float32",
    kv_cache_mib=64,
    max_model_tokens=512,
    threads=1,
    adapter_slots=2,
    slot_rank=8,
    max_running=8,
)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random Llama with a tokenizer and a chat template."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_variants(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Variant, Path]]:
    """Five adapter variants of the tiny base, by name."""
    root, base = tmp_path_factory.mktemp("variants"), base_fingerprint(tiny_base)
    variants = {}
    for number in range(5):
        name, rank = f"lora{number}", 4 if number % 2 else 8
        write_random_lora(root / name / "adapter", tiny_base, rank=rank, seed=number)
        record = Variant(
            id=f"{number:016x}",
            name=name,
            base=base,
            prompt_layout=1,
            engine=EngineSpec(base=base),
            ask=AskSpec(adapter="lora", rank=rank),
        )
        variants[name] = (record, root / name)
    return variants


@pytest.fixture(scope="session")
def tiny_engine(tiny_base: Path) -> Iterator[InProcessEngine]:
    """The one engine that engine tests share; used from whatever loop a test runs in."""
    engine = anyio.run(partial(InProcessEngine.start, tiny_base, TINY, adapters=True, name="tiny"))
    yield engine
    anyio.run(engine.close)


@pytest.fixture
def make_ask() -> Callable[..., Ask]:
    """Build an ask: `make_ask("Say it.", role="solver", max_tokens=8)`."""

    def make(text: str = "Add 12 and 7.", *, role: str = "solver", step: str = "solve", **fields: Any) -> Ask:
        fields.setdefault("max_tokens", 12)
        return Ask(run_id="run", step_path=step, role=role, messages=(Message(role="user", content=text),), **fields)

    return make
