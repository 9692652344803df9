"""An ask on its way into vLLM, and the Reply made of what comes out: the same for every form of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...agents.answers.held_schema import xgrammar_schema
from ...agents.chat.chat_template import ChatTemplate
from ...agents.errors import AskRejectedError, ChatTemplateError, ContextError, EngineError
from ...agents.messages import Ask, Reply, Usage
from ...agents.sampling import TokenChance, WrittenToken
from ..plugin.thinking.budget_forcing import ThinkingRules
from ..plugin.wire import INTUITION_KEY, THINKING_KEY, plugin_wanted
from ..settings.engine import EngineSettings
from ..slots.adapter import LoadedAdapter
from .engine import EngineRequest
from .engine_errors import not_finite
from .thinking_asks import ReplyReader, ThinkingAsks
from .trex_asks import TrexAdapters, cache_salt

__all__ = ["VllmAsks", "VllmCall", "finish_reason", "lora_request", "prompt_token_ids", "sampling_params"]

IMPOSSIBLE = -9999.0
"""Stands for the log-probability of what cannot be, which JSON has no number for."""


class VllmAsks:
    """Turns the asks of one engine into calls of vLLM, in the process that builds its prompts.

    `trex` knows which of the engine's adapters are T-REX ones, `thinking` the thinking tags in tokens of its model.
    """

    def __init__(self, tokenizer: Any, settings: EngineSettings, *, context_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, settings.template)
        self.thinking = ThinkingAsks(self.template, context_tokens=context_tokens)
        self.trex = TrexAdapters(settings)
        self._context_tokens = context_tokens

    def prepare(self, request: EngineRequest, *, stream: bool) -> VllmCall:
        """The call for a request; its reply comes piece by piece when `stream`.

        Raises: AskRejectedError when this engine cannot serve the ask, SettingsError when its tokenizer loses the
        thinking tags, and whatever vLLM's sampling parameters raise.
        """
        from vllm.inputs.engine import tokens_input

        ask, adapter = request.ask, request.adapter
        self.trex.check(request)
        ids = prompt_token_ids(self.template, ask, context_tokens=self._context_tokens)
        rules = self.thinking.rules(ask, len(ids))
        reader = self.thinking.reader(ask, rules)
        return VllmCall(
            request=request,
            prompt_ids=ids,
            prompt=tokens_input(ids, cache_salt=cache_salt(request)),
            params=sampling_params(
                ask,
                stream=stream or reader.in_pieces,
                intuition=request.intuition,
                rules=rules,
                end_of_turn=self.template.end_of_turn,
                special_tokens=reader.parts and self.template.tags_are_special,
            ),
            lora=None if adapter is None else lora_request(adapter),
            rules=rules,
            reader=reader,
        )


@dataclass(frozen=True, eq=False)
class VllmCall:
    """One ask as vLLM gets it, and the reader of its reply.

    `prompt`, `params` and `lora` are vLLM's own objects; `rules` is None for an ask that does not think. An ask that
    has to run again needs a new call.
    """

    request: EngineRequest
    prompt_ids: list[int]
    prompt: Any
    params: Any
    lora: Any
    rules: ThinkingRules | None
    reader: ReplyReader

    @property
    def grammar(self) -> dict[str, Any]:
        """vLLM's arguments for where the grammar of the answer begins: at once, or behind the thinking."""
        return {
            "reasoning_ended": None if self.request.ask.answer_schema is None else self.rules is None,
            "reasoning_parser_kwargs": None if self.rules is None else {"close": self.rules.close},
        }

    def read(self, output: Any) -> str:
        """Read one of vLLM's outputs for this call; returns what of it belongs to the answer."""
        said = output.outputs[0]
        top = self.request.ask.sampling.logprobs
        written = () if top is None else _written_tokens(said, top)
        piece = self.reader.read(said.text, said.token_ids, last=output.finished, written=written)
        self.reader.note_logprob(said.cumulative_logprob)
        return piece

    def finish_reason(self, output: Any) -> Any:
        """Why the reply ended with `output`.

        An output that vLLM has not finished is the last one because the answer has all the tokens it may have.
        Raises: NotFiniteError when a value that decided a token was not finite, EngineError for any other end that is
        not a natural one.
        """
        if output.metrics.is_corrupted:
            raise not_finite(self.request.ask, self.request.adapter)
        if self.reader.stopped:
            return "stop"
        return finish_reason(self.request.ask, output.outputs[0].finish_reason if output.finished else "length")

    def reply(self, output: Any, reason: Any, *, submitted_s: float, cpu_s: float, engine: str) -> Reply:
        """The reply that ended with `output`, in which thinking and answer are apart.

        `submitted_s` is when the ask reached the engine, on the monotonic clock that vLLM's own timestamps use, so
        that waiting for the step under way counts as queueing. `cpu_s` is what the ask has cost.
        """
        ask, adapter, reader, stats = self.request.ask, self.request.adapter, self.reader, output.metrics
        usage = Usage(
            prompt_tokens=len(output.prompt_token_ids),
            cached_tokens=output.num_cached_tokens or 0,
            thinking_tokens=reader.thinking_tokens,
            answer_tokens=reader.answer_tokens,
            queue_s=max(stats.scheduled_ts - submitted_s, 0.0),
            prefill_s=max(stats.first_token_ts - stats.scheduled_ts, 0.0),
            decode_s=max(stats.last_token_ts - stats.first_token_ts, 0.0),
            cpu_s=cpu_s,
        )
        return Reply(
            text=reader.answer,
            thinking=reader.thinking,
            profile=ask.thinking,
            finish_reason=reason,
            grammar="" if ask.answer_schema is None else self.params.structured_outputs._backend or "",
            mean_logprob=reader.mean_logprob,
            logprobs=None if ask.sampling.logprobs is None else reader.written,
            usage=usage,
            variant=ask.variant if adapter is None else adapter.id,
            engine=engine,
        )


