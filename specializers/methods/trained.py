"""What all trained methods share: the model in memory, low-rank updates beside its layers, and the training itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...agents.errors import RecipeError
from ..machine.number_types import training_number_type
from ..training.batches import EncodedRow, pad_token
from ..training.loop import TrainingSettings, train
from ..training.objective import Objective, Placed
from .method import Job

__all__ = [
    "LoadedBase",
    "Targets",
    "add_lora",
    "choose_device",
    "linear_targets",
    "train_job",
    "training_checkpoint",
    "training_device",
]

Targets = Literal["all-linear"] | tuple[str, ...]
_LAST_STEPS = 25


@dataclass(frozen=True)
class LoadedBase:
    """A base model ready to be adapted: where it is, and whether its products run in bfloat16."""

    model: Any
    tokenizer: Any
    device: str
    autocast: bool

    @property
    def placed(self) -> Placed:
        """The parameters passed to `train` and an `Objective`."""
        return {"pad_token": pad_token(self.tokenizer), "device": self.device, "autocast": self.autocast}


def training_device() -> str:
    """Where to train: the GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_device(settings: TrainingSettings) -> tuple[str, bool]:
    """Where to train, and whether products run in bfloat16 there, as `dtype` asks."""
    device = training_device()
    return device, training_number_type(device, settings.dtype).dtype == "bfloat16"


def linear_targets(model: Any, targets: Targets) -> list[str]:
    """Names of the linear layers to adapt, sorted; `all-linear` is all that can be, but the output head.

    Layers of experts and beside them in their mixture, layers named as experts are, and the way out of a Mamba layer
    cannot be.
    Raises: RecipeError for a name that no such layer has, or a model without any (GPT-2 stores them transposed).
    """
    import torch

    head = model.get_output_embeddings()
    places = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    ]
    linear = {name.rpartition(".")[2] for name in places} - _left_alone(model, places)
    if not linear:
        raise RecipeError(
            f"the model, of type {model.config.model_type!r}, has no linear layers that adapters are trained on",
            expected="layers of torch.nn.Linear: GPT-2's are transposed, and of another class",
            remedy="Start from another base; `metier doctor --base FOLDER` says what a base is good for.",
        )
    if targets == "all-linear":
        return sorted(linear)
    unknown = sorted(set(targets) - linear)
    if unknown or not targets:
        raise RecipeError(
            f"targets {unknown or '[]'} name no linear layer of this model",
            expected=f"some of {', '.join(sorted(linear))}, or all-linear",
            remedy="Correct `targets` in the recipe.",
        )
    return sorted(targets)


# What checkpoints call the matrices of experts. peft takes the names for those, whichever layer is meant.
_EXPERT_NAMES = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def _left_alone(model: Any, places: Sequence[str]) -> set[str]:
    """Names of linear layers at `places` that are not adapted."""
    modules = dict(model.named_modules())
    mixtures = tuple(name.removesuffix("experts") for name in modules if name.endswith(".experts"))
    left = {name.rpartition(".")[2] for name in places if name.startswith(mixtures)} if mixtures else set()
    if mixtures:
        left |= _EXPERT_NAMES
    # The kernels of Mamba read this layer's weight themselves, past any adapter. (It has D; a delta rule has none.)
    mamba = [name for name, module in modules.items() if hasattr(module, "A_log") and hasattr(module, "D")]
    return left | ({"out_proj"} if any(f"{name}.out_proj" in places for name in mamba) else set())


def add_lora(model: Any, *, rank: int, alpha: float, dropout: float, targets: Sequence[str], seed: int) -> Any:
    """Put low-rank updates beside the layers `targets`, in float32; they are all that requires gradients then."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # peft draws the first A from the global generator
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets)
    )
    return get_peft_model(model, config, autocast_adapter_dtype=True)


def train_job(
    job: Job,
    settings: TrainingSettings,
    base: LoadedBase,
    model: Any,
    rows: Sequence[EncodedRow],
    *,
    rate_factor: Callable[[str], float] | None = None,
    objective: Objective | None = None,
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train what requires gradients in `model`, which was made of `base`; returns the log, and what a card says of it.

    `rate_factor` and `objective` are as in `train`. A killed job goes on from the checkpoint in its `work_dir`.
    Raises: TrainingError as `train`.
    """
    log = train(
        model,
        rows,
        settings,
        seed=job.seed,
        checkpoint=training_checkpoint(job),
        job=job.fingerprint,
        rate_factor=rate_factor,
        objective=objective,
        on_progress=job.on_progress,
        **base.placed,
    )
    last = [entry["loss"] for entry in log[-_LAST_STEPS:]]
    return log, {"final_loss": round(sum(last) / len(last), 5), "steps": len(log), "rows": len(rows)}


def training_checkpoint(job: Job) -> Path:
    """The file that a killed training goes on from."""
    return job.work_dir / "checkpoint.safetensors"
