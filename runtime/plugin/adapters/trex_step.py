"""Before each step of the engine: which semantic vector c belongs to which token of the batch.

vLLM passes its LoRA wrapper the slot of each token, and only when that changes. The vectors travel with the requests
(`SamplingParams.extra_args`) and may change while slots stay, so this file passes them separately.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from ..wire import INTUITION_KEY
from .trex_loader import trex_of

__all__ = ["install", "step_intuition"]


def install() -> None:
    """Pass c to the LoRA wrapper of the language model before every forward."""
    LoRAModelRunnerMixin.set_active_loras = _patched_set_active_loras(LoRAModelRunnerMixin.set_active_loras)


def _patched_set_active_loras(original: Callable[..., None]) -> Callable[..., None]:
    def set_active_loras(
        self: Any,
        input_batch: Any,
        num_scheduled_tokens: np.ndarray,
        num_sampled_tokens: np.ndarray | None = None,
        mapping_type: Any = None,
    ) -> None:
        more = () if mapping_type is None else (mapping_type,)
        original(self, input_batch, num_scheduled_tokens, num_sampled_tokens, *more)
        manager = self.lora_manager._adapter_manager
        prefix = manager.mm_mapping.language_model[0] if manager.supports_mm else DEFAULT_LANGUAGE_WRAPPER_KEY
        wrapper = manager.punica_wrapper_mapping[prefix]
        experts = {number: trex.experts for number, lora in manager.list_adapters().items() if (trex := trex_of(lora))}
        wrapper.metier_step_key = set_intuition(
            wrapper,
            experts,
            input_batch,
            self.requests,
            num_scheduled_tokens,
            getattr(wrapper, "metier_step_key", None),
        )

    return set_active_loras


def set_intuition(
    wrapper: Any,
    experts: dict[int, int],
    input_batch: Any,
    requests: Any,
    num_scheduled_tokens: np.ndarray,
    last: object,
) -> object:
    """Give `wrapper` the vectors of this step unless it has them already; returns the key that this is decided by.

    `experts` maps the number of each loaded T-REX adapter to the length of its c.
    """
    count = input_batch.num_reqs
    numbers = input_batch.request_lora_mapping[:count].tolist()
    if not any(number in experts for number in numbers):
        return None
    key = (tuple(input_batch.req_ids[:count]), num_scheduled_tokens.tobytes())
    if key != last:
        vectors = [
            step_intuition(requests[name], experts.get(number))
            for name, number in zip(input_batch.req_ids[:count], numbers, strict=True)
        ]
        wrapper.set_intuition(*intuition_table(vectors, num_scheduled_tokens))
    return key


def step_intuition(request: Any, experts: int | None) -> list[float] | None:
    """The vector that a running request carries, None where its adapter needs none.

    Raises ValueError when it is missing or of another length; our engines refuse such a request before vLLM sees it.
    """
    if experts is None:
        return None
    c = ((request.sampling_params and request.sampling_params.extra_args) or {}).get(INTUITION_KEY)
    if c is None or len(c) != experts:
        raise ValueError(f"request {request.req_id} to a T-REX adapter needs {experts} numbers as {INTUITION_KEY}")
    return list(c)


def intuition_table(
    vectors: list[list[float] | None], num_scheduled_tokens: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table fp32 [vectors, width] of a batch's vectors, and int64 [tokens]: the row of each token or -1."""
    used = [c for c in vectors if c is not None]
    table = torch.zeros(len(used), max(map(len, used), default=0))
    row_of, row = np.full(len(vectors), -1), 0
    for index, c in enumerate(vectors):
        if c is not None:
            table[row, : len(c)] = torch.tensor(c)
            row_of[index], row = row, row + 1
    return table, torch.from_numpy(row_of.repeat(num_scheduled_tokens).astype(np.int64))
