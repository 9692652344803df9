"""An ask as vLLM gets it and the reply made of what comes out, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from metier.agents.errors import AskRejectedError, ContextError, EngineError
from metier.agents.messages import Ask, Message, Reply
from metier.agents.sampling import Sampling, TokenChance, WrittenToken
from metier.agents.thinking import ThinkingProfile
from metier.runtime.engines import thinking_asks
from metier.runtime.engines.engine import EngineRequest
from metier.runtime.engines.engine_errors import ask_error
from metier.runtime.engines.vllm_calls import VllmAsks
from metier.runtime.settings.engine import EngineSettings
from metier.runtime.slots.adapter import LoadedAdapter
from tests.chat_templates import tokenizer_of
from tests.tiny_model import write_tiny_llama

MakeAsk = Callable[..., Ask]
THINKING = ThinkingProfile(max_tokens=8)
SCHEMA = {"type": "object", "properties": {"value": {"type": "integer"}}}


@pytest.fixture(scope="module")
def asks(tmp_path_factory: pytest.TempPathFactory) -> VllmAsks:
    from transformers import AutoTokenizer

    folder = write_tiny_llama(tmp_path_factory.mktemp("calls") / "base")
    return VllmAsks(AutoTokenizer.from_pretrained(folder), EngineSettings(), context_tokens=200)


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinking_asks, "plugin_status", lambda: {"thinking": "active"})


def output(text: str, ids: list[int], *, finished: str | None = None) -> Any:
    """One of vLLM's outputs: queued for 1 s, prefilled in 2, decoded in 3."""
    from vllm.v1.metrics.stats import RequestStateStats

    return SimpleNamespace(
        outputs=[SimpleNamespace(text=text, token_ids=ids, cumulative_logprob=-0.5 * len(ids), finish_reason=finished)],
        finished=finished is not None,
        prompt_token_ids=[1, 2, 3],
        num_cached_tokens=2,
        metrics=RequestStateStats(scheduled_ts=11.0, first_token_ts=13.0, last_token_ts=16.0),
    )


def test_a_call_carries_the_adapter_and_says_where_its_grammar_begins(asks: VllmAsks, make_ask: MakeAsk) -> None:
    adapter = LoadedAdapter(3, "abc", Path("/nowhere"))
    plain = asks.prepare(EngineRequest(make_ask(), adapter), stream=False)
    assert (plain.lora.lora_int_id, plain.lora.lora_name) == (3, "abc")
    assert plain.prompt["prompt_token_ids"] == plain.prompt_ids and plain.rules is None
    assert plain.grammar == {"reasoning_ended": None, "reasoning_parser_kwargs": None}
    strict = asks.prepare(EngineRequest(make_ask(answer_schema=SCHEMA)), stream=False)
    assert strict.lora is None and strict.grammar == {"reasoning_ended": True, "reasoning_parser_kwargs": None}
    thinks = asks.prepare(EngineRequest(make_ask(answer_schema=SCHEMA, thinking=THINKING)), stream=False)
    assert thinks.grammar == {"reasoning_ended": False, "reasoning_parser_kwargs": {"close": "</think>"}}
    assert len(thinks.prompt_ids) > len(strict.prompt_ids)  # thinking is opened behind the prompt


def test_the_reply_is_what_was_read_and_what_the_clocks_say(asks: VllmAsks, make_ask: MakeAsk) -> None:
    call = asks.prepare(EngineRequest(make_ask(), LoadedAdapter(3, "abc", Path("/nowhere"))), stream=True)
    assert [call.read(output("nine", [7])), call.read(output("teen", [7, 8]))] == ["nine", "teen"]
    last = output("", [9], finished="stop")
    call.read(last)
    reply = call.reply(last, call.finish_reason(last), submitted_s=10.0, cpu_s=0.25, engine="e")
    assert (reply.text, reply.variant, reply.engine, reply.finish_reason) == ("nineteen", "abc", "e", "stop")
    usage = reply.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.answer_tokens, usage.cpu_s) == (3, 2, 4, 0.25)
    assert (usage.queue_s, usage.prefill_s, usage.decode_s) == (1.0, 2.0, 3.0)


def test_an_answer_that_was_cut_off_ends_by_length_and_a_broken_one_is_an_error(
    asks: VllmAsks, make_ask: MakeAsk
) -> None:
    call = asks.prepare(EngineRequest(make_ask()), stream=False)
    assert call.finish_reason(output("nine", [7])) == "length"
    with pytest.raises(EngineError, match="with 'abort'"):
        call.finish_reason(output("nine", [7], finished="abort"))


