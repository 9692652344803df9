"""A base in float32 with an adapter that peft loads: what conversion and merging compare their results with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...agents.chat.chat_tokens import chat_tokens
from ...agents.errors import AdapterError
from ..checkpoints.attention import open_model
from ..checkpoints.opened_by_transformers import open_tokenizer
from .adapter_files import WEIGHTS

if TYPE_CHECKING:
    import torch

__all__ = ["PROMPTS", "load_adapter", "load_base", "logits_of", "peft_at_work", "prompt_tokens"]

# Short, of several kinds, and the same for every adapter, so that errors compare.
PROMPTS = (
    "A farmer has 17 sheep, buys 5 more and sells 8. How many are left? Think step by step.",
    'Answer as JSON with the keys "value" and "why": what is 12 * 7 - 3?',
    "Write a Python function that returns the longest word of a sentence.",
    "The critic reads the plan, compares it with the puzzle, and says in one sentence whether it holds.",
)


def prompt_tokens(base: Path) -> list[torch.Tensor]:
    """PROMPTS as the base's chat template writes them, each [1, tokens]."""
    import torch

    tokenizer = open_tokenizer(base)
    return [torch.tensor([chat_tokens(tokenizer, [{"role": "user", "content": prompt}])]) for prompt in PROMPTS]


def load_base(base: Path) -> Any:
    """The model in float32: reduced precision would drown the differences that are measured."""
    import torch

    return open_model(base, dtype=torch.float32).eval()


def load_adapter(model: Any, folder: Path, kind: str) -> Any:
    """The peft model of the adapter in `folder`, of peft type `kind`, on `model`, which it changes.

    Raises: AdapterError when peft cannot load it, or its file has too few or too many tensors.
    """
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    with warnings.catch_warnings(record=True) as said, peft_at_work("load", kind, folder):
        warnings.simplefilter("always")
        tuned = PeftModel.from_pretrained(model, folder).eval()
        left = set_peft_model_state_dict(tuned, load_file(folder / WEIGHTS))
    for warning in said:
        # A layer whose tensors are missing keeps its random start, and peft only warns.
        if "missing adapter keys" in str(warning.message):
            raise AdapterError(
                f"adapter {folder}: {warning.message}",
                expected="tensors for every layer that its adapter_config.json names",
                remedy="Copy the adapter again, whole.",
            )
    if left.unexpected_keys:
        raise AdapterError(
            f"adapter {folder}: peft has no place for {left.unexpected_keys[0]}",
            expected="tensors of the layers that its adapter_config.json names",
            remedy="Copy the adapter again, with its own adapter_config.json.",
        )
    return tuned


@contextmanager
def peft_at_work(doing: str, kind: str, folder: Path) -> Iterator[None]:
    """Raise whatever peft raises, which is of many kinds for files that do not fit, as AdapterError that names it."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AdapterError(
            f"peft cannot {doing} the {kind} adapter {folder}: {reason}",
            expected="an adapter of this base, written by a peft version like the one here",
            remedy="Give the base it was trained on, or save it again with this peft version.",
        ) from error


def logits_of(model: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of each prompt."""
    import torch

    with torch.no_grad():
        return [model(input_ids=tokens).logits[0].float() for tokens in prompts]
