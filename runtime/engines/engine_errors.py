"""The errors of an engine when vLLM refuses an ask, an adapter or a checkpoint, or fails on it."""

from __future__ import annotations

from pathlib import Path

from ...agents.errors import AdapterError, AskRejectedError, EngineError, MetierError, NotFiniteError
from ...agents.messages import Ask
from ..slots.adapter import LoadedAdapter
from .ended_processes import cause_of

__all__ = ["adapter_refused", "ask_error", "ask_failed", "engine_closed", "not_finite", "not_started", "rejected"]


def rejected(ask: Ask, reason: str) -> AskRejectedError:
    """The error for an ask that vLLM refuses."""
    return AskRejectedError(
        f"the ask of role {ask.role!r} at step {ask.step_path!r} is refused: {reason}",
        expected="a prompt, answer schema and sampling settings the engine can serve",
        remedy="Change the role's inputs, its answer type or its limits.",
    )


def ask_failed(ask: Ask, error: Exception) -> EngineError:
    """The error for an ask on which the engine failed; `error` is its cause."""
    failure = EngineError(
        f"the engine failed on the ask of role {ask.role!r} at step {ask.step_path!r}: {error!r}",
        expected="a step that runs",
        remedy="The ask's schema or adapter is the likely cause.",
    )
    failure.__cause__ = error
    return failure


def ask_error(ask: Ask, error: Exception) -> MetierError:
    """An exception of vLLM's intake as an error of ours: AskRejectedError where vLLM's validation raised it."""
    from vllm.exceptions import VLLMClientError

    if isinstance(error, MetierError):
        return error
    if isinstance(error, VLLMClientError | ValueError | TypeError):
        refusal = rejected(ask, str(error))
        refusal.__cause__ = error
        return refusal
    return ask_failed(ask, error)


def adapter_refused(adapter: LoadedAdapter, reason: str) -> AdapterError:
    """The error for an adapter that vLLM does not load."""
    return AdapterError(
        f"the engine refuses adapter {adapter.id!r} in {adapter.path}: {reason}",
        expected="an adapter made for this base, of a rank the slots have room for",
        remedy="Verify the variant, or make it again with `metier make RECIPE.yaml`.",
    )


def not_started(weights: Path, error: Exception) -> EngineError:
    """The error for an engine on the checkpoint folder `weights` that vLLM does not build."""
    return EngineError(
        f"the engine on {weights} does not start: {cause_of(error)}",
        expected="a checkpoint and settings that vLLM accepts",
        remedy="Check the checkpoint's files, and engine.kv_cache_mib and engine.max_running against free memory.",
    )


def not_finite(ask: Ask, adapter: LoadedAdapter | None) -> NotFiniteError:
    """The error for an ask whose logits hold a value that is not finite."""
    served_by = "the model" if adapter is None else f"adapter {adapter.id!r}"
    return NotFiniteError(
        f"what {served_by} computes for the ask of role {ask.role!r} at step {ask.step_path!r} is not finite",
        expected="weights whose products stay within the range of the engine's dtype",
        remedy="Make the variant again with a lower learning_rate."
        if adapter
        else "Set engine.dtype=float32, or use another checkpoint.",
    )


def engine_closed(name: str) -> EngineError:
    """The error for an ask to an engine that was closed."""
    return EngineError(
        f"engine {name!r} is closed", expected="an open session", remedy="Ask inside `async with open_session`."
    )
