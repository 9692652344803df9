"""What a LoRA adds to each weight of the checkpoint it is for: the one place that computes it from a folder.

Merging, folding and going on with training all start from here, so that they agree on ranks and scalings by layer.
Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3: W + scaling · B A.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...agents.errors import RecipeError
from ..checkpoints.checkpoint_files import CheckpointReader
from ..checkpoints.output_head import HEAD, is_embedding, stores_own_head
from ..shelf.adapter_kinds import ADAPTER_KINDS
from .adapter_check import SLOT_RANKS, check_adapter
from .adapter_files import half_names, merge_remedy

__all__ = ["LoraDeltas"]


class LoraDeltas:
    """What the LoRA in the folder `adapter` adds to each layer of the checkpoint in `model`.

    Raises: AdapterError when the adapter does not fit that checkpoint, RecipeError when it is no LoRA.
    """

    def __init__(self, adapter: Path, model: Path) -> None:
        facts = check_adapter(adapter, model, slot_rank=SLOT_RANKS[-1])
        if not ADAPTER_KINDS[facts.kind].mergeable:
            raise RecipeError(
                f"the adapter to merge is of kind {facts.kind}",
                expected="a LoRA: no fixed weights do what another adapter does",
                remedy="Set adapter: keep, so that it stays an adapter on the new weights, or adapter: drop.",
            )
        self.rank = facts.rank
        self.layers = frozenset(facts.modules)
        self._scalings = dict(zip(facts.modules, facts.scalings, strict=True))
        self._halves = CheckpointReader(adapter)
        _check_apart(adapter, model, self.layers)

    def factors(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """a [rank, d_in] and b [d_out, rank] of a layer, float32: what is added to its weight is b a, all scaled."""
        names = half_names(layer, self._halves.tensors)
        a, b = (self._halves.read(name).float() for name in names)
        if names[0].endswith("embedding_A"):  # an embedding's weight is [vocabulary, hidden], its A [rank, vocabulary]
            a, b = b.T, a.T
        return a, self._scalings[layer] * b

    def add(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The tensor `name` of the checkpoint, given in float32, with what the adapter adds to it."""
        layer = name.removesuffix(".weight")
        if layer not in self.layers or name == layer:
            return weight
        a, b = self.factors(layer)
        return weight + (b @ a).to(weight.device)


def _check_apart(adapter: Path, model: Path, layers: frozenset[str]) -> None:
    """Check that each layer has a weight of its own: what is added to a tied embedding would also change the head."""
    shared = sorted(layer for layer in layers if is_embedding(f"{layer}.weight") or f"{layer}.weight" == HEAD)
    if shared and not stores_own_head(model):
        raise RecipeError(
            f"the adapter to merge changes {shared[0]}, which shares its weight with another layer",
            expected="a LoRA of layers that have their own weights",
            remedy=merge_remedy(adapter).removesuffix(".") + ", to go on from.",
        )
