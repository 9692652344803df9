"""From an ask to vLLM and back: engine arguments, sampling parameters, prompts, usage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...agents.errors import AskRejectedError, EngineError
from ...agents.messages import Ask, Usage
from ..plugin.budget_forcing import ThinkingRules
from ..plugin.wire import FIER_KEY, INTUITION_KEY, LOGITS_PROCESSOR, REASONING_PARSER, THINKING_KEY, plugin_wanted
from ..settings.engine import EngineSettings

__all__ = ["engine_arguments", "finish_reason", "prompt_token_ids", "rejected", "sampling_params", "stopwatch_usage"]


def engine_arguments(weights: Path, *, dtype: str, settings: EngineSettings, adapters: bool) -> Any:
    """vLLM's own arguments for an engine on the checkpoint in `weights`.

    Without `adapters` the engine starts with no LoRA layers at all, which is faster at every step.
    """
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    lora: dict[str, Any] = {}
    if adapters:
        # As many on the CPU side as in slots: eviction is decided in AdapterSlots, never behind its back.
        lora = {
            "enable_lora": True,
            "max_loras": settings.adapter_slots,
            "max_cpu_loras": settings.adapter_slots,
            "max_lora_rank": settings.slot_rank,
        }
    ours = plugin_wanted()
    context_tokens = min(settings.max_model_tokens, _context_tokens(weights) or settings.max_model_tokens)
    _check_retrieval(settings, context_tokens)
    return AsyncEngineArgs(
        model=str(weights),
        tokenizer=str(weights),
        dtype=settings.dtype if dtype == "auto" else dtype,
        seed=0,
        max_model_len=context_tokens,
        max_num_seqs=settings.max_running,
        max_num_batched_tokens=max(settings.max_batch_tokens, settings.max_running),
        kv_cache_memory_bytes=int((settings.kv_cache_mib << 20) / (1 + _beside_cache(weights, dtype, settings))),
        block_size=settings.block_tokens,
        enable_prefix_caching=True,
        scheduling_policy="priority",
        # A step's rows are then those just scheduled, which is what the meter splits its cost over.
        async_scheduling=False,
        enforce_eager=settings.runs_eagerly,
        tensor_parallel_size=settings.tensor_parallel,
        data_parallel_size=settings.data_parallel,
        disable_log_stats=False,
        use_tqdm_on_load=False,
        # Small models pad JSON with newlines for ever if the grammar lets them.
        structured_outputs_config=StructuredOutputsConfig(
            backend="xgrammar", disable_any_whitespace=True, reasoning_parser=REASONING_PARSER if ours else ""
        ),
        logits_processors=[LOGITS_PROCESSOR] if ours else None,
        additional_config={} if settings.fier is None else {FIER_KEY: settings.fier.model_dump()},
        **lora,
    )


def _beside_cache(weights: Path, dtype: str, settings: EngineSettings) -> float:
    """Memory that attention needs beside the key-value cache, as a share of it."""
    if settings.fier is None:
        return 0.0
    config = _text_config(weights)
    asked = settings.dtype if dtype == "auto" else dtype
    asked = config.get("dtype", config.get("torch_dtype", "bfloat16")) if asked == "auto" else asked
    return settings.fier.cache_share(int(config["num_hidden_layers"]), 4 if asked == "float32" else 2)


def _check_retrieval(settings: EngineSettings, context_tokens: int) -> None:
    """Raise EngineError where an engine is to retrieve and cannot, or has nothing to retrieve from."""
    if settings.fier is None:
        return
    if not plugin_wanted():
        raise EngineError(
            "attention 'fier' is asked for, and METIER_PLUGIN=0 keeps our plugin out of vLLM",
            expected="the plugin",
            remedy="Unset METIER_PLUGIN, or use a variant with stock attention.",
        )
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise EngineError(
            f"attention 'fier' is asked for on {current_platform.device_type}",
            expected="a CPU engine: its GPU kernels are in no backend yet",
            remedy="Use a variant with stock attention here.",
        )
    if settings.fier.budget_tokens >= context_tokens:
        raise EngineError(
            f"budget_tokens {settings.fier.budget_tokens} of attention 'fier', in a context of {context_tokens} tokens",
            expected=f"fewer than {context_tokens}: all tokens would be read, which stock attention does faster",
            remedy="Lower the budget, raise max_model_tokens if the model has the context, or use stock attention.",
        )
    if settings.block_tokens % settings.fier.group_tokens:
        raise EngineError(
            f"group_tokens {settings.fier.group_tokens} of attention 'fier' with block_tokens {settings.block_tokens}",
            expected="blocks of whole groups",
            remedy="Set block_tokens to 128, or make the variant with smaller groups.",
        )


def _context_tokens(weights: Path) -> int | None:
    """The context the model was made for, None where its configuration does not say."""
    value = _text_config(weights).get("max_position_embeddings")
    return None if value is None else int(value)


def _text_config(weights: Path) -> dict[str, Any]:
    """A checkpoint's configuration; what multimodal ones say of their language model stands for the whole."""
    config: dict[str, Any] = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    return {**config.get("text_config", {}), **config}


