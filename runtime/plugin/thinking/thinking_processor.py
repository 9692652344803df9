"""The logits processor that keeps thinking to its profile; vLLM loads it by name in the process that samples.

Native `thinking_token_budget` (vLLM 0.32) knows a maximum only; it begins anew when the answer itself says `<think>`,
so that it forces end tags into an answer, where a grammar rejects them; and it searches the whole reply at every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from ....agents.errors import MetierError, PluginError
from ..wire import THINKING_KEY
from .budget_forcing import BudgetForcing, ThinkingRules
from .end_tag import EndTag, end_tag

__all__ = ["ThinkingProcessor"]

_ROW_KEY = "row"


@dataclass
class _Row:
    """One request that thinks: the state of its rules, and vLLM's own list of the tokens it has written."""

    forcing: BudgetForcing
    written: list[int]
    read: int = 0

    def catch_up(self) -> None:
        self.forcing.read(self.written[self.read :])
        self.read = len(self.written)


class ThinkingProcessor(LogitsProcessor):
    """Forces and forbids tokens in the rows of asks that think; all other rows it leaves alone."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request whose rules cannot be read; raises ValueError, as vLLM requires."""
        plain = (sampling_params.extra_args or {}).get(THINKING_KEY)
        if plain is None:
            return
        try:
            rules = ThinkingRules.from_plain(plain)
        except (MetierError, KeyError, TypeError) as error:
            raise ValueError(f"{THINKING_KEY}: {error}") from error
        if not rules.close or not rules.close_ids:
            raise ValueError(f"{THINKING_KEY}: no end tag")

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        if vllm_config.scheduler_config.async_scheduling:
            raise PluginError(
                "async_scheduling is on",
                expected="steps that know all tokens of the step before",
                remedy="Start the engine with async_scheduling=False.",
            )
        self._device = device
        self._model_config = vllm_config.model_config
        self._rows: dict[int, _Row] = {}
        self._masks: dict[frozenset[int], torch.Tensor] = {}

    def is_argmax_invariant(self) -> bool:
        """Greedy rows are changed too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Update the state for requests that join, move within and leave the batch."""
        process_dict_updates(self._rows, batch_update, self._row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Constrain the next token of each row that thinks; logits [rows, vocabulary], changed in place."""
        for index, row in self._rows.items():
            row.catch_up()
            if row.forcing.closed:
                continue
            line = logits[index]
            constraint = row.forcing.next(lambda line=line: int(line.argmax()))  # type: ignore[misc]
            if constraint.forced is not None:
                line.fill_(-torch.inf)
                line[constraint.forced] = 0.0
            elif constraint.banned:
                line.index_fill_(0, self._mask(constraint.banned), -torch.inf)
        return logits

    def _row(self, params: SamplingParams, prompt: list[int] | None, written: list[int]) -> _Row | None:
        plain = (params.extra_args or {}).get(THINKING_KEY)
        if plain is None:
            return None
        # Kept with the request: one that a full step leaves out comes back as new, with its Waits used up.
        row: _Row | None = plain.get(_ROW_KEY)
        if row is None:
            rules = ThinkingRules.from_plain(plain)
            stop_ids = {*params.all_stop_token_ids, *(params.stop_token_ids or ())}
            row = plain[_ROW_KEY] = _Row(BudgetForcing(rules, self._tag(rules.close), stop_ids), written)
        row.written = written
        return row

    def _tag(self, text: str) -> EndTag:
        return end_tag(cached_tokenizer_from_config(self._model_config), text)

    def _mask(self, banned: frozenset[int]) -> torch.Tensor:
        mask = self._masks.get(banned)
        if mask is None:
            mask = self._masks[banned] = torch.tensor(sorted(banned), device=self._device)
        return mask
