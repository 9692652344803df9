"""Adapters of other kinds as LoRA: what peft can express as a fixed change of linear layers, at the rank it needs.

A change of rank R equals a LoRA of rank R whatever it was trained as; so the singular values of each layer's
change say which rank is exact, and the logits of the real base say what a lower one costs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...agents.chat_tokens import chat_tokens
from ...agents.errors import AdapterError
from ...agents.whole_files import whole_folder
from .adapter_check import SLOT_RANKS, check_adapter
from .adapter_files import CONFIG, PEFT_PREFIX, WEIGHTS, check_finite, read_config, read_tensors
from .adapter_writing import write_lora

if TYPE_CHECKING:
    import torch

    from .logit_error import LogitError

__all__ = ["Conversion", "convert_adapter", "low_rank_factors"]

EXACT_SHARE = 1e-3
"""A conversion counts as exact below this share of the adapter's own effect; float32 noise is 100 times less."""

RANK_TOLERANCE = 1e-5
"""Singular values below this part of a layer's largest are rounding, not rank."""

_PROMPT = "it puts learned vectors before the prompt, which no change of linear layers equals"
_MULTIPLIES = "it multiplies the base's weights or activations, so its change has the full rank of the layer"
_VECTORS = "it changes normalisations or biases, and a LoRA changes only linear layers"
_PER_INPUT = "what it changes depends on the input, and the two matrices of a LoRA are fixed"
_REASONS = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": _PROMPT,
    "IA3": _MULTIPLIES,
    "OFT": _MULTIPLIES,
    "BOFT": _MULTIPLIES,
    "HRA": _MULTIPLIES,
    "HIRA": _MULTIPLIES,
    "ROAD": _MULTIPLIES,
    "LN_TUNING": _VECTORS,
    "BEFT": _VECTORS,
    "TRAINABLE_TOKENS": "it changes embeddings, and a LoRA here changes only linear layers",
    "XLORA": _PER_INPUT,
    "POLY": _PER_INPUT,
    "LILY": _PER_INPUT,
}
_ALSO_TRAINED = {"modules_to_save": "whole trained modules", "trainable_token_indices": "trained tokens"}

# Short, of several kinds, and the same for every adapter, so that errors compare.
PROMPTS = (
    "A farmer has 17 sheep, buys 5 more and sells 8. How many are left? Think step by step.",
    'Answer as JSON with the keys "value" and "why": what is 12 * 7 - 3?',
    "Write a Python function that returns the longest word of a sentence.",
    "The critic reads the plan, compares it with the puzzle, and says in one sentence whether it holds.",
)


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

    tokens = _prompt_tokens(base)
    model = _load_base(base)
    with torch.no_grad():
        bare = _logits(model, tokens)
        tuned = _load_adapter(model, folder, kind)
        original = _logits(tuned, tokens)
        factors = _factors(tuned, kind, on_progress)
    del model, tuned
    exact_rank = max(1, *(a.shape[0] for a, _ in factors.values()))
    rank = min(exact_rank, max_rank)
    with whole_folder(out) as part:
        write_lora(part, {name: (a[:rank], b[:, :rank]) for name, (a, b) in factors.items()}, rank=rank, base=base)
        check_adapter(part, base, slot_rank=SLOT_RANKS[-1])
        with torch.no_grad():
            error = _error(original, _logits(_load_adapter(_load_base(base), part, "LORA"), tokens), bare)
        conversion = Conversion(kind, rank, exact_rank, error)
        if not conversion.exact and error.share > accept_error:
            raise _too_lossy(folder, conversion, max_rank, accept_error)
    return conversion


