"""What a method that tunes weights in their own shapes starts from and ends with: a model, and a checkpoint of it."""

from __future__ import annotations

from typing import Any

from ...agents.errors import RecipeError
from ..checkpoints.attention import open_model
from ..checkpoints.dense_checkpoint import dense_tensors, write_dense
from ..checkpoints.opened_by_transformers import open_tokenizer
from ..checkpoints.tensor_files import read_json
from ..training.loop import TrainingSettings
from .method import Job
from .trained import LoadedBase, choose_device

__all__ = ["check_tunable", "load_folded", "load_tunable", "save_tuned"]


def check_tunable(job: Job) -> None:
    """Check that the job's checkpoint holds plain weights, and an adapter that they can take in.

    Raises: RecipeError for a quantised checkpoint, or an adapter that is no LoRA, or changes a weight that two layers
    share; AdapterError for one that does not fit the checkpoint.
    """
    if "quantization_config" in read_json(job.model, "config.json"):
        raise RecipeError(
            "the weights to tune are quantised",
            expected="a checkpoint of plain weights",
            remedy="Put the method that quantises last, or name a parent from before it.",
        )
    if job.ask.kind is not None and not job.ask.kind.mergeable:
        raise RecipeError(
            f"the parent has an adapter of kind {job.ask.adapter}",
            expected="a LoRA adapter, which new weights can take in, or none",
            remedy="Set parent: base, or export the adapter as LoRA first.",
        )
    if job.adapter is not None:
        from ..adapters.lora_deltas import LoraDeltas

        LoraDeltas(job.adapter, job.model)


def load_tunable(job: Job, settings: TrainingSettings) -> LoadedBase:
    """Load the job's model in float32, with the LoRA before it folded in, on the GPU where there is one."""
    device, autocast = choose_device(settings)
    model = load_folded(job, device=device)
    return LoadedBase(model, open_tokenizer(job.model), device, autocast)


def save_tuned(model: Any, job: Job) -> None:
    """Write `job.out / "weights"`: the job's checkpoint with the model's weights, in that checkpoint's dtype.

    Raises: TrainingError when a value is not finite, OSError when the disk is full.
    """
    write_dense(job.out / "weights", dense_tensors(model), read_json(job.model, "config.json"))


def load_folded(job: Job, *, device: str = "cpu") -> Any:
    """Load the job's model in float32, with the adapter of what came before folded into its weights.

    Raises: RecipeError when that adapter is no LoRA, so that no dense weights are equal to it, or adapts what the model
    keeps under another name.
    """
    import torch

    model = open_model(job.model, dtype=torch.float32).to(device)
    if job.adapter is None:
        return model
    if job.ask.kind is None or not job.ask.kind.mergeable:
        raise RecipeError(
            f"what comes before has an adapter of kind {job.ask.adapter!r}, which no dense weights are equal to",
            expected="a LoRA, or no adapter",
            remedy="Set parent: base, and tune after pruning.",
        )
    from ..adapters.lora_deltas import LoraDeltas

    deltas = LoraDeltas(job.adapter, job.model)
    parameters = dict(model.named_parameters())
    unknown = sorted(layer for layer in deltas.layers if f"{layer}.weight" not in parameters)
    if unknown:
        raise RecipeError(
            f"the adapter of what comes before changes {unknown[0]}, whose weight is not stored by itself",
            expected="an adapter of layers that the model keeps apart",
            remedy="Set parent: base, and tune after pruning.",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(deltas.add(name, parameter))
    return model
