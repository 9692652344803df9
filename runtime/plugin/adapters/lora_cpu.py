"""Multi-LoRA for vLLM's CPU engine: correct for batches that mix base and adapters, and close to the base's speed.

vLLM keeps what it has: it loads adapters, fills its stacked tensors and maps each token to a slot. We take over where
the arithmetic happens. When an adapter enters a slot its A and B are packed for our C++ operator
(`lora_cpu_kernel.cpp`); when the mapping of a step changes the operator gets the new plan; each wrapped linear layer
then makes one call. Because that call is an opaque operator, the model can stay under torch.compile, which stock vLLM
gives up with LoRA. Slots of T-REX adapters (`trex_loader`) carry a gate, which the operator applies between A and B.

Without a compiler, or for layers the operator does not cover (fp16, fully sharded), `lora_torch` does the same sums.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config import CompilationMode
from vllm.lora.layers import BaseLayerWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms.cpu import CpuPlatform

from . import lora_torch, trex_loader, trex_step
from .lora_operators import PACKED_DTYPES, load_operators, operators_trusted, set_slot
from .trex_gate import TrexGate
from .trex_loader import gates_of

__all__ = ["GroupedPunicaCPU", "install"]

# ---- the wrapper vLLM calls -------------------------------------------------------------------------------------


class GroupedPunicaCPU(PunicaWrapperCPU):
    """vLLM's LoRA arithmetic on the CPU, with rows grouped by adapter and base rows left alone.

    Holds what one engine step needs: the plan of the C++ operators and, for the torch path, the row groups.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.step: int | None = None
        if operators_trusted():
            self.step = torch.ops.metier.lora_step_open()
            weakref.finalize(self, torch.ops.metier.lora_step_close, self.step)
        self.head_slots: set[int] = set()
        self.intuition: torch.Tensor | None = None
        self._token_groups: list[lora_torch.RowGroup] | None = []
        self._sample_groups: list[lora_torch.RowGroup] | None = []

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take over a new mapping of tokens to slots."""
        super().update_metadata(*args, **kwargs)
        self._token_groups = self._sample_groups = None
        if self.step is not None:
            torch.ops.metier.lora_step_plan(self.step, self.token_lora_indices)

    def set_intuition(self, table: torch.Tensor, rows: torch.Tensor) -> None:
        """Take over the vectors c of a step: `table` fp32 [vectors, width], `rows` int64 [tokens], -1 for none."""
        self.intuition = table[rows]
        if self.step is not None:
            torch.ops.metier.lora_step_intuition(self.step, table, rows)

    @property
    def token_groups(self) -> list[lora_torch.RowGroup]:
        """Token rows of this step by slot."""
        if self._token_groups is None:
            self._token_groups = lora_torch.rows_by_slot(self.token_lora_indices)
        return self._token_groups

    @property
    def sample_groups(self) -> list[lora_torch.RowGroup]:
        """Rows whose logits are computed, by slot; only slots with an adapter of the output head."""
        if self._sample_groups is None:
            groups = lora_torch.rows_by_slot(self.sampler_indices) if self.head_slots else []
            self._sample_groups = [group for group in groups if group[0] in self.head_slots]
        return self._sample_groups

    def set_head_slot(self, slot: int, used: bool) -> None:
        """Remember whether the adapter in `slot` changes the output head."""
        self._sample_groups = None
        if used:
            self.head_slots.add(slot)
        else:
            self.head_slots.discard(slot)

    def add_shrink(self, y: Any, x: Any, lora_a_stacked: Any, scale: float, **kwargs: Any) -> None:
        """y[i] += scale * A_i x for each slice i."""
        lora_torch.shrink(y, x.view(-1, x.shape[-1]), lora_a_stacked, self.token_groups, scale)

    def add_expand(
        self,
        y: Any,
        x: Any,
        lora_b_stacked: Any,
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[:, slice i] += B_i x[i] for each slice i."""
        flat = y.view(-1, y.shape[-1])
        if not add_inputs:
            flat[:, offset_start : offset_start + sum(output_slices)] = 0
        lora_torch.expand(flat, x, lora_b_stacked, self.token_groups, output_slices, offset_start)

    def add_lora_linear(
        self,
        y: Any,
        x: Any,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        """The torch path of a linear layer; layers the C++ operator covers do not come here."""
        flat_y, flat_x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        lora_torch.add_lora(flat_y, flat_x, lora_a_stacked, lora_b_stacked, self.token_groups, output_slices, scale)

    def add_lora_embedding(self, y: Any, x: Any, lora_b_stacked: Any, add_inputs: bool = True, **kwargs: Any) -> None:
        """The torch path of the embedding: x holds the rows of A already."""
        lora_torch.expand(y, [x], [lora_b_stacked], self.token_groups, [y.shape[-1]])

    def add_lora_logits(
        self,
        y: Any,
        x: Any,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        """The output head: free unless an adapter in this batch changes it."""
        if not self.sample_groups:
            return
        flat_y, flat_x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        width = lora_b_stacked.shape[2]
        lora_torch.add_lora(flat_y, flat_x, [lora_a_stacked], [lora_b_stacked], self.sample_groups, [width], scale)


# ---- what replaces vLLM's methods -------------------------------------------------------------------------------


def open_linear(layer: BaseLinearLayerWithLoRA, wrapper: Any) -> torch.Tensor | None:
    """Create the C++ operator's layer for a wrapped linear layer; None when the operator does not support it.

    Returns the layer's number as an int64 tensor [1], which stays an input of a compiled graph.
    """
    if not isinstance(wrapper, GroupedPunicaCPU) or wrapper.step is None:
        return None
    a_stacked, b_stacked = layer.lora_a_stacked, layer.lora_b_stacked
    d_in = a_stacked[0].shape[-1]
    sharded = layer.lora_config.fully_sharded_loras and layer.tp_size > 1
    if a_stacked[0].dtype not in PACKED_DTYPES or d_in % 2 or sharded:
        return None
    widths = [b.shape[2] for b in b_stacked]
    bf16 = a_stacked[0].dtype == torch.bfloat16
    number: int = torch.ops.metier.lora_layer_open(wrapper.step, d_in, widths, a_stacked[0].shape[0], bf16)
    weakref.finalize(layer, torch.ops.metier.lora_layer_close, number)
    return torch.tensor([number])


def pack_linear(layer: BaseLinearLayerWithLoRA, slot: int, gates: Sequence[TrexGate | None]) -> None:
    """Pack slot `slot` of a layer's stacked A and B for the operator, trimmed to the rank really used.

    A row of A that is zero, or whose column of B is, adds nothing: an adapter of rank 4 in slots of rank 16 costs
    rank 4, and one that leaves the layer alone costs nothing. The rows of a router all matter, zero or not.
    """
    a_used, b_used = [], []
    for a, b, gate in zip(layer.lora_a_stacked, layer.lora_b_stacked, gates, strict=True):
        a_slot, b_slot = a[slot, 0], b[slot, 0]
        if gate is not None:
            a_used.append(a_slot)
            b_used.append(b_slot)
            continue
        used = torch.nonzero((a_slot != 0).any(1) & (b_slot != 0).any(0)).view(-1)
        a_used.append(a_slot.index_select(0, used))
        b_used.append(b_slot.index_select(1, used))
    set_slot(int(layer.metier_layer), slot, a_used, b_used, gates)


def _patched_set_mapping(original: Callable[..., Any]) -> Callable[..., None]:
    def set_mapping(self: BaseLayerWithLoRA, punica_wrapper: Any) -> None:
        original(self, punica_wrapper)
        if isinstance(self, BaseLinearLayerWithLoRA):
            self.metier_layer = open_linear(self, punica_wrapper)
            self.metier_gates = {}  # slot → gate of each slice, for the torch path
        elif isinstance(self, VocabParallelEmbeddingWithLoRA):
            self.metier_used = torch.zeros(self.lora_a_stacked.shape[0], dtype=torch.uint8)
            step = getattr(punica_wrapper, "step", None)
            covered = step is not None and self.lora_a_stacked.dtype in PACKED_DTYPES
            self.metier_step = torch.tensor([step]) if covered else None

    return set_mapping


def _patched_activate_adapter(original: Callable[..., bool]) -> Callable[..., bool]:
    def activate_adapter(self: LoRAModelManager, lora_id: int) -> bool:
        activated = original(self, lora_id)
        if activated:
            slot = self.lora_index_to_id.index(lora_id)
            for name, module in self.modules.items():
                slices = module.n_slices if isinstance(module, BaseLinearLayerWithLoRA) else 1
                take_slot(module, slot, gates_of(self, lora_id, name, slices))
        return activated

    return activate_adapter


def take_slot(module: BaseLayerWithLoRA, slot: int, gates: Sequence[TrexGate | None]) -> None:
    """Update the operator's copy of a wrapped layer after vLLM filled slot `slot`; `gates` has one entry per slice."""
    if isinstance(module, BaseLinearLayerWithLoRA):
        module.metier_gates.pop(slot, None)
        if module.metier_layer is not None:
            pack_linear(module, slot, gates)
        elif any(gates):
            module.metier_gates[slot] = gates
    elif isinstance(module, VocabParallelEmbeddingWithLoRA):
        module.metier_used[slot] = bool(module.lora_b_stacked[slot].any())
    elif isinstance(module, LogitsProcessorWithLoRA) and isinstance(module.punica_wrapper, GroupedPunicaCPU):
        module.punica_wrapper.set_head_slot(slot, bool(module.lora_b_stacked[slot].any()))


def _patched_apply_lora(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def _apply_lora_to_output(self: BaseLinearLayerWithLoRA, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if self.metier_layer is None:
            if not self.metier_gates:
                return original(self, x, output)
            add_gated(self, x.view(-1, x.shape[-1]), output.view(-1, output.shape[-1]))
            return output
        torch.ops.metier.lora_linear(output, x, self.metier_layer)
        return output

    return _apply_lora_to_output


def add_gated(layer: BaseLinearLayerWithLoRA, x: torch.Tensor, y: torch.Tensor) -> None:
    """The torch path of a layer with T-REX adapters in some slots: x [tokens, d_in], y [tokens, d_out] in place."""
    wrapper = layer.punica_wrapper
    lora_torch.add_lora(
        y,
        x,
        layer.lora_a_stacked,
        layer.lora_b_stacked,
        wrapper.token_groups,
        layer.output_slices,
        gates=layer.metier_gates,
        intuition=wrapper.intuition,
    )


def _patched_embedding_forward(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward(self: VocabParallelEmbeddingWithLoRA, x: torch.Tensor) -> torch.Tensor:
        if self.metier_step is None:
            return original(self, x)
        output: torch.Tensor = self.base_layer.forward(x)
        torch.ops.metier.lora_embedding(
            output, x, self.lora_a_stacked, self.lora_b_stacked, self.metier_used, self.metier_step
        )
        return output

    return forward


def _patched_check_config(original: Callable[..., None]) -> Callable[..., None]:
    def check_and_update_config(cls: type[CpuPlatform], vllm_config: Any) -> None:
        wanted = vllm_config.compilation_config.mode
        original(vllm_config)
        lora = vllm_config.lora_config
        # Stock vLLM drops compilation with LoRA, whose torch code cannot be traced; one opaque operator can.
        if lora is None or wanted != CompilationMode.VLLM_COMPILE or vllm_config.model_config is None:
            return
        single = vllm_config.parallel_config.world_size == 1
        if single and vllm_config.model_config.dtype in PACKED_DTYPES and not vllm_config.model_config.is_moe:
            vllm_config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE

    return check_and_update_config


def install() -> str:
    """Put our LoRA arithmetic into vLLM's CPU platform, with the loaders of what it computes beside LoRA.

    Returns "active" or what is missing. The caller has checked that the methods replaced here have the signatures
    that this file was written for.
    """
    trex_loader.install()
    trex_step.install()
    reason = load_operators()
    wrapper = f"{GroupedPunicaCPU.__module__}.{GroupedPunicaCPU.__qualname__}"
    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: wrapper)
    LoRAModelManager.activate_adapter = _patched_activate_adapter(LoRAModelManager.activate_adapter)
    BaseLayerWithLoRA.set_mapping = _patched_set_mapping(BaseLayerWithLoRA.set_mapping)
    BaseLinearLayerWithLoRA._apply_lora_to_output = _patched_apply_lora(BaseLinearLayerWithLoRA._apply_lora_to_output)
    VocabParallelEmbeddingWithLoRA.forward = _patched_embedding_forward(VocabParallelEmbeddingWithLoRA.forward)
    if reason:
        return f"active, without the C++ operators ({reason})"
    CpuPlatform.check_and_update_config = classmethod(_patched_check_config(CpuPlatform.check_and_update_config))
    return "active"
