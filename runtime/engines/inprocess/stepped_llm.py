"""The stepping thread's side of an in-process engine: everything that touches vLLM."""

from __future__ import annotations

import threading
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

from ....agents.errors import EngineError, MetierError
from ....agents.messages import Usage
from ...meters.cpu_meter import CpuMeter
from ...settings.engine import EngineSettings
from ...slots.adapter import LoadedAdapter, SwapCost
from ..engine_errors import adapter_refused, ask_error, ask_failed, engine_closed
from ..vllm_calls import VllmAsks, VllmCall, lora_request
from ..vllm_environment import import_vllm
from .llm_engine import build_llm, collect_freed, free_llm
from .pending_ask import PendingAsk
from .scheduled_rows import ScheduledRows
from .stepping_thread import SteppingThread

__all__ = ["SteppedLLM"]

# An ask whose step failed runs once more, alone: if the step fails again, this ask is the one that breaks it.
_ATTEMPTS = 2


class SteppedLLM:
    """vLLM's LLMEngine with our asks in it. All methods run in the stepping thread but `write_off`.

    No exception of a step or of one ask's output ends the thread: it becomes the failure of the asks it
    belongs to. Whatever an ask costs is on an account of the `meter` until its reply, or `abandoned` (per
    role), takes it.
    """

    def __init__(self, name: str, settings: EngineSettings, thread: SteppingThread) -> None:
        self.meter = CpuMeter()
        self.rows = ScheduledRows()
        self.abandoned: dict[str, float] = {}
        self.asks = self.steps = self.loads = self.evictions = 0
        self.busy_s = 0.0
        self.start_s = self.start_cpu_s = 0.0
        self._name = name
        self._settings = settings
        self._thread = thread
        self._accounts = threading.Lock()
        self._llm: Any = None
        self._asks: VllmAsks
        self._live: dict[str, PendingAsk] = {}
        # After a failed step: asks that were in it run alone, one by one; the others are held back meanwhile.
        self._suspects: deque[PendingAsk] = deque()
        self._held: deque[PendingAsk] = deque()
        self._trial: PendingAsk | None = None

    # -- life --------------------------------------------------------------------------------------------

    def build(self, weights: Path, adapters: bool, dtype: str) -> None:
        """Import vLLM if need be and build the engine; raises whatever vLLM raises."""
        began_s = time.monotonic()
        import_vllm(threads=self._settings.thread_count, in_process=True)
        SteppingThread.stop_at_exit()
        import vllm.v1.engine.llm_engine  # noqa: F401 - imports happen once per process and are no engine's own cost

        self._thread.lap()
        self._llm = build_llm(weights, self._settings, adapters=adapters, dtype=dtype)
        context_tokens = self._llm.model_config.max_model_len
        self._asks = VllmAsks(self._llm.get_tokenizer(), self._settings, context_tokens=context_tokens)
        self.rows.watch(self._llm.engine_core.engine_core.scheduler)
        self._thread.attach(self)
        self.start_s = time.monotonic() - began_s
        self.start_cpu_s = self._thread.lap()

    def dismantle(self) -> None:
        """Abort everything and free this engine's memory, leaving vLLM's process-wide state to the others."""
        self._thread.detach(self)
        self._fail_all(engine_closed(self._name))
        llm, self._llm = self._llm, None
        if llm is None:
            return
        free_llm(llm)
        self.rows.unwatch()
        del llm
        collect_freed()

    # -- stepping ----------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """See `Steppable`."""
        return bool(self._live or self._suspects or self._held)

    def give_up(self, error: Exception) -> None:
        """See `Steppable`."""
        self._fail_all(
            EngineError(
                f"engine {self._name!r} stopped on {error!r}",
                expected="an engine that steps",
                remedy="Report it, with the traceback in the log; open a new session meanwhile.",
            )
        )

    def charge_idle(self, cpu_s: float) -> None:
        """See `Steppable`."""
        self.meter.charge_overhead(cpu_s)

    def step(self) -> None:
        """See `Steppable`."""
        self._admit_waiting()
        self.rows.clear()
        outputs: list[Any] = []
        failure: Exception | None = None
        began_s = time.monotonic()
        try:
            outputs = self._llm.step()
        except Exception as error:
            failure = error
        self.busy_s += time.monotonic() - began_s
        self.steps += 1
        rows = self.rows.of_last_step()
        self.meter.charge_step(rows, self._thread.lap())
        mailboxes = {pending.mailbox for pending in self._live.values()}
        if failure is not None:
            self._quarantine(failure, {str(row.key) for row in rows} or set(self._live))
        for output in outputs:
            pending = self._live.get(output.request_id)
            if pending is not None:
                try:
                    self._deliver(pending, output)
                except Exception as error:
                    self._fail(pending, ask_failed(pending.request.ask, error))
        for mailbox in mailboxes:
            mailbox.flush()

    def admit(self, pending: PendingAsk) -> None:
        """Take an ask in now, or hold it while a suspect of a failed step runs alone."""
        if self._llm is None:
            self._fail(pending, engine_closed(self._name))
        elif pending.gone:
            return
        elif self._trial is not None or self._suspects:
            self._held.append(pending)
        else:
            self._hand_over(pending)
        pending.mailbox.flush()

    def abandon(self, pending: PendingAsk) -> None:
        """Abort an ask whose asker is gone; a reply that came too late is written off too."""
        if pending.late is not None:
            self._account(pending, pending.late)
            pending.late = None
        elif not pending.gone:
            running = pending.key in self._live
            self._write_off(pending)
            if running:
                self._llm.abort_request([pending.vllm_id], internal=True)
            for waiting in (self._held, self._suspects):
                if pending in waiting:
                    waiting.remove(pending)
        pending.mailbox.flush()

    def _hand_over(self, pending: PendingAsk) -> None:
        """Pass an ask to vLLM; an error fails this ask only."""
        ask = pending.request.ask
        try:
            call = pending.call = self._asks.prepare(pending.request, stream=pending.on_text is not None)
            pending.vllm_id = self._llm.add_request(
                pending.key, call.prompt, call.params, lora_request=call.lora, priority=ask.priority
            )
            if ask.answer_schema is not None:
                self._begin_grammar(pending.vllm_id, call)
        except Exception as error:
            self._fail(pending, ask_error(ask, error))
        else:
            self._live[pending.key] = pending
            self.rows.name(pending.vllm_id, pending.key)
        self.meter.charge(pending.key, self._thread.lap())
        if pending.gone:
            self._account(pending, Usage(cpu_s=self.meter.take(pending.key)))

    def _begin_grammar(self, vllm_id: str, call: VllmCall) -> None:
        """Say where a request's grammar begins. AsyncLLM takes this with the ask."""
        structured = self._llm.engine_core.engine_core.scheduler.requests[vllm_id].structured_output_request
        for name, value in call.grammar.items():
            setattr(structured, name, value)

    def _deliver(self, pending: PendingAsk, output: Any) -> None:
        """Pass on what a step wrote for one ask: a piece of its text, or its whole reply."""
        call = pending.call
        assert call is not None
        pending.stream(call.read(output))
        if not output.finished and not call.reader.full:
            return
        if not output.finished:
            self._llm.abort_request([pending.vllm_id], internal=True)
        try:
            reason = call.finish_reason(output)
        except EngineError as error:
            self._fail(pending, error)
            return
        cpu_s = self.meter.take(pending.key)
        reply = call.reply(output, reason, submitted_s=pending.submitted_s, cpu_s=cpu_s, engine=self._name)
        self._forget(pending)
        pending.late = reply.usage
        self.asks += 1
        pending.mailbox.post(partial(pending.promise.succeed, reply))

    # -- failures ----------------------------------------------------------------------------------------

    def _fail(self, pending: PendingAsk, error: MetierError) -> None:
        """End an ask with an error; its usage is added to its role's abandoned account."""
        self._write_off(pending)
        pending.mailbox.post(partial(pending.promise.fail, error))

    def _fail_all(self, error: MetierError) -> None:
        for pending in [*self._live.values(), *self._held, *self._suspects]:
            self._fail(pending, error)
            pending.mailbox.flush()
        self._held.clear()
        self._suspects.clear()

    def _write_off(self, pending: PendingAsk) -> None:
        if pending.gone:
            return
        used = self._used_tokens(pending)
        self._forget(pending)
        self._account(pending, Usage(cpu_s=self.meter.take(pending.key), **used))

    def _used_tokens(self, pending: PendingAsk) -> dict[str, int]:
        """Tokens that an ask without a reply has had: by the scheduler while it has it, else by what was delivered."""
        call = pending.call
        if call is None:
            return {}
        prompt_tokens = len(call.prompt_ids)
        thinking, answer = call.reader.thinking_tokens, call.reader.answer_tokens
        known = {"prompt_tokens": prompt_tokens, "thinking_tokens": thinking, "answer_tokens": answer}
        if self._llm is None or not pending.vllm_id:
            return known
        request = self._llm.engine_core.engine_core.scheduler.requests.get(pending.vllm_id)
        state = self._llm.output_processor.request_states.get(pending.vllm_id)
        if request is None or state is None:
            return known
        # Who has counted the prompt depends on whether it is done: the scheduler hands it over with the first token.
        prefill = request.prefill_stats
        cached_tokens = state.num_cached_tokens if prefill is None else prefill.num_cached_tokens
        return {
            "prompt_tokens": min(request.num_computed_tokens, prompt_tokens),
            "cached_tokens": cached_tokens,
            "thinking_tokens": thinking,
            "answer_tokens": max(request.num_output_tokens - thinking, answer),
        }

    def _account(self, pending: PendingAsk, usage: Usage) -> None:
        self.write_off(pending.request.ask.role, usage.cpu_s)
        if pending.request.on_abandoned is not None:
            pending.mailbox.post(partial(pending.request.on_abandoned, pending.request.ask, usage))

    def write_off(self, role: str, cpu_s: float) -> None:
        """See `Engine.write_off`; callable from any thread."""
        with self._accounts:
            # A new dict each time: others copy it while we write.
            self.abandoned = {**self.abandoned, role: self.abandoned.get(role, 0.0) + cpu_s}

    def _forget(self, pending: PendingAsk) -> None:
        pending.gone = True
        self._live.pop(pending.key, None)
        self.rows.forget(pending.vllm_id)
        if self._trial is pending:
            self._trial = None

    def _quarantine(self, error: Exception, blamed: set[str]) -> None:
        """After a failed step: each ask that was in it runs once more, alone; the others wait meanwhile.

        vLLM loses the requests of a step that raises, so all are withdrawn. The one that breaks the step when
        it is alone fails with the error; the others get their replies.
        """
        self._trial = None
        withdrawn = list(self._live.values())
        self._live.clear()
        self._llm.abort_request([p.vllm_id for p in withdrawn], internal=True)
        for pending in withdrawn:
            self.rows.forget(pending.vllm_id)
            if pending.key not in blamed:
                self._held.append(pending)
                continue
            pending.failures += 1
            if pending.failures < _ATTEMPTS:
                self._suspects.append(pending)
            else:
                self._fail(pending, ask_failed(pending.request.ask, error))

    def _admit_waiting(self) -> None:
        """Admit the next ask of a failed step when nothing else runs; then, when none is left, the held asks."""
        if self._suspects and not self._live:
            self._trial = self._suspects.popleft()
            self._trial.begin_again()
            self._hand_over(self._trial)
        while self._held and self._trial is None and not self._suspects:
            pending = self._held.popleft()
            pending.begin_again()
            self._hand_over(pending)

    # -- adapters ----------------------------------------------------------------------------------------

    def load_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        """See `Engine.add_adapter`."""
        began_s = time.monotonic()
        self.meter.carry_over(self._thread.lap())
        self._asks.trex.admit(adapter)
        try:
            loaded = self._llm.add_lora(lora_request(adapter))
        except Exception as error:
            # vLLM keeps a half-loaded adapter registered and would answer "loaded" the next time.
            self._llm.remove_lora(adapter.number)
            self._asks.trex.drop(adapter)
            self.meter.carry_over(self._thread.lap())
            raise adapter_refused(adapter, str(error)) from error
        if not loaded:
            raise adapter_refused(adapter, "it answers that nothing was loaded")
        self.loads += 1
        return self._swap_cost(began_s)

    def unload_adapter(self, adapter: LoadedAdapter) -> SwapCost:
        """See `Engine.remove_adapter`."""
        began_s = time.monotonic()
        self.meter.carry_over(self._thread.lap())
        self._llm.remove_lora(adapter.number)
        self._asks.trex.drop(adapter)
        self.evictions += 1
        return self._swap_cost(began_s)

    def _swap_cost(self, began_s: float) -> SwapCost:
        cpu_s = self._thread.lap()
        # On the total now; the ask that caused the swap bears it (AdapterLease).
        self.meter.total_s += cpu_s
        return SwapCost(wall_s=time.monotonic() - began_s, cpu_s=cpu_s)
