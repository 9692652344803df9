"""Seeded asks whose prompt is read in parts, on the CPU.

After each part vLLM samples a token that nobody gets, and takes the draw back by the generator's offset. Generators on
the CPU have none: vLLM 0.32 ends the engine there. Here the generator gets the state it had before the draw, so that a
seed gives the same answer however a prompt was cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

__all__ = ["install"]


def install() -> str:
    """Let the CPU's runner keep and restore generators of prompts that are not read to their end; returns "active"."""
    sample, bookkeeping = GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync

    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        self.metier_drawn = {
            row: (generator, generator.get_state())
            for row in np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0].tolist()
            if (generator := self.input_batch.generators.get(row)) is not None
        }
        return sample(self, logits, spec_decode_metadata)

    def _bookkeeping_sync(self: Any, *arguments: Any, **named: Any) -> Any:
        generators = self.input_batch.generators
        for row, (generator, state) in self.metier_drawn.items():
            generator.set_state(state)
            del generators[row]
        try:
            return bookkeeping(self, *arguments, **named)
        finally:
            generators.update({row: generator for row, (generator, _) in self.metier_drawn.items()})

    CPUModelRunner._sample = _sample
    CPUModelRunner._bookkeeping_sync = _bookkeeping_sync
    return "active"