def test_sampling_is_vllms_own_but_for_texts_that_stop(asks: VllmAsks, make_ask: MakeAsk) -> None:
    sampling = Sampling(stop=("x",), top_k=3, min_p=0.25, presence_penalty=0.5, frequency_penalty=-0.5, logprobs=2)
    from vllm.sampling_params import RequestOutputKind

    ask = make_ask(temperature=1.0, sampling=sampling.model_copy(update={"logit_bias": {7: 1.0}}))
    params = asks.prepare(EngineRequest(ask), stream=False).params
    assert (params.top_k, params.min_p, params.presence_penalty, params.frequency_penalty) == (3, 0.25, 0.5, -0.5)
    assert params.logit_bias == {7: 1.0} and params.logprobs == 2 and params.repetition_penalty == 1.0
    assert not params.stop, "thinking must not end there"
    assert params.output_kind == RequestOutputKind.DELTA, "an answer is read as it is written, to be ended"
    assert asks.prepare(EngineRequest(make_ask()), stream=False).params.logprobs is None
    assert asks.prepare(EngineRequest(make_ask(confidence=True)), stream=False).params.logprobs == 0


def test_tokens_are_reported_with_the_likeliest_and_without_what_ended_the_answer(
    asks: VllmAsks, make_ask: MakeAsk
) -> None:
    from vllm.logprobs import Logprob

    def said(text: str, id: int, *, finished: str | None = None) -> Any:
        given = output(text, [id], finished=finished)
        place = {id: Logprob(-2.0, 3, text), 90: Logprob(-0.5, 1, "no"), 91: Logprob(float("-inf"), 2, None)}
        given.outputs[0].logprobs = [place]
        return given

    call = asks.prepare(EngineRequest(make_ask(sampling=Sampling(logprobs=2))), stream=True)
    call.read(said("nine", 7))
    last = said("", 9, finished="stop")
    call.read(last)
    reply = call.reply(last, call.finish_reason(last), submitted_s=10.0, cpu_s=0.0, engine="e")
    top = (TokenChance(token="no", logprob=-0.5), TokenChance(token="", logprob=-9999.0))
    assert reply.logprobs == (WrittenToken(token="nine", logprob=-2.0, top=top),)
    assert Reply.model_validate_json(reply.model_dump_json()) == reply, "as a supervised engine sends it"

    stopped = asks.prepare(EngineRequest(make_ask(sampling=Sampling(stop=("in",), logprobs=0))), stream=True)
    first = said("nine", 7)
    assert stopped.read(first) == "n" and stopped.reader.full and stopped.finish_reason(first) == "stop"


def test_what_vllm_finds_wrong_with_an_ask_is_a_refusal(asks: VllmAsks, make_ask: MakeAsk) -> None:
    ask = make_ask()
    with pytest.raises(ContextError, match="fewer than 200") as caught:
        asks.prepare(EngineRequest(make_ask("seven " * 400)), stream=False)
    assert ask_error(ask, caught.value) is caught.value
    refusal = ask_error(ask, ValueError("bad grammar"))
    assert isinstance(refusal, AskRejectedError) and "bad grammar" in refusal.problem
    broken = ask_error(ask, RuntimeError("out of memory"))
    assert type(broken) is EngineError and "out of memory" in broken.problem


def asks_of(family: str, **settings: Any) -> VllmAsks:
    return VllmAsks(tokenizer_of(family), EngineSettings(**settings), context_tokens=300)


def read_all(asks: VllmAsks, ask: Ask, *pieces: str) -> tuple[str, str, str]:
    """(answer, thinking, what was streamed) of a reply that comes in these pieces."""
    call, heard = asks.prepare(EngineRequest(ask), stream=True), ""
    for at, piece in enumerate(pieces, 1):
        ids = asks.tokenizer(piece, add_special_tokens=False).input_ids
        heard += call.read(output(piece, ids, finished="stop" if at == len(pieces) else None))
    return call.reader.answer, call.reader.thinking, heard


