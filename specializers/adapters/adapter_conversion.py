"""Adapters of other kinds as LoRA: what peft can express as a fixed change of linear layers, at the rank it needs.

A change of rank R equals a LoRA of rank R whatever it was trained as; so the singular values of each layer's
change say which rank is exact, and the logits of the real base say what a lower one costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...agents.errors import AdapterError
from ...agents.text_files import shown
from ...agents.whole_files import whole_folder
from .adapter_check import SLOT_RANKS, check_adapter
from .adapter_files import CONFIG, PEFT_PREFIX, WEIGHTS, check_finite, merge_remedy, read_config, read_tensors
from .adapter_writing import write_lora
from .peft_kinds import NOT_AS_LORA, check_mergeable
from .peft_models import load_adapter, load_base, logits_of, peft_at_work, prompt_tokens

if TYPE_CHECKING:
    import torch

    from .logit_error import LogitError

__all__ = ["Conversion", "convert_adapter", "low_rank_factors"]

EXACT_SHARE = 1e-3
"""A conversion counts as exact below this share of the adapter's own effect; float32 noise is 100 times less."""

RANK_TOLERANCE = 1e-5
"""Singular values below this part of a layer's largest are rounding, not rank."""

_ALSO_TRAINED = {"modules_to_save": "whole trained modules", "trainable_token_indices": "trained tokens"}

_FIXED_CHANGE = ("ADALORA", "PVERA")
"""Kinds whose layers state their change of weights, though peft does not list them as LoRA in disguise."""


@dataclass(frozen=True)
class Conversion:
    """What became of an adapter: the rank it got, the rank at which it would be exact, and what was lost."""

    peft_type: str
    rank: int
    exact_rank: int
    error: LogitError

    @property
    def exact(self) -> bool:
        return self.error.share <= EXACT_SHARE


