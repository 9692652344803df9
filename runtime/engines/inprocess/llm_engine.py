"""Building and freeing vLLM's LLMEngine in a process that goes on to do other things."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

from ...settings.engine import EngineSettings
from ..engine_arguments import engine_arguments

__all__ = ["build_llm", "collect_freed", "free_llm"]


def build_llm(weights: Path, settings: EngineSettings, *, adapters: bool, dtype: str) -> Any:
    """Build the engine, leaving the process's own settings as they were; raises whatever vLLM raises."""
    import torch
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    from ...plugin.process_groups import keep_process_groups

    keep_process_groups()
    set_num_threads, preload = torch.set_num_threads, os.environ.get("LD_PRELOAD")
    set_num_threads(settings.thread_count)
    args = engine_arguments(weights, dtype=dtype, settings=settings, adapters=adapters)
    try:
        config = args.create_engine_config()
        llm = LLMEngine(config, Executor.get_class(config), log_stats=True, multiprocess_mode=False)
    finally:
        # vLLM's CPU platform disables this function and sets this variable for the whole process; training
        # beside us needs the one, and programs started from this process should not inherit the other.
        torch.set_num_threads = set_num_threads
        os.environ.pop("LD_PRELOAD", None)
        if preload is not None:
            os.environ["LD_PRELOAD"] = preload
    # Prometheus and log lines per step are for servers; timestamps in the outputs need only log_stats.
    llm.logger_manager = None
    return llm


def free_llm(llm: Any) -> None:
    """Free an engine's memory, leaving vLLM's process-wide state to the others; the caller drops its reference."""
    # The finaliser would destroy the process groups that the other engines of this process stand on.
    llm.engine_core._finalizer.detach()
    core = llm.engine_core.engine_core
    core.structured_output_manager.clear_backend()
    core.scheduler.shutdown()
    core.model_executor.shutdown()


def collect_freed() -> None:
    """Give back the memory of a freed engine, once nothing refers to it."""
    # vLLM hides what exists at start from the garbage collector; without this the memory stays.
    gc.unfreeze()
    gc.collect()
