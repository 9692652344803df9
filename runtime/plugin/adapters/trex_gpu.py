"""T-REX on the GPU: vLLM's own Triton products with the token gate between them. NOT RUN: no GPU was at hand.

Only `gated_lanes_of_slots` is tested, on the CPU, against the gate's oracle. What is meant to hold: every tensor below
is allocated once and changed in place, and no step depends on the values of the data, so CUDA graphs stay on; rows of
LoRA and of the base pass the gate unchanged. Adapters load, and vectors arrive before each step, the way they do on the
CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm import envs
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
from vllm.platforms import current_platform

from . import trex_loader, trex_step
from .trex_gate import gated_lanes_of_slots, stacked_gates
from .trex_loader import gates_of

__all__ = ["GatedPunicaGPU", "install"]


class GatedPunicaGPU(PunicaWrapperGPU):
    """vLLM's LoRA arithmetic on the GPU, with a gate for slots of T-REX adapters."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        rank = self.lora_config.max_lora_rank
        self.intuition = torch.zeros(max_num_batched_tokens, rank, device=device)

    def set_intuition(self, table: torch.Tensor, rows: torch.Tensor) -> None:
        """Take over the vectors c of a step: `table` fp32 [vectors, width], `rows` int64 [tokens], -1 for none."""
        self.intuition[: len(rows), : table.shape[1]].copy_(table[rows], non_blocking=True)

    def add_gated(self, layer: BaseLinearLayerWithLoRA, x: torch.Tensor, y: torch.Tensor) -> None:
        """y [tokens, d_out] += B z(A x, c) in place, slot by slot as each token's adapter says."""
        tokens, rank = x.shape[0], layer.lora_b_stacked[0].shape[-1]
        h = torch.empty(len(layer.output_slices), tokens, rank, dtype=torch.float32, device=x.device)
        self.add_shrink(h, x, layer.lora_a_stacked, 1.0)
        slots, c = self._token_lora_indices[:tokens], self.intuition[:tokens]
        for index in range(len(layer.output_slices)):
            lane, gain = layer.metier_lane[index], layer.metier_gain[index]
            h[index] = gated_lanes_of_slots(h[index], slots, c, lane, gain)
        self.add_expand(y, h, layer.lora_b_stacked, layer.output_slices)


def install() -> str:
    """Put the gate into vLLM's CUDA platform; returns "active (not run)", or why it is off.

    The V2 model runner has no hook before its steps, so c could not reach the gate there; with two streams vLLM adds
    LoRA on a way of its own, past the gate.
    """
    if envs.VLLM_USE_V2_MODEL_RUNNER is not False:
        return "off (VLLM_USE_V2_MODEL_RUNNER is not 0)"
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        return "off (VLLM_LORA_ENABLE_DUAL_STREAM is set)"
    from vllm.lora.layers import BaseLayerWithLoRA

    name = f"{GatedPunicaGPU.__module__}.{GatedPunicaGPU.__qualname__}"
    type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)
    BaseLayerWithLoRA.set_mapping = _patched_set_mapping(BaseLayerWithLoRA.set_mapping)
    LoRAModelManager.activate_adapter = _patched_activate_adapter(LoRAModelManager.activate_adapter)
    BaseLinearLayerWithLoRA._apply_lora_to_output = _apply_lora_to_output
    trex_loader.install()
    trex_step.install()
    return "active (not run by us)"


def _patched_set_mapping(original: Callable[..., None]) -> Callable[..., None]:
    def set_mapping(self: Any, punica_wrapper: Any) -> None:
        original(self, punica_wrapper)
        if isinstance(self, BaseLinearLayerWithLoRA):
            b = self.lora_b_stacked[0]
            lane, gain = stacked_gates([None] * b.shape[0], b.shape[-1])
            self.metier_lane = torch.stack([lane] * self.n_slices).to(b.device)
            self.metier_gain = torch.stack([gain] * self.n_slices).to(b.device)

    return set_mapping


def _patched_activate_adapter(original: Callable[..., bool]) -> Callable[..., bool]:
    def activate_adapter(self: Any, lora_id: int) -> bool:
        activated = original(self, lora_id)
        if activated:
            slot = self.lora_index_to_id.index(lora_id)
            for name, layer in self.modules.items():
                if isinstance(layer, BaseLinearLayerWithLoRA):
                    for index, gate in enumerate(gates_of(self, lora_id, name, layer.n_slices)):
                        lane, gain = stacked_gates([gate], layer.metier_lane.shape[-1])
                        layer.metier_lane[index, slot].copy_(lane[0])
                        layer.metier_gain[index, slot].copy_(gain[0])
        return activated

    return activate_adapter


def _apply_lora_to_output(self: BaseLinearLayerWithLoRA, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    self.punica_wrapper.add_gated(self, x.view(-1, x.shape[-1]), output.view(-1, output.shape[-1]))
    return output
