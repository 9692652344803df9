"""T-REX adapters in vLLM's LoRA slots: read from disk, checked against the model, their gates kept beside them.

vLLM's loader knows lora_A and lora_B only. Ours lays the router's rows below A's, so that slots, eviction and the
mapping of tokens to slots need no change, and keeps the gates as an attribute of the loaded model, so that they are
freed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import get_adapter_absolute_path, parse_fine_tuned_lora_name
from vllm.lora.worker_manager import WorkerLoRAManager

from ....specializers.adapters.semantic_map import CENTER_KEY, CENTROIDS_KEY
from ....specializers.adapters.trex_shape import LAYER_PARTS, TrexShape, read_trex_shape
from .trex_gate import TrexGate

__all__ = ["TrexGates", "gates_of", "install", "trex_of"]


@dataclass(frozen=True)
class TrexGates:
    """The gates of a loaded T-REX adapter: its number of experts, and per layer's name (as in vLLM) its gate."""

    experts: int
    by_module: Mapping[str, TrexGate]


def trex_of(lora: LoRAModel | None) -> TrexGates | None:
    """The gates of a loaded adapter, None where it is plain LoRA."""
    return getattr(lora, "metier_trex", None)


def gates_of(manager: Any, lora_id: int, module_name: str, slices: int) -> list[TrexGate | None]:
    """The gate of each slice of a wrapped layer for adapter `lora_id`; None for slices that it leaves alone."""
    trex = trex_of(manager.get_adapter(lora_id))
    parts = manager.packed_modules.get(module_name, [module_name])
    if trex is None or len(parts) != slices:  # the loader refuses adapters of layers that are packed otherwise
        return [None] * slices
    return [trex.by_module.get(part) for part in parts]


def install() -> None:
    """Have vLLM's adapter loader read the T-REX layout; other adapters are loaded as before."""
    WorkerLoRAManager._load_adapter = _patched_load_adapter(WorkerLoRAManager._load_adapter)


def _patched_load_adapter(original: Callable[..., LoRAModel]) -> Callable[..., LoRAModel]:
    def _load_adapter(self: WorkerLoRAManager, lora_request: Any) -> LoRAModel:
        folder = Path(get_adapter_absolute_path(lora_request.lora_path))
        # For a folder that cannot be read vLLM raises the error, as without our plugin.
        shape = read_trex_shape(folder) if (folder / "adapter_config.json").is_file() else None
        return (
            original(self, lora_request) if shape is None else load_trex(self, lora_request.lora_int_id, folder, shape)
        )

    return _load_adapter


def load_trex(worker: WorkerLoRAManager, number: int, folder: Path, shape: TrexShape) -> LoRAModel:
    """The adapter in `folder` as a LoRAModel of vLLM, with `TrexGates`; raises ValueError that says what is wrong."""
    manager, config = worker._adapter_manager, worker.lora_config
    if shape.rows > config.max_lora_rank:
        raise ValueError(
            f"T-REX with r1={shape.r1}, r2={shape.r2} needs r1 + r1*r2 = {shape.rows} rows, "
            f"slots have {config.max_lora_rank}: raise slot_rank"
        )
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    layers = _linear_slices(manager)
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    packed: dict[str, torch.Tensor] = {}
    gates: dict[str, TrexGate] = {}
    for stem, parts in _by_module(tensors).items():
        module, _ = parse_fine_tuned_lora_name(f"{stem}.lora_A.weight", mapper)
        _check_layer(module, parts, shape, layers)
        packed[f"{stem}.lora_A.weight"] = torch.cat([parts["lora_A.weight"], parts["lora_router.weight"]])
        packed[f"{stem}.lora_B.weight"] = parts["lora_B.weight"]
        gates[module] = TrexGate.from_scalars(shape, omega=float(parts["trex_omega"]), gamma=float(parts["trex_gamma"]))
    # The rank as vLLM records it; alpha / r = 1, since the gate holds the scale.
    helper = PEFTHelper(r=shape.rows, lora_alpha=shape.rows, target_modules=sorted({m.split(".")[-1] for m in gates}))
    lora = worker._lora_model_cls.from_lora_tensors(
        number, packed, helper, device="cpu", dtype=config.lora_dtype, weights_mapper=mapper
    )
    lora.metier_trex = TrexGates(shape.experts, gates)
    return lora


def _linear_slices(manager: Any) -> dict[str, tuple[BaseLinearLayerWithLoRA, int]]:
    """Every adaptable linear layer by the name an adapter knows it by: the wrapped layer and its slice there."""
    slices: dict[str, tuple[BaseLinearLayerWithLoRA, int]] = {}
    for name, layer in manager.modules.items():
        if isinstance(layer, BaseLinearLayerWithLoRA):
            parts = manager.packed_modules.get(name, [name])
            if len(parts) == layer.n_slices:
                slices.update({part: (layer, index) for index, part in enumerate(parts)})
    return slices


def _by_module(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name in (CENTROIDS_KEY, CENTER_KEY):
            continue  # the semantic map: asks bring c with them, the worker needs no map
        for part in LAYER_PARTS:
            if name.endswith(f".{part}"):
                modules.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
                break
        else:
            raise ValueError(f"unknown tensor {name!r} in a T-REX adapter")
    return modules


def _check_layer(
    module: str,
    parts: Mapping[str, torch.Tensor],
    shape: TrexShape,
    layers: Mapping[str, tuple[BaseLinearLayerWithLoRA, int]],
) -> None:
    if module not in layers:
        raise ValueError(f"{module} is no linear layer of this model that the T-REX gate can be put on")
    layer, index = layers[module]
    if layer.tp_size > 1:
        raise ValueError(f"{module} is split over {layer.tp_size} processes: the router logits would be partial sums")
    d_in, d_out = layer.lora_a_stacked[index].shape[-1], layer.lora_b_stacked[index].shape[2]
    for part, expected in shape.layer_shapes(d_in, d_out).items():
        found = tuple(parts[part].shape) if part in parts else None
        if found != expected:
            raise ValueError(f"{module}.{part} is {found or 'missing'}, expected {expected}")
        if not torch.isfinite(parts[part]).all():
            raise ValueError(f"{module}.{part} has values that are not finite")
