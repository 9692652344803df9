"""A checkpoint as its family's own model: whole in memory, or as modules without weights that take them later."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...agents.errors import RecipeError
from .attention import attention_of, model_of
from .checkpoint_files import AddedWeights, CheckpointReader
from .opened_by_transformers import opened_by_transformers
from .stored_weights import dense_names, read_dense

__all__ = ["build_without_weights", "load_dense_model"]


def load_dense_model(folder: Path, dtype: torch.dtype, merged: AddedWeights | None = None) -> Any:
    """Load a checkpoint as a transformers model with dense weights, dequantised where they are quantised.

    `merged` is a LoRA that counts as part of the weights. Raises: RecipeError for weights that the model lacks.
    """
    reader = CheckpointReader(folder)
    state = {}
    for name in dense_names(reader):
        weight = read_dense(reader, name, dtype)
        state[name] = weight if merged is None else merged.add(name, weight.float()).to(dtype)
    config = _dense_config(folder)
    with _without_weights():
        kind = type(model_of(config, dtype=torch.float32))
    model, loading = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        attn_implementation=attention_of(config),
    )
    if loading["missing_keys"]:
        raise RecipeError(
            f"the checkpoint in {folder.name!r} lacks {sorted(loading['missing_keys'])[0]}",
            expected=f"every weight of {kind.__name__}",
            remedy="Copy or make the checkpoint again.",
        )
    return model.eval()


def build_without_weights(folder: Path) -> Any:
    """A checkpoint's model with its parameters on the device `meta`; buffers are computed as the family does."""
    with _without_weights():
        return model_of(_dense_config(folder), dtype=torch.float32).eval()


@contextmanager
def _without_weights() -> Iterator[None]:
    """Put the parameters of modules that this thread makes on the device `meta`.

    The device as such would do it for buffers too, which nothing computes again: a scale of embeddings, say.
    """
    register, here = torch.nn.Module.register_parameter, threading.get_ident()

    def on_meta(module: Any, name: str, parameter: Any) -> None:
        # One that is there already is tied to another module's, and stays the same object.
        if parameter is not None and parameter.device.type != "meta" and threading.get_ident() == here:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def _dense_config(folder: Path) -> Any:
    from transformers import AutoConfig

    with opened_by_transformers(folder, "config"):
        config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
