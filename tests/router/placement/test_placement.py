"""Placement against an oracle that writes the prediction out, and what follows from it."""

from __future__ import annotations

import random

import pytest

from metier.agents.errors import EngineDeadError
from metier.router.placement.placement import PlacedAsk, PlacementCosts, ReplicaState, place

COSTS = PlacementCosts(
    prompt_token_s=0.001,
    answer_token_s=0.01,
    outstanding_token_s=0.002,
    adapter_load_s=0.2,
    slot_hold_s=1.0,
    patience_s=10.0,
)


def ask(adapter: str | None = "a", prompt_tokens: int = 100, remaining_s: float = 0.0) -> PlacedAsk:
    return PlacedAsk(adapter, f"run/{adapter}", prompt_tokens, answer_tokens=10, remaining_s=remaining_s)


def own_seconds(asked: PlacedAsk, replica: ReplicaState, costs: PlacementCosts) -> float:
    """Until the ask is answered there, written out step by step."""
    seconds = 0.0
    for _ in range(replica.outstanding_tokens):
        seconds += costs.outstanding_token_s
    known = asked.adapter is None or asked.adapter in replica.adapters
    if not known:
        in_use = [name for name, asks in replica.adapters.items() if asks > 0]
        while len(in_use) >= replica.adapter_slots and len(replica.adapters) >= replica.adapter_slots:
            in_use.pop()
            seconds += costs.slot_hold_s / replica.adapter_slots
        seconds += costs.adapter_load_s
    cached = replica.conversations.get(asked.conversation, 0)
    for position in range(asked.prompt_tokens):
        seconds += costs.prompt_token_s if position >= cached else 0.0
    for _ in range(asked.answer_tokens):
        seconds += costs.answer_token_s
    return seconds


def others_seconds(asked: PlacedAsk, replica: ReplicaState, costs: PlacementCosts) -> float:
    """What the others lose: the adapter that goes has to come back."""
    if asked.adapter is None or asked.adapter in replica.adapters or len(replica.adapters) < replica.adapter_slots:
        return 0.0
    return costs.adapter_load_s / (1 + asked.remaining_s / costs.patience_s)


def random_replica(rng: random.Random, number: int) -> ReplicaState:
    slots = rng.randint(1, 3)
    resident = rng.sample("abcdef", rng.randint(0, slots + 2))
    conversations = {f"run/{name}": rng.randint(1, 200) for name in rng.sample("abcdef", 2)}
    return ReplicaState(
        f"r{number}",
        slots,
        {name: rng.randint(0, 2) for name in resident},
        rng.randrange(0, 500),
        conversations,
        rng.random() < 0.8,
    )


def test_it_is_the_best_of_all_by_the_prediction_written_out() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        replicas = [random_replica(rng, number) for number in range(rng.randint(1, 6))]
        healthy = [replica for replica in replicas if replica.healthy]
        asked = ask(rng.choice(["a", "b", "z", None]), rng.randint(0, 300), rng.choice([0.0, 5.0, 100.0]))
        if not healthy:
            continue
        chosen = place(asked, replicas, COSTS)
        scores = {r.name: own_seconds(asked, r, COSTS) + others_seconds(asked, r, COSTS) for r in healthy}
        assert scores[chosen.replica] == pytest.approx(min(scores.values()))
        (replica,) = (r for r in healthy if r.name == chosen.replica)
        assert chosen.predicted_s == pytest.approx(own_seconds(asked, replica, COSTS))
        assert chosen.reason.startswith(f"{chosen.replica}: ")
        shuffled = rng.sample(replicas, len(replicas))
        assert place(asked, shuffled, COSTS) == chosen


def test_the_replica_that_has_the_adapter_wins_until_its_queue_costs_more_than_a_load() -> None:
    elsewhere = ReplicaState("a", 2)
    loads_at = COSTS.adapter_load_s / COSTS.outstanding_token_s
    for tokens in (0, loads_at - 1, loads_at + 1):
        resident = ReplicaState("b", 2, {"a": 3}, int(tokens))
        assert place(ask(), [elsewhere, resident], COSTS).replica == ("b" if tokens < loads_at else "a")


def test_a_conversation_stays_where_its_prompt_is_cached() -> None:
    replicas = [ReplicaState("a", 1), ReplicaState("b", 1, conversations={"run/None": 90})]
    chosen = place(ask(None), replicas, COSTS)
    assert chosen.replica == "b" and "90 of 100 tokens cached" in chosen.reason


def test_an_empty_slot_is_taken_before_one_in_which_an_adapter_is() -> None:
    full, free = ReplicaState("a", 1, {"x": 0}), ReplicaState("b", 1)
    chosen = place(ask(), [full, free], COSTS)
    assert chosen.replica == "b" and "adapter loads" in chosen.reason
    in_use = ReplicaState("b", 1, {"y": 4})
    assert "evicts" in place(ask(), [full, in_use], COSTS).reason
    assert "no slot free" in place(ask(), [in_use], COSTS).reason


def test_a_run_with_much_before_it_displaces_sooner() -> None:
    # Where it displaces it is answered 0.1 s sooner, which costs another 0.2 s: worth it for a long run only.
    displaces = ReplicaState("a", 1, {"x": 0})
    waits = ReplicaState("b", 1, outstanding_tokens=50)
    assert place(ask(remaining_s=0.0), [displaces, waits], COSTS).replica == "b"
    assert place(ask(remaining_s=90.0), [displaces, waits], COSTS).replica == "a"


def test_equals_go_by_name_and_who_is_not_healthy_gets_nothing() -> None:
    replicas = [ReplicaState("b", 1), ReplicaState("a", 1)]
    assert place(ask(), replicas, COSTS).replica == "a"
    replicas[1].healthy = False
    assert place(ask(), replicas, COSTS).replica == "b"
    replicas[0].healthy = False
    with pytest.raises(EngineDeadError, match="no replica is healthy"):
        place(ask(), replicas, COSTS)