def sampling_params(
    ask: Ask, *, stream: bool, intuition: tuple[float, ...] | None = None, rules: ThinkingRules | None = None
) -> Any:
    """vLLM's sampling parameters for an ask; pieces as they come when `stream`, else the whole at the end.

    A T-REX adapter's semantic vector and the `rules` of an ask that thinks travel in them too: they are what vLLM
    brings to its workers with a request. The reply of such an ask always comes in pieces, and may have its thinking
    before the answer's `max_tokens`; who reads it ends it when the answer has had its own.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    schema = ask.answer_schema
    extra: dict[str, Any] = {} if intuition is None else {INTUITION_KEY: list(intuition)}
    thinking_tokens = 0
    if rules is not None:
        extra[THINKING_KEY] = rules.to_plain()
        thinking_tokens = rules.profile.max_tokens + len(rules.close_ids)
    return SamplingParams(
        max_tokens=ask.max_tokens + thinking_tokens,
        temperature=ask.temperature,
        top_p=ask.top_p,
        seed=ask.seed,
        logprobs=0 if ask.confidence else None,  # of the sampled token alone
        structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
        output_kind=RequestOutputKind.DELTA if stream or rules is not None else RequestOutputKind.FINAL_ONLY,
        extra_args=extra or None,
        skip_special_tokens=rules is None,  # the end tag may be a special token, and is looked for in the text
    )


def prompt_token_ids(tokenizer: Any, ask: Ask, *, context_tokens: int) -> list[int]:
    """Token ids of an ask's messages in the model's chat template, with the answer's opening.

    Raises: AskRejectedError when the template refuses the messages or the prompt leaves no room for an answer.
    """
    messages = [{"role": m.role, "content": m.content} for m in ask.messages]
    try:
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates raise whatever their author wrote
        raise rejected(ask, f"its messages do not fit the model's chat template: {error}") from error
    if len(ids) >= context_tokens:
        raise AskRejectedError(
            f"the prompt of role {ask.role!r} at step {ask.step_path!r} has {len(ids)} tokens",
            expected=f"fewer than {context_tokens}, the engine's context",
            remedy="Shorten the inputs, or raise max_model_tokens if the model has the context for it.",
        )
    return ids


def rejected(ask: Ask, reason: str) -> AskRejectedError:
    """The error for an ask that vLLM refuses."""
    return AskRejectedError(
        f"the ask of role {ask.role!r} at step {ask.step_path!r} is refused: {reason}",
        expected="a prompt, answer schema and sampling settings the engine can serve",
        remedy="Change the role's inputs, its answer type or its limits.",
    )


def finish_reason(ask: Ask, reason: str | None) -> Any:
    """The reply's finish reason; raises EngineError for anything but a natural end."""
    if reason in ("stop", "length"):
        return reason
    raise EngineError(
        f"the engine ended the ask of role {ask.role!r} at step {ask.step_path!r} with {reason!r}",
        expected="'stop' or 'length'",
        remedy="Look at the engine's log; a grammar that rejects the model's own tokens is the usual cause.",
    )


def stopwatch_usage(
    output: Any, *, submitted_s: float, answer_tokens: int, cpu_s: float, thinking_tokens: int = 0
) -> Usage:
    """Usage of a finished request from vLLM's timestamps.

    `submitted_s` is when the ask reached us, on the monotonic clock that vLLM's own timestamps use, so that
    waiting for the step under way counts as queueing.
    """
    stats = output.metrics
    return Usage(
        prompt_tokens=len(output.prompt_token_ids),
        cached_tokens=output.num_cached_tokens or 0,
        thinking_tokens=thinking_tokens,
        answer_tokens=answer_tokens,
        queue_s=max(stats.scheduled_ts - submitted_s, 0.0),
        prefill_s=max(stats.first_token_ts - stats.scheduled_ts, 0.0),
        decode_s=max(stats.last_token_ts - stats.first_token_ts, 0.0),
        cpu_s=cpu_s,
    )