def convert_adapter(
    folder: Path,
    base: Path,
    out: Path,
    *,
    max_rank: int = 64,
    accept_error: float = 0.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write a LoRA adapter folder `out` that does what the adapter in `folder` does to `base`.

    It gets the smallest exact rank, or `max_rank` where that is less. The error is measured with the written files
    against the original on PROMPTS, in float32; more than `accept_error` (a share, see LogitError) of it is
    refused. `on_progress` gets layers done and layers in all. `out` is written whole or not at all.
    Raises: AdapterError when the adapter is damaged, is of a kind that is no fixed change of linear layers, or
    would lose more than is accepted.
    """
    kind = _check_kind(folder)
    check_finite(folder / WEIGHTS, read_tensors(folder))
    import torch

    tokens = prompt_tokens(base)
    model = load_base(base)
    with torch.no_grad():
        bare = logits_of(model, tokens)
        tuned = load_adapter(model, folder, kind)
        with peft_at_work("compute with", kind, folder):
            original = logits_of(tuned, tokens)
        factors = _factors(folder, tuned, kind, on_progress)
    del model, tuned
    exact_rank = max(1, *(a.shape[0] for a, _ in factors.values()))
    rank = min(exact_rank, max_rank)
    with whole_folder(out) as part:
        write_lora(part, {name: (a[:rank], b[:, :rank]) for name, (a, b) in factors.items()}, rank=rank, base=base)
        _check_made(folder, kind, part, base)
        with torch.no_grad():
            error = _error(original, logits_of(load_adapter(load_base(base), part, "LORA"), tokens), bare)
        conversion = Conversion(kind, rank, exact_rank, error)
        if not conversion.exact and error.share > accept_error:
            raise _too_lossy(folder, conversion, max_rank, accept_error)
    return conversion


def _check_made(folder: Path, kind: str, part: Path, base: Path) -> None:
    """Check the LoRA that was made of the adapter in `folder`; raises AdapterError that names that one."""
    try:
        check_adapter(part, base, slot_rank=SLOT_RANKS[-1])
    except AdapterError as error:
        problem = error.problem.replace(str(part), "the LoRA made of it")
        raise AdapterError(
            f"{kind} adapter {folder} cannot be served: {problem}", expected=error.expected, remedy=error.remedy
        ) from error


def low_rank_factors(delta: torch.Tensor, *, tolerance: float = RANK_TOLERANCE) -> tuple[torch.Tensor, torch.Tensor]:
    """a [R, d_in] and b [d_out, R] with b a = delta [d_out, d_in], where R is the numerical rank of delta.

    The largest singular values come first, so that the first rows and columns are the best factors of lower rank
    (Eckart and Young). Both halves carry the square root of the singular values. R is 0 for no change.
    """
    import torch

    # In float64: a large model magnifies what a decomposition in float32 loses.
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    rank = int((s > tolerance * s[0]).sum())
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()


def _check_kind(folder: Path) -> str:
    path = folder / CONFIG
    config = read_config(folder)
    kind = check_mergeable(folder, config)
    if kind in NOT_AS_LORA:
        raise AdapterError(
            f"{path}: a {kind} adapter cannot be served: {NOT_AS_LORA[kind]}",
            expected="LoRA, T-REX, or a kind that peft converts to LoRA (VERA, VBLORA, MISS, LOHA, …)",
            remedy=merge_remedy(folder),
        )
    for name, meaning in _ALSO_TRAINED.items():
        if config.get(name):
            raise AdapterError(
                f"{path}: {name} is {shown(config[name])}",
                expected=f"an adapter without {meaning}, which a LoRA cannot carry",
                remedy=merge_remedy(folder),
            )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{path}: bias is {shown(config['bias'])}",
            expected="'none': a LoRA cannot carry biases",
            remedy=merge_remedy(folder),
        )
    return kind


def _factors(
    folder: Path, tuned: Any, kind: str, on_progress: Callable[[int, int], None] | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    import peft
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in tuned.named_modules() if isinstance(module, BaseTunerLayer)}
    unfit = [n for n, layer in layers.items() if kind not in _FIXED_CHANGE and not layer.supports_lora_conversion()]
    if unfit or not layers:
        raise AdapterError(
            f"a {kind} adapter cannot be served: peft {peft.__version__} knows no conversion of it to LoRA",
            expected="LoRA, T-REX, or a kind that peft converts to LoRA (VERA, VBLORA, MISS, LOHA, …)",
            remedy=merge_remedy(folder),
        )
    for name, layer in layers.items():
        if not isinstance(layer.get_base_layer(), torch.nn.Linear):
            raise AdapterError(
                f"a {kind} adapter on {name} cannot be served",
                expected="adapters on linear layers only",
                remedy=merge_remedy(folder),
            )
    if kind == "MISS":
        # Its layers give no change of their own, but peft knows their two factors (their own rank, not this one).
        narrowest = min(min(layer.in_features, layer.out_features) for layer in layers.values())
        with peft_at_work("convert", kind, folder):
            _, state = peft.convert_to_lora(tuned, narrowest)
        changes = {name: state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] for name in layers}
    factors = {}
    for done, (name, layer) in enumerate(layers.items(), 1):
        with peft_at_work("convert", kind, folder):
            delta = changes[name] if kind == "MISS" else layer.get_delta_weight("default")
        factors[name.removeprefix(PEFT_PREFIX)] = low_rank_factors(delta)
        if on_progress is not None:
            on_progress(done, len(layers))
    return factors


def _error(original: list[torch.Tensor], stand_in: list[torch.Tensor], bare: list[torch.Tensor]) -> LogitError:
    from .logit_error import LogitErrorMeter

    meter = LogitErrorMeter()
    for triple in zip(original, stand_in, bare, strict=True):
        meter.add(*triple)
    return meter.result()


def _too_lossy(folder: Path, conversion: Conversion, max_rank: int, accept_error: float) -> AdapterError:
    error = conversion.error
    accept = f"accept this with --accept-error {min(1.0, error.share * 1.01):.2g}"
    if conversion.exact_rank > max_rank and conversion.exact_rank <= SLOT_RANKS[-1]:
        accept = f"keep it exact with --max-rank {conversion.exact_rank} (slots grow with it), or {accept}"
    return AdapterError(
        f"{conversion.peft_type} adapter {folder} as LoRA of rank {conversion.rank} loses {error}",
        expected=f"a loss of at most {max(accept_error, EXACT_SHARE):.2g} of what it changes",
        remedy=f"{merge_remedy(folder)} Or {accept}.",
    )
