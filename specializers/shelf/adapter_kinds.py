"""The kinds of adapters a variant may have, and what each means for training, merging and serving.

A new kind is a row here; what checks its folder stands in `specializers.adapters`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ADAPTER_KINDS", "AdapterKind", "AdapterName", "kind_of_peft_type"]

AdapterName = Literal["lora", "trex"]
"""Name of an adapter kind, as in a variant's record."""


@dataclass(frozen=True)
class AdapterKind:
    """One kind of adapter."""

    name: AdapterName

    title: str
    """How people call an adapter of this kind."""

    peft_type: str
    """The `peft_type` in its `adapter_config.json`."""

    check: str
    """Module and function, below `specializers.adapters`, that check a folder of this kind: see `check_adapter`."""

    mergeable: bool
    """Whether fixed weights can do what it does, so that it can be folded into a checkpoint."""

    needs_intuition: bool
    """Whether every ask must bring a semantic vector of its run, made with the adapter's own semantic map."""

    served_elsewhere: bool
    """Whether vLLM's own server can load it, without our plugin."""

    slot_rows: str
    """How many rows of an engine's slot it takes, as a formula in its settings."""

    fewer_rows: str
    """What to change in its recipe so that it takes fewer."""


ADAPTER_KINDS: dict[AdapterName, AdapterKind] = {
    kind.name: kind
    for kind in (
        AdapterKind(
            name="lora",
            title="LoRA adapter",
            peft_type="LORA",
            check="lora_check:check_lora",
            mergeable=True,
            needs_intuition=False,
            served_elsewhere=True,
            slot_rows="rank",
            fewer_rows="a lower rank",
        ),
        AdapterKind(
            name="trex",
            title="T-REX adapter",
            peft_type="TREX",
            check="trex_check:check_trex",
            mergeable=False,
            needs_intuition=True,
            served_elsewhere=False,
            slot_rows="r1 + r1·r2",
            fewer_rows="smaller r1 and r2",
        ),
    )
}


def kind_of_peft_type(peft_type: object) -> AdapterKind | None:
    """The kind whose configuration says `peft_type`, None for one that no engine of ours serves as it is."""
    return next((kind for kind in ADAPTER_KINDS.values() if kind.peft_type == peft_type), None)