def test_thoughts_never_come_back_as_the_answer(make_ask: MakeAsk) -> None:
    """No profile: one template has opened thinking, with the other the model may do so itself."""
    opened = asks_of("qwq").prepare(EngineRequest(make_ask(max_tokens=20)), stream=False)
    assert opened.rules is not None and opened.rules.profile.max_tokens == 20
    assert opened.params.max_tokens == 20 + 20 + len(opened.rules.close_ids)
    assert read_all(asks_of("qwq"), make_ask(), "2 and 2", "</thi", "nk>\n\n", "4") == ("4", "2 and 2", "4")
    stopped = make_ask(max_tokens=20, sampling=Sampling(stop=("2",)))
    assert read_all(asks_of("qwq"), stopped, "2 and 2", "</think>", "\n\n", "4 ", "2 and") == ("4 ", "2 and 2", "4 ")
    for family in ("qwen3", "magistral", "smollm3"):
        asks = asks_of(family)
        tags = asks.template.thinking.tags
        name, close = tags.open.strip(), tags.close
        assert asks.prepare(EngineRequest(make_ask()), stream=False).rules is None
        assert read_all(asks, make_ask(), name[:3], name[3:], "\n2 and 2\n", close, "\n\n4") == ("4", "2 and 2", "4")
        assert read_all(asks, make_ask(), name + "2 and 2") == ("", "2 and 2", "")  # cut off while it thinks
        assert read_all(asks, make_ask(), "4", " " + name) == (f"4 {name}", "", f"4 {name}")
        assert read_all(asks, make_ask(), name[0]) == (name[0], "", name[0])


def test_a_model_that_knows_no_thinking_may_write_the_tag(make_ask: MakeAsk) -> None:
    assert read_all(asks_of("chatml"), make_ask(), "<think>", "</think>") == ("<think></think>", "", "<think></think>")


def test_a_grammar_begins_behind_thinking_that_the_template_opens(make_ask: MakeAsk) -> None:
    opened = asks_of("deepseek_r1").prepare(EngineRequest(make_ask(answer_schema=SCHEMA)), stream=False)
    assert opened.grammar == {"reasoning_ended": False, "reasoning_parser_kwargs": {"close": "</think>"}}
    strict = asks_of("qwen3").prepare(EngineRequest(make_ask(answer_schema=SCHEMA)), stream=False)
    assert strict.grammar == {"reasoning_ended": True, "reasoning_parser_kwargs": None}


def test_thinking_that_is_opened_unasked_leaves_room_for_an_answer(make_ask: MakeAsk) -> None:
    call = asks_of("qwq").prepare(EngineRequest(make_ask("seven " * 20, max_tokens=500)), stream=False)
    assert call.rules is not None
    taken = len(call.prompt_ids) + call.rules.profile.max_tokens + len(call.rules.close_ids)
    assert 0 < 300 - taken <= call.rules.profile.max_tokens + 2


def test_a_reply_ends_at_the_end_of_a_turn(make_ask: MakeAsk) -> None:
    for family in ("llama3", "gemma2", "phi3", "chatml_base"):
        asks = asks_of(family)
        call = asks.prepare(EngineRequest(make_ask()), stream=False)
        assert call.params.stop_token_ids == [asks.template.end_of_turn] != [asks.tokenizer.eos_token_id]


def test_a_special_token_that_is_a_tag_is_kept_in_the_text(make_ask: MakeAsk) -> None:
    assert not asks_of("magistral").prepare(EngineRequest(make_ask()), stream=False).params.skip_special_tokens
    assert asks_of("qwen3").prepare(EngineRequest(make_ask()), stream=False).params.skip_special_tokens


def test_arguments_of_the_template_are_settings(make_ask: MakeAsk) -> None:
    asks = asks_of("qwen3", chat_template_args={"enable_thinking": False})
    call = asks.prepare(EngineRequest(make_ask()), stream=False)
    assert asks.tokenizer.decode(call.prompt_ids).endswith("<think>\n\n</think>\n\n")


def test_messages_that_a_template_cannot_write_are_refused(make_ask: MakeAsk) -> None:
    ask = make_ask().model_copy(update={"messages": (Message(role="assistant", content="Hello."),)})
    with pytest.raises(AskRejectedError, match="is refused: the model's chat template takes no conversation that the"):
        asks_of("gemma2").prepare(EngineRequest(ask), stream=False)


def test_an_engine_without_the_plugin_is_asked_for_what_xgrammar_holds(
    asks: VllmAsks, make_ask: MakeAsk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked_for(schema: dict[str, Any]) -> Any:
        return asks.prepare(EngineRequest(make_ask(answer_schema=schema)), stream=False).params.structured_outputs.json

    fives = {"type": "integer", "multipleOf": 5}
    assert asked_for(fives) == fives
    monkeypatch.setenv("METIER_PLUGIN", "0")
    assert asked_for(fives) == {"type": "integer"}
    assert asked_for({"uniqueItems": True}) == {"uniqueItems": True}, "a client's, for vLLM to refuse"
