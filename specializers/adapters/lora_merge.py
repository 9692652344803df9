"""A LoRA added to the weights it was trained on, one layer at a time.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3: W + scaling · B A.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...agents.errors import RecipeError
from ..checkpoints.checkpoint_files import CheckpointReader
from ..shelf.adapter_kinds import ADAPTER_KINDS
from .adapter_check import SLOT_RANKS, check_adapter
from .adapter_files import PEFT_PREFIX, read_config

__all__ = ["LoraDeltas"]


class LoraDeltas:
    """What a LoRA adds to each layer of the checkpoint in `model`.

    Raises: AdapterError when the adapter does not fit that checkpoint, RecipeError when it is no LoRA whose layers
    all have one scaling.
    """

    def __init__(self, adapter: Path, model: Path) -> None:
        facts = check_adapter(adapter, model, slot_rank=SLOT_RANKS[-1])
        mergeable = ADAPTER_KINDS[facts.kind].mergeable
        if not mergeable or read_config(adapter).get("alpha_pattern"):
            problem = "scales its layers differently" if mergeable else f"is of kind {facts.kind}"
            raise RecipeError(
                f"the adapter to merge {problem}",
                expected="a LoRA with one scaling: no fixed weights do what another adapter does",
                remedy="Set adapter: keep, so that it stays an adapter on the new weights, or adapter: drop.",
            )
        self._scaling = facts.scaling
        self._halves = CheckpointReader(adapter)
        self.layers = frozenset(facts.modules)

    def add(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The tensor `name` of the checkpoint, given in float32, with what the adapter adds to it."""
        layer = name.removesuffix(".weight")
        if layer not in self.layers or name == layer:
            return weight
        a = self._halves.read(f"{PEFT_PREFIX}{layer}.lora_A.weight").float()
        b = self._halves.read(f"{PEFT_PREFIX}{layer}.lora_B.weight").float()
        return weight + self._scaling * (b @ a)
