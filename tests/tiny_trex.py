"""Random T-REX adapters of tiny bases for tests: the layout on disk, written without the tuner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metier.agents import TASK_TEXT_RULE
from metier.specializers.adapters.semantic_map import SemanticMap
from metier.specializers.adapters.trex_shape import K_TASK, TREX, TREX_FORMAT, TrexShape
from tests.tiny_model import LINEAR_TARGETS, linear_shapes

__all__ = ["TASKS", "write_random_trex"]

_THINGS = ("dogs", "spiders", "pears", "figs", "months", "rivers", "towers", "songs", "boats", "clocks")
TASKS = tuple(
    text
    for n, thing in enumerate(_THINGS)
    for text in (
        f"What is {n} plus {n + 3} {thing}?",
        f"How many legs do {n} {thing} and seven spiders have in total?",
        f"Sort these words by their first letter: pear, fig, apple, {thing}",
        f"Write a haiku about {thing}.",
    )
)
"""Texts of four kinds, enough for maps of 32 clusters."""


def write_random_trex(
    folder: Path,
    base: Path,
    *,
    r1: int = 2,
    r2: int = 4,
    k_tok: float | None = None,
    k_task: float = K_TASK,
    targets: Sequence[str] = LINEAR_TARGETS,
    seed: int = 0,
    weight_std: float = 0.1,
    router_std: float = 1.0,
    dtype: str = "float32",
) -> Path:
    """Write a random T-REX adapter of `base` into `folder`, and return it.

    All parts are random (training starts with B and the router at 0, which would hide the gate). omega and gamma
    differ by layer. The map is fitted on TASKS.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    fitted = SemanticMap.fit(TASKS, r1 * r2, seed=seed)
    tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in fitted.tensors().items()}
    for name, d_in, d_out in linear_shapes(base, targets):
        matrices = {
            "lora_A": torch.randn(r1, d_in, generator=generator) / d_in**0.5,
            "lora_B": torch.randn(d_out, r2, generator=generator) * weight_std,
            "lora_router": torch.randn(r1 * r2, d_in, generator=generator) * router_std / d_in**0.5,
        }
        for part, matrix in matrices.items():
            tensors[f"base_model.model.{name}.{part}.weight"] = matrix.to(getattr(torch, dtype))
        for scalar in ("trex_omega", "trex_gamma"):
            tensors[f"base_model.model.{name}.{scalar}"] = torch.randn(1, generator=generator) * 0.01
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": TREX,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "target_modules": sorted(targets),
        "trex": {
            "format": TREX_FORMAT,
            **asdict(TrexShape.released(r1, r2, k_tok=k_tok, k_task=k_task)),
            "embed_id": fitted.embed_id,
            "prompt_rule": TASK_TEXT_RULE,
        },
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder
