"""A replica's account against the asks that are there, whatever order they begin, end and fail in."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest

from metier.router.placement.placement import PlacedAsk
from metier.router.placement.replica_account import ReplicaAccount


def ask(adapter: str | None = "a", conversation: str = "run", prompt_tokens: int = 100) -> PlacedAsk:
    return PlacedAsk(adapter, conversation, prompt_tokens, answer_tokens=10)


def test_what_is_outstanding_is_what_the_asks_there_still_need() -> None:
    rng = random.Random(3)
    account = ReplicaAccount("r", adapter_slots=2)
    under_way: list[tuple[ExitStack, PlacedAsk, int]] = []
    for number in range(300):
        if under_way and rng.random() < 0.5:
            stack, *_ = under_way.pop(rng.randrange(len(under_way)))
            stack.close()
        else:
            asked = ask(rng.choice(["a", "b", "c", "d", None]), f"run{rng.randrange(5)}", rng.randrange(200))
            cached = account.state.conversations.get(asked.conversation, 0)
            stack = ExitStack()
            stack.enter_context(account.answering(asked))
            under_way.append((stack, asked, max(asked.prompt_tokens - cached, 0) + asked.answer_tokens))
        state = account.state
        assert state.outstanding_tokens == sum(tokens for *_, tokens in under_way), number
        in_use = {asked.adapter for _, asked, _ in under_way} - {None}
        assert in_use <= state.adapters.keys()
        assert len(state.adapters) <= max(len(in_use), state.adapter_slots)
        for adapter, asks in state.adapters.items():
            assert asks == sum(asked.adapter == adapter for _, asked, _ in under_way)
    for stack, *_ in under_way:
        stack.close()
    assert account.state.outstanding_tokens == 0 and not any(account.state.adapters.values())


def test_the_longest_idle_adapter_leaves_first() -> None:
    account = ReplicaAccount("r", adapter_slots=2)
    for adapter in "aba":
        with account.answering(ask(adapter)):
            pass
    with account.answering(ask("c")):
        assert account.state.adapters == {"a": 0, "c": 1}


def test_a_prompt_is_cached_where_it_was_answered_and_the_oldest_is_forgotten() -> None:
    account = ReplicaAccount("r", adapter_slots=1, conversations_kept=2)
    for conversation in ("one", "two", "one", "three"):
        with account.answering(ask(conversation=conversation)):
            pass
    assert account.state.conversations == {"one": 100, "three": 100}
    with pytest.raises(OSError), account.answering(ask(conversation="one")):
        raise OSError
    assert account.state.conversations == {"three": 100}


def test_a_replica_that_began_anew_has_only_what_is_on_its_way() -> None:
    account = ReplicaAccount("r", adapter_slots=2)
    with account.answering(ask("a")):
        pass
    with account.answering(ask("b", "other")):
        account.forget()
        assert account.state.adapters == {"b": 1} and not account.state.conversations
