"""The logits processor follows requests through vLLM's batch, and touches only the rows of those that think."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from metier.agents.errors import PluginError
from metier.agents.thinking import ThinkingProfile
from metier.runtime.plugin.thinking.budget_forcing import ThinkingRules
from metier.runtime.plugin.wire import THINKING_KEY
from tests.runtime.plugin.thinking.test_end_tag import CLOSE, PIECES, TOKENIZER

pytestmark = pytest.mark.engine

A, STOP, WAIT = (PIECES.index(p) for p in ("a", "stop", "Wait"))
CLOSE_IDS = tuple(PIECES.index(p) for p in ("</", "think", ">"))


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    import torch

    from metier.runtime.plugin.thinking import thinking_processor

    monkeypatch.setattr(thinking_processor, "cached_tokenizer_from_config", lambda config: TOKENIZER)
    return thinking_processor.ThinkingProcessor(config(False), torch.device("cpu"), False)


def config(async_scheduling: bool) -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=async_scheduling), model_config=SimpleNamespace()
    )


def request(most: int = 9, waits: int = 0) -> Any:
    from vllm import SamplingParams

    rules = ThinkingRules(ThinkingProfile(max_tokens=most, waits=waits), CLOSE, CLOSE_IDS, (WAIT,))
    return SamplingParams(stop_token_ids=[STOP], extra_args={THINKING_KEY: rules.to_plain()})


def update(**changes: Any) -> Any:
    from vllm.v1.sample.logits_processor import BatchUpdate

    return BatchUpdate(**({"batch_size": 4, "removed": [], "added": [], "moved": []} | changes))


def best(processor: Any, *likes: int) -> list[int]:
    """Feeds a batch in which each row would like one token; what they get."""
    import torch

    logits = torch.nn.functional.one_hot(torch.tensor(likes), len(PIECES)).float()
    got: list[int] = processor.apply(logits).argmax(dim=-1).tolist()
    return got


def test_a_request_that_comes_back_keeps_its_used_waits(processor: Any) -> None:
    params, written = request(waits=1), list[int]()
    processor.update_state(update(added=[(0, params, [A], written)]))
    assert best(processor, STOP) == [WAIT]
    assert best(processor, STOP) == [WAIT]  # the first sample was dropped
    written += [WAIT, A]
    assert best(processor, A) == [A]
    processor.update_state(update(removed=[0]))
    assert best(processor, STOP) == [STOP]
    processor.update_state(update(added=[(2, params, [A], written)]))
    assert best(processor, A, A, STOP) == [A, A, CLOSE_IDS[0]]


def test_rows_are_followed_when_they_move_and_swap(processor: Any) -> None:
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import MoveDirectionality

    first, second, plain = [A] * 2, list[int](), SamplingParams()
    processor.update_state(
        update(added=[(0, request(2), [A], first), (1, plain, [A], []), (3, request(5), [A], second)])
    )
    assert best(processor, A, STOP, STOP, STOP) == [CLOSE_IDS[0], STOP, STOP, CLOSE_IDS[0]]
    swap, move = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL
    processor.update_state(update(moved=[(0, 1, swap), (3, 0, move)]))
    assert best(processor, A, A, STOP, STOP) == [A, CLOSE_IDS[0], STOP, STOP]
    processor.update_state(update(added=[(1, plain, [A], [])]))
    assert best(processor, A, STOP, STOP, STOP) == [A, STOP, STOP, STOP]


def test_nothing_is_forced_after_the_end_tag(processor: Any) -> None:
    written = [A, *CLOSE_IDS]
    processor.update_state(update(added=[(0, request(2), [A], written)]))
    for token in (STOP, A, CLOSE_IDS[0], WAIT):
        assert best(processor, token) == [token]
        written.append(token)


def test_what_it_cannot_follow_is_refused() -> None:
    import torch
    from vllm import SamplingParams

    from metier.runtime.plugin.thinking.thinking_processor import ThinkingProcessor

    with pytest.raises(PluginError, match="async_scheduling is on"):
        ThinkingProcessor(config(True), torch.device("cpu"), False)
    ThinkingProcessor.validate_params(SamplingParams())
    ThinkingProcessor.validate_params(request())
    plain = request().extra_args[THINKING_KEY]
    for wrong in ({}, {**plain, "close": ""}, {**plain, "profile": {"max_tokens": 2, "min_tokens": 3}}, 7):
        with pytest.raises(ValueError, match=THINKING_KEY):
            ThinkingProcessor.validate_params(SamplingParams(extra_args={THINKING_KEY: wrong}))
