"""How many tokens each ask had in the last engine step, read from vLLM's scheduler."""

from __future__ import annotations

import inspect
from typing import Any

from ....agents.errors import PluginError
from ...meters.cpu_meter import StepRow

__all__ = ["ScheduledRows"]


class ScheduledRows:
    """Watches a vLLM scheduler and keeps what it scheduled last, under our own names for the requests."""

    def __init__(self) -> None:
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self._names: dict[str, str] = {}
        self._output: Any = None
        self._scheduler: Any = None

    def watch(self, scheduler: Any) -> None:
        """Wrap `scheduler.schedule`; raises PluginError when its signature is not the known one."""
        schedule = getattr(scheduler, "schedule", None)
        if schedule is None or list(inspect.signature(schedule).parameters) != ["throttle_prefills"]:
            raise PluginError(
                f"{type(scheduler).__name__}.schedule is not the method the meter listens to",
                expected="schedule(throttle_prefills)",
                remedy="Install the vLLM series this project names.",
            )

        def listening(*args: Any, **kwargs: Any) -> Any:
            self._output = schedule(*args, **kwargs)
            return self._output

        scheduler.schedule = listening
        self._scheduler = scheduler

    def unwatch(self) -> None:
        """Restore the scheduler's own method."""
        if self._scheduler is not None:
            del self._scheduler.schedule
            self._scheduler = self._output = None

    def name(self, vllm_id: str, key: str) -> None:
        """Map the id of a request of vLLM's to our key."""
        self._names[vllm_id] = key

    def forget(self, vllm_id: str) -> None:
        """The request has ended."""
        self._names.pop(vllm_id, None)

    def clear(self) -> None:
        """Before a step: nothing is scheduled yet."""
        self._output = None

    def of_last_step(self) -> list[StepRow]:
        """Rows of the step since `clear`; also adds them to the token counts. Empty when none was scheduled."""
        output, self._output = self._output, None
        if output is None:
            return []
        new = {request.req_id for request in output.scheduled_new_reqs}
        rows = []
        for vllm_id, tokens in output.num_scheduled_tokens.items():
            prefill = vllm_id in new or output.scheduled_cached_reqs.is_context_phase(vllm_id)
            key = self._names.get(vllm_id, vllm_id)
            rows.append(StepRow(key, prefill_tokens=tokens) if prefill else StepRow(key, decode_tokens=tokens))
            if prefill:
                self.prefill_tokens += tokens
            else:
                self.decode_tokens += tokens
        return rows