def low_rank_factors(delta: torch.Tensor, *, tolerance: float = RANK_TOLERANCE) -> tuple[torch.Tensor, torch.Tensor]:
    """a [R, d_in] and b [d_out, R] with b a = delta [d_out, d_in], where R is the numerical rank of delta.

    The largest singular values come first, so that the first rows and columns are the best factors of lower rank
    (Eckart and Young). Both halves carry the square root of the singular values. R is 0 for no change.
    """
    import torch

    u, s, v = torch.linalg.svd(delta.float(), full_matrices=False)
    rank = int((s > tolerance * s[0]).sum())
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def _check_kind(folder: Path) -> str:
    path = folder / CONFIG
    config = read_config(folder)
    kind = str(config.get("peft_type"))
    if kind in _REASONS:
        raise AdapterError(
            f"{path}: a {kind} adapter cannot be served: {_REASONS[kind]}",
            expected="LoRA, T-REX, or a kind that peft converts to LoRA (VERA, VBLORA, MISS, LOHA, …)",
            remedy="Train it as LoRA or T-REX" + _merge_remedy(_REASONS[kind]),
        )
    for name, meaning in _ALSO_TRAINED.items():
        if config.get(name):
            raise AdapterError(
                f"{path}: {name} is {config[name]!r}",
                expected=f"an adapter without {meaning}, which a LoRA cannot carry",
                remedy="Train it without them, or merge it into a checkpoint of its own.",
            )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias is {config['bias']!r}", expected="'none': a LoRA cannot carry biases")
    return kind


def _merge_remedy(reason: str) -> str:
    return ", or merge it into a checkpoint of its own." if reason in (_MULTIPLIES, _VECTORS) else "."


def _prompt_tokens(base: Path) -> list[torch.Tensor]:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return [torch.tensor([chat_tokens(tokenizer, [{"role": "user", "content": prompt}])]) for prompt in PROMPTS]


def _load_base(base: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    # Reduced precision would drown the difference that is measured.
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def _load_adapter(model: Any, folder: Path, kind: str) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            tuned = PeftModel.from_pretrained(model, folder).eval()
        except Exception as error:  # peft raises many kinds for files that do not fit
            raise AdapterError(
                f"peft cannot load the {kind} adapter {folder}: {str(error).splitlines()[0]}",
                expected="an adapter of this base, written by a peft version like the one here",
                remedy="Give the base it was trained on, or save it again with this peft version.",
            ) from error
    for warning in said:
        # A layer whose tensors are missing keeps its random start, and peft only warns.
        if "missing adapter keys" in str(warning.message):
            raise AdapterError(
                f"adapter {folder}: {warning.message}",
                expected="tensors for every layer that its adapter_config.json names",
                remedy="Copy the adapter again, whole.",
            )
    return tuned


def _factors(
    tuned: Any, kind: str, on_progress: Callable[[int, int], None] | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    import peft
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in tuned.named_modules() if isinstance(module, BaseTunerLayer)}
    unfit = [name for name, layer in layers.items() if not layer.supports_lora_conversion()]
    if unfit or not layers:
        raise AdapterError(
            f"a {kind} adapter cannot be served: peft {peft.__version__} knows no conversion of it to LoRA",
            expected="LoRA, T-REX, or a kind that peft converts to LoRA (VERA, VBLORA, MISS, LOHA, …)",
            remedy="Train it as LoRA or T-REX, or merge it into a checkpoint of its own.",
        )
    for name, layer in layers.items():
        if not isinstance(layer.get_base_layer(), torch.nn.Linear):
            raise AdapterError(
                f"a {kind} adapter on {name} cannot be served",
                expected="adapters on linear layers only",
                remedy="Train it again with linear layers as targets.",
            )
    if kind == "MISS":
        # Its layers give no change of their own, but peft knows their two factors (their own rank, not this one).
        narrowest = min(min(layer.in_features, layer.out_features) for layer in layers.values())
        _, state = peft.convert_to_lora(tuned, narrowest)
        changes = {name: state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] for name in layers}
    factors = {}
    for done, (name, layer) in enumerate(layers.items(), 1):
        delta = changes[name] if kind == "MISS" else layer.get_delta_weight("default")
        factors[name.removeprefix(PEFT_PREFIX)] = low_rank_factors(delta)
        if on_progress is not None:
            on_progress(done, len(layers))
    return factors


def _logits(model: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(input_ids=tokens).logits[0] for tokens in prompts]


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
        accept = f"Keep it exact with --max-rank {conversion.exact_rank} (slots grow with it), or {accept}"
    return AdapterError(
        f"{conversion.peft_type} adapter {folder} as LoRA of rank {conversion.rank} loses {error}",
        expected=f"a loss of at most {max(accept_error, EXACT_SHARE):.2g} of what it changes",
        remedy=f"{accept[0].upper()}{accept[1:]}.",
    )