def lora_request(adapter: LoadedAdapter) -> Any:
    """vLLM's request for an adapter."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(adapter.id, adapter.number, str(adapter.path))


def sampling_params(
    ask: Ask,
    *,
    stream: bool,
    intuition: tuple[float, ...] | None = None,
    rules: ThinkingRules | None = None,
    end_of_turn: int | None = None,
    special_tokens: bool = False,
) -> Any:
    """vLLM's sampling parameters for an ask; pieces as they come when `stream`, else the whole at the end.

    Texts that stop the answer are not among them: `ReplyReader` ends it there, since thinking must not end there.
    The reply ends at `end_of_turn` as at the model's own end. Its text has the special tokens in it where it thinks,
    and with `special_tokens`: a tag may be one of them, and is looked for in the text.

    A T-REX adapter's semantic vector and the `rules` of an ask that thinks travel in them too: they are what vLLM
    brings to its workers with a request. The reply of such an ask always comes in pieces, and may have its thinking
    before the answer's `max_tokens`; who reads it ends it when the answer has had its own.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    schema, sampling = ask.answer_schema, ask.sampling
    if schema is not None and not plugin_wanted():
        schema = xgrammar_schema(schema)
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
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=sampling.logit_bias or None,
        logprobs=0 if ask.confidence and sampling.logprobs is None else sampling.logprobs,  # 0: of the sampled one only
        structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
        output_kind=RequestOutputKind.DELTA if stream or rules is not None else RequestOutputKind.FINAL_ONLY,
        extra_args=extra or None,
        stop_token_ids=None if end_of_turn is None else [end_of_turn],
        skip_special_tokens=rules is None and not special_tokens,
    )


def prompt_token_ids(template: ChatTemplate, ask: Ask, *, context_tokens: int) -> list[int]:
    """Token ids of an ask's messages in the model's chat template, up to where the thinking or the answer begins.

    Raises: AskRejectedError when the template refuses the messages or the prompt leaves no room for an answer.
    """
    messages = [{"role": m.role, "content": m.content} for m in ask.messages]
    try:
        ids = template.prompt(messages, None if ask.thinking is None else not ask.thinking.off)
    except ChatTemplateError as error:
        raise AskRejectedError(
            f"the ask of role {ask.role!r} at step {ask.step_path!r} is refused: {error.problem}",
            expected=error.expected,
            remedy=error.remedy,
        ) from error
    if len(ids) >= context_tokens:
        raise ContextError(
            f"the prompt of role {ask.role!r} at step {ask.step_path!r} has {len(ids)} tokens",
            expected=f"fewer than {context_tokens}, the engine's context",
            remedy="Shorten the inputs, lower memory_tokens or conversation_tokens, or raise max_model_tokens if the "
            "model has the context for it.",
        )
    return ids


def _written_tokens(said: Any, top: int) -> list[WrittenToken]:
    """The tokens of one of vLLM's outputs that are text, with their log-probabilities."""
    ids = list(said.token_ids)
    if said.finish_reason == "stop":
        ids.pop()  # the token that ended it
    written = []
    for id, place in zip(ids, said.logprobs or (), strict=False):
        likeliest = sorted(place.values(), key=lambda one: one.rank)[:top]
        own = _chance(place[id])
        written.append(WrittenToken(token=own.token, logprob=own.logprob, top=tuple(map(_chance, likeliest))))
    return written


def _chance(one: Any) -> TokenChance:
    return TokenChance(token=one.decoded_token or "", logprob=max(one.logprob, IMPOSSIBLE))


def finish_reason(ask: Ask, reason: str | None) -> Any:
    """The reply's finish reason; raises EngineError for anything but a natural end."""
    if reason in ("stop", "length"):
        return reason
    raise EngineError(
        f"the engine ended the ask of role {ask.role!r} at step {ask.step_path!r} with {reason!r}",
        expected="'stop' or 'length'",
        remedy="Look at the engine's log; a grammar that rejects the model's own tokens is the usual cause.",
    )
