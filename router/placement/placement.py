"""Which replica gets an ask: the one with the least predicted cost, delays of other asks included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pydantic import Field

from ...agents.errors import EngineDeadError
from ...agents.frozen_model import FrozenModel

__all__ = ["PlacedAsk", "Placement", "PlacementCosts", "ReplicaState", "place"]


@dataclass(frozen=True, slots=True)
class PlacedAsk:
    """What placement needs to know about an ask.

    `adapter` is None for the base. `conversation` names the cached prefix of the prompt: the run, and the adapter,
    since engines key their caches by it. `answer_tokens` is how many are expected; `remaining_s` is the
    critical path of the run from this ask on.

    >>> PlacedAsk("solver-lora", conversation="r1", prompt_tokens=200, answer_tokens=50).remaining_s
    0.0
    """

    adapter: str | None
    conversation: str
    prompt_tokens: int
    answer_tokens: int
    remaining_s: float = 0.0


@dataclass(slots=True)
class ReplicaState:
    """What is known about one replica; its driver keeps this up to date, `place` only reads it.

    `adapters` maps those that are resident or being loaded to their asks in flight, waiting ones included; an
    adapter with none may be evicted. `outstanding_tokens` are those that are still to be computed there: prompt
    tokens not cached, and answers. `conversations` has how many tokens of each are cached.

    >>> near = ReplicaState("near", adapter_slots=2, adapters={"solver-lora": 1}, outstanding_tokens=100)
    >>> far = ReplicaState("far", adapter_slots=2)
    >>> ask = PlacedAsk("solver-lora", conversation="r1", prompt_tokens=200, answer_tokens=50)
    >>> place(ask, [near, far], PlacementCosts()).replica
    'near'
    """

    name: str
    adapter_slots: int
    adapters: Mapping[str, int] = field(default_factory=dict)
    outstanding_tokens: int = 0
    conversations: Mapping[str, int] = field(default_factory=dict)
    healthy: bool = True


class PlacementCosts(FrozenModel):
    """What things take on a replica, in seconds. The defaults are those of a 135M model on one CPU core.

    >>> PlacementCosts(adapter_load_s=0.2).patience_s
    10.0
    """

    prompt_token_s: float = Field(default=0.001, ge=0)
    """Seconds of one prompt token that the replica's cache does not have."""

    answer_token_s: float = Field(default=0.02, ge=0)
    """Seconds of one answer token."""

    outstanding_token_s: float = Field(default=0.004, ge=0)
    """Seconds by which one token under way delays a new ask. Less than a token takes alone, since asks are computed
    together."""

    adapter_load_s: float = Field(default=1.0, ge=0)
    """Seconds of an adapter's load, times the asks that it holds up: a load takes 0.03 to 0.1 s here, and all asks
    stand still meanwhile."""

    slot_hold_s: float = Field(default=0.5, ge=0)
    """Seconds that an adapter in use keeps its slot, so that asks for further adapters wait."""

    patience_s: float = Field(default=10.0, gt=0)
    """Evicting an adapter counts as its load, and half as much for an ask whose run still has this many seconds before
    it."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The replica an ask goes to, the reason, and the predicted seconds until its answer."""

    replica: str
    reason: str
    predicted_s: float


def place(ask: PlacedAsk, replicas: Iterable[ReplicaState], costs: PlacementCosts) -> Placement:
    """Choose the healthy replica with the earliest predicted finish, plus what the ask costs others there.

    Earliest finish time (HEFT, Topcuoglu et al. 2002), from the queue there, the adapter's load where it is not
    resident, the slot it may have to wait for, and the prompt that its cache does not have. A hot adapter therefore
    spreads as soon as its queue costs more than a load. Of equals the first by name is chosen. O(replicas × slots).

    Raises: EngineDeadError when none is healthy.
    """
    best: ReplicaState | None = None
    least = least_own = (0.0, "")
    evicting = costs.adapter_load_s * costs.patience_s / (costs.patience_s + ask.remaining_s)
    for replica in replicas:
        if not replica.healthy:
            continue
        turns, loads, evicts = _slot(ask.adapter, replica)
        computed = ask.prompt_tokens - min(replica.conversations.get(ask.conversation, 0), ask.prompt_tokens)
        own_s = (
            replica.outstanding_tokens * costs.outstanding_token_s
            + turns * costs.slot_hold_s
            + loads * costs.adapter_load_s
            + computed * costs.prompt_token_s
        )
        score = (own_s + evicts * evicting, replica.name)
        if best is None or score < least:
            best, least, least_own = replica, score, (own_s, replica.name)
    if best is None:
        raise EngineDeadError(
            "no replica is healthy", expected="at least one", remedy="Start one, then resume what was under way."
        )
    predicted_s = least_own[0] + ask.answer_tokens * costs.answer_token_s
    return Placement(best.name, _reason(ask, best, predicted_s), predicted_s)


def _slot(adapter: str | None, replica: ReplicaState) -> tuple[float, bool, bool]:
    """Return (turns of a slot to wait, whether to load, whether to evict) for the ask's adapter on this replica."""
    if adapter is None or adapter in replica.adapters:
        return 0.0, False, False
    if len(replica.adapters) < replica.adapter_slots:
        return 0.0, True, False
    in_use = sum(1 for asks in replica.adapters.values() if asks)
    return max(0, in_use - replica.adapter_slots + 1) / replica.adapter_slots, True, True


def _reason(ask: PlacedAsk, replica: ReplicaState, predicted_s: float) -> str:
    turns, loads, evicts = _slot(ask.adapter, replica)
    said = []
    if ask.adapter is not None:
        said.append("adapter resident" if not loads else "adapter evicts another" if evicts else "adapter loads")
    if turns:
        said.append("no slot free")
    cached = min(replica.conversations.get(ask.conversation, 0), ask.prompt_tokens)
    if cached:
        said.append(f"{cached} of {ask.prompt_tokens} tokens cached")
    said.append(f"{replica.outstanding_tokens} tokens before it")
    return f"{replica.name}: {', '.join(said)}, {predicted_s:.2f} s"
