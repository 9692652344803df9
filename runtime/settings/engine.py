"""How an engine is started: memory, batch and slot sizes, threads, and the bounds on queues and restarts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from ...agents.thinking import ThinkingTags
from ...specializers.shelf.fier_settings import FierSettings

__all__ = ["EngineSettings", "SlotRank"]

SlotRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]


class EngineSettings(BaseModel):
    """What every engine of a pool is started with; unknown fields and values out of range are refused.

    Sizes: `kv_cache_mib` is the memory of one engine's key-value cache; vLLM would otherwise ask for most of
    the machine. `max_model_tokens` bounds prompt plus answer (a model with a shorter context lowers it),
    `max_batch_tokens` the tokens of one step, `max_running` the asks of one step. `block_tokens` is the unit
    of the prefix cache: vLLM's own 128 on CPU would never let a short prompt hit.

    Adapters: at most `adapter_slots` are resident, each with room for `slot_rank` rows (vLLM's list of ranks);
    where nobody set it, for the widest adapter that is known when the engines start. While asks wait for a slot, at
    most `adapter_pass_asks` others may overtake the first of them with adapters that are already resident. With
    `foresight` the slots know from the graph what the runs will ask for within `foresight_asks` asks: the adapter
    needed last is evicted, one needed within `pin_asks` asks is kept if anything else will do, one needed within
    `prefetch_asks` asks is loaded ahead into a slot that nobody needs, and asks of one adapter run together. Keep
    `foresight_asks` above the asks of a loop's round, or its adapters look alike.

    Bounds: `ask_queue_limit` asks are inside one engine at a time, the rest wait in the pool in order.
    A supervised engine has `start_timeout_s` to become ready and `close_timeout_s` to go; one that dies is
    restarted at most `restart_limit` times within `restart_window_s`.

    Attention: `fier` makes every engine retrieve (CPU only); a variant's own settings win. What it keeps beside the
    key-value cache comes out of `kv_cache_mib`.

    Thinking: `thinking_tags` is the text that the models in use were trained to think between.

    Device: `dtype` holds where the variant says `auto`. `threads` is the number of CPU threads, None for all
    this process may use. `eager` skips torch.compile: no minute of compiling when a model is first started, and
    every step about a quarter slower; None skips it only where there is no C++ compiler. `tensor_parallel` and
    `data_parallel` pass through to vLLM, for engines in processes of their own on GPU machines; not run by us.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv_cache_mib: int = Field(default=512, ge=1)
    max_model_tokens: int = Field(default=2048, ge=16)
    max_batch_tokens: int = Field(default=2048, ge=16)
    max_running: int = Field(default=16, ge=1)
    block_tokens: Literal[16, 32, 64, 128] = 32

    adapter_slots: int = Field(default=4, ge=1)
    slot_rank: SlotRank = 16
    adapter_pass_asks: int = Field(default=32, ge=0)
    foresight: bool = True
    foresight_asks: int = Field(default=16, ge=1, le=256)
    pin_asks: int = Field(default=2, ge=0)
    prefetch_asks: int = Field(default=1, ge=0)

    ask_queue_limit: int = Field(default=1024, ge=1)
    start_timeout_s: float = Field(default=300.0, gt=0)
    close_timeout_s: float = Field(default=20.0, gt=0)
    restart_limit: int = Field(default=3, ge=0)
    restart_window_s: float = Field(default=600.0, gt=0)

    fier: FierSettings | None = None

    thinking_tags: ThinkingTags = ThinkingTags()

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    eager: bool | None = None
    tensor_parallel: int = Field(default=1, ge=1)
    data_parallel: int = Field(default=1, ge=1)

    def with_room_for(self, ranks: Iterable[int]) -> EngineSettings:
        """These settings with slots wide enough for adapters of these ranks, unless `slot_rank` was set by somebody."""
        if "slot_rank" in self.model_fields_set:
            return self
        known: tuple[int, ...] = get_args(SlotRank)
        wanted = min(max([self.slot_rank, *ranks]), known[-1])
        return self.model_copy(update={"slot_rank": next(rank for rank in known if rank >= wanted)})

    @property
    def one_process(self) -> bool:
        """Whether scheduler and model share a process: several devices need a worker each."""
        return self.tensor_parallel == self.data_parallel == 1

    @property
    def runs_eagerly(self) -> bool:
        """Whether engines skip torch.compile, which needs a C++ compiler on the CPU."""
        return shutil.which("g++") is None if self.eager is None else self.eager

    @property
    def thread_count(self) -> int:
        """CPU threads an engine computes with."""
        return self.threads or len(os.sched_getaffinity(0))
