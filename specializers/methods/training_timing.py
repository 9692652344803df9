"""How fast adapters are trained on this machine, in a given number type and on so many threads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ...agents.errors import BaseModelError
from ..machine.machine import memory_bytes
from ..machine.measured_speed import Timing
from ..machine.threads import computing_on
from ..training.speed import kept_pages
from .adapter_training import load_base
from .lora import LoraSettings
from .method import Job
from .trained import add_lora, linear_targets

__all__ = ["time_training"]

ROWS, ROW_TOKENS, STEPS = 2, 96, 2
MOST_OF_MEMORY = 0.5


def time_training(model: Path, *, dtype: str, threads: int) -> Timing:
    """Passes of a LoRA over a few rows, forth and back; the best of some, after one that warms up.

    Raises: BaseModelError where the model in float32 would not fit.
    """
    import torch

    held = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if 2 * held > MOST_OF_MEMORY * memory_bytes():
        raise BaseModelError(f"{model.name} in float32 takes more than half of this machine's memory")
    settings = LoraSettings.model_validate({"method": "lora", "dtype": dtype})
    base = load_base(_job(model), settings)
    targets = linear_targets(base.model, "all-linear")
    tuned = add_lora(base.model, rank=8, alpha=16, dropout=0.0, targets=targets, seed=0)
    ids = torch.arange(ROWS * ROW_TOKENS).view(ROWS, ROW_TOKENS) % int(base.model.config.vocab_size)
    took = []
    with computing_on(threads), kept_pages():
        for _ in range(1 + STEPS):
            began_s, began_cpu_s = time.monotonic(), time.process_time()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=base.autocast):
                loss: Any = tuned(input_ids=ids, labels=ids).loss
            loss.backward()
            took.append((time.monotonic() - began_s, time.process_time() - began_cpu_s))
    seconds, cpu_s = (min(values) for values in zip(*took[1:], strict=True))
    return Timing(dtype=dtype, threads=threads, seconds=seconds, cpu_s=cpu_s)


def _job(model: Path) -> Job:
    nowhere = Path()
    return Job(
        model=model, base_name=model.name, adapter=None, rows=(), seed=0, out=nowhere, work_dir=nowhere, fingerprint=""
    )
