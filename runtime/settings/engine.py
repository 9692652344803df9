"""How an engine is started: memory, batch and slot sizes, threads, and the bounds on queues and restarts."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Literal, Self, get_args

from pydantic import Field, JsonValue, model_validator

from ...agents.chat.chat_template import TemplateSettings
from ...agents.frozen_model import FrozenModel
from ...agents.thinking import ThinkingTags
from ...specializers.machine.threads import usable_cores
from ...specializers.shelf.fier_settings import FierSettings

__all__ = ["EngineSettings", "SlotRank"]

SlotRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]


class EngineSettings(FrozenModel):
    """What every engine of a pool is started with.

    >>> EngineSettings(kv_cache_mib=1024).with_room_for([8, 24]).slot_rank
    32
    """

    kv_cache_mib: int = Field(default=512, ge=1)
    """Memory of one engine's key-value cache, in MiB. Without it vLLM would ask for most of the machine."""

    max_model_tokens: int = Field(default=2048, ge=16)
    """Most tokens of prompt and answer together. A model with a shorter context lowers it."""

    max_batch_tokens: int = Field(default=2048, ge=16)
    """Most tokens that one engine step computes."""

    max_running: int = Field(default=16, ge=1)
    """Most asks that one engine step works on."""

    block_tokens: Literal[16, 32, 64, 128] = 32
    """Tokens of one block of the prefix cache. With vLLM's own 128 on CPU a short prompt would never be found in it."""

    adapter_slots: int = Field(default=4, ge=1)
    """Adapters that one engine holds at a time."""

    slot_rank: SlotRank = 16
    """Rows of one adapter slot, from vLLM's list of ranks. Where it is not set, slots are as wide as the widest adapter
    known when the engines start."""

    adapter_pass_asks: int = Field(default=32, ge=0)
    """While asks wait for a slot, this many others with resident adapters may overtake the first of them."""

    foresight: bool = True
    """Whether the slots learn from the graph which adapters the runs will use. The adapter needed last is then evicted,
    and asks of one adapter run together."""

    foresight_asks: int = Field(default=16, ge=1, le=256)
    """How many asks ahead the slots look. Keep it above the asks of a loop's round, or all adapters of the loop look
    alike."""

    pin_asks: int = Field(default=2, ge=0)
    """An adapter that is needed within this many asks stays in its slot as long as another can go."""

    prefetch_asks: int = Field(default=1, ge=0)
    """An adapter that is needed within this many asks is loaded ahead into a slot that no ask needs."""

    ask_queue_limit: int = Field(default=1024, ge=1)
    """Asks inside one engine at a time. Further ones wait in the pool, in order."""

    start_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds that an engine in a process of its own has to become ready."""

    close_timeout_s: float = Field(default=20.0, gt=0)
    """Seconds that an engine in a process of its own has to end."""

    hang_timeout_s: float = Field(default=30.0, ge=0.5)
    """Seconds within which an engine in a process of its own is noticed to hang, when it neither answers between two
    steps nor uses CPU time. It is then killed and started again as one that died."""

    step_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that such an engine may compute without answering. Longer counts as hanging, whatever CPU time it uses.
    Raise it where a step of `max_batch_tokens` takes that long."""

    restart_limit: int = Field(default=3, ge=0)
    """How often an engine that dies or hangs is restarted within `restart_window_s`."""

    restart_window_s: float = Field(default=600.0, gt=0)
    """Seconds over which restarts are counted."""

    fier: FierSettings | None = None
    """Retrieval attention for every engine (CPU only). A variant's own settings win. What it keeps comes out of
    `kv_cache_mib`."""

    thinking_tags: ThinkingTags | None = None
    """The text that the models in use were trained to think between. None reads it from their chat templates. `metier
    make` trains with it, too, and an adapter that was trained with tags set here is served with those only."""

    chat_template_args: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of the models' chat templates, such as `{enable_thinking: false}`. `metier make` trains with them, too,
    and an adapter is served with those it was trained with. A role's `thinking` goes before `enable_thinking`."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number type of the weights where the variant says `auto`. `auto` here too is what this machine computes fastest,
    as `metier doctor --measure` found it; without that, bfloat16 where the processor has instructions for it, else
    float32. On GPUs, and for quantised weights whose kernels take few types, vLLM decides."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of an engine. None is as many as `metier doctor --measure` found worth it; without that, all that
    this process may use."""

    eager: bool | None = None
    """Whether to skip torch.compile. That saves a minute when a model is first started and makes every step about a
    quarter slower. None skips it only where there is no C++ compiler."""

    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that share each layer. Passed on to vLLM, for engines in processes of their own; we have not run it."""

    data_parallel: int = Field(default=1, ge=1)
    """Copies of the model that share the asks of one engine. Passed on to vLLM; we have not run it."""

    @model_validator(mode="after")
    def _template_can_be_written(self) -> Self:
        TemplateSettings(args=self.chat_template_args)
        return self

    def __hash__(self) -> int:  # the generated one cannot take template arguments
        return hash(self.model_dump_json())

    @property
    def template(self) -> TemplateSettings:
        """How the models' chat templates are written."""
        return TemplateSettings(args=self.chat_template_args, tags=self.thinking_tags)

    def with_room_for(self, ranks: Iterable[int]) -> EngineSettings:
        """These settings with slots wide enough for adapters of these ranks, unless `slot_rank` was set."""
        if "slot_rank" in self.model_fields_set:
            return self
        known: tuple[int, ...] = get_args(SlotRank)
        wanted = min(max([self.slot_rank, *ranks]), known[-1])
        return self.model_copy(update={"slot_rank": next(rank for rank in known if rank >= wanted)})

    @property
    def beat_every_s(self) -> float:
        """Seconds between two signs of life of an engine in a process of its own."""
        return self.hang_timeout_s / 10

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
        return self.threads or usable_cores()
