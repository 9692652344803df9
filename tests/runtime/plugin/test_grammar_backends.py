"""One manager of grammars serves asks of several kinds at once, as an engine's scheduler asks it to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FIVES: dict[str, Any] = {"type": "integer", "multipleOf": 5}
SCHEMAS: dict[str, Any] = {
    "guidance": FIVES,
    "xgrammar": {"type": "integer"},
    "outlines": {"type": "object", "properties": {"a": {"const": 1}}, "patternProperties": {"^b$": {"const": 2}}},
}
WORDS = 32


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def manager(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's manager of an engine, with our part in it."""
    from vllm.config import StructuredOutputsConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.structured_output import StructuredOutputManager

    from metier.runtime.plugin import grammar_backends

    if StructuredOutputManager.grammar_init.__module__ != grammar_backends.__name__:  # no engine yet
        for name in ("grammar_init", "_create_grammar"):
            monkeypatch.setattr(StructuredOutputManager, name, getattr(StructuredOutputManager, name))
        monkeypatch.setattr(SamplingParams, "_validate_structured_outputs", SamplingParams._validate_structured_outputs)
        grammar_backends.install()
    model = SimpleNamespace(
        skip_tokenizer_init=True,
        get_vocab_size=lambda: len(tokenizer),
        hf_config=SimpleNamespace(model_type="llama"),
        is_diffusion=False,
    )
    made = StructuredOutputManager(
        SimpleNamespace(
            parallel_config=SimpleNamespace(distributed_executor_backend="external_launcher"),
            scheduler_config=SimpleNamespace(max_num_seqs=4),
            model_config=model,
            structured_outputs_config=StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
            speculative_config=None,
            num_speculative_tokens=0,
        )
    )
    made.tokenizer = tokenizer
    yield made


@pytest.fixture
def begin(manager: Any, tokenizer: Any) -> Callable[[str], Any]:
    """Begin an ask with one of the schemas, as vLLM's front checks it and its scheduler takes it up."""
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.structured_output.request import StructuredOutputRequest

    def begin(kind: str) -> Any:
        params = SamplingParams(structured_outputs=StructuredOutputsParams(json=SCHEMAS[kind]))
        config = manager.vllm_config
        params._validate_structured_outputs(config.model_config, config.structured_outputs_config, tokenizer)
        assert params.structured_outputs is not None and params.structured_outputs._backend == kind
        request = SimpleNamespace(
            request_id=kind,
            sampling_params=params,
            structured_output_request=StructuredOutputRequest.from_sampling_params(params),
            use_structured_output=True,
        )
        manager.grammar_init(request)
        return request

    return begin


@pytest.mark.parametrize("order", [("guidance", "xgrammar", "outlines"), ("outlines", "xgrammar", "guidance")])
def test_each_ask_has_the_grammar_that_was_chosen_for_it(
    manager: Any, begin: Callable[[str], Any], tokenizer: Any, order: tuple[str, ...]
) -> None:
    requests = {kind: begin(kind) for kind in order}
    one, five = (tokenizer.encode(text, add_special_tokens=False)[-1] for text in ("1", "5"))

    def allowed() -> dict[str, set[int]]:
        mask = manager.grammar_bitmask(requests, list(order), {})
        bits = {kind: mask[row].tolist() for row, kind in enumerate(order)}
        return {k: {t for t in range(len(tokenizer)) if b[t // WORDS] >> (t % WORDS) & 1} for k, b in bits.items()}

    first = allowed()
    assert one in first["xgrammar"] and one in first["guidance"] and one not in first["outlines"]
    for kind in ("xgrammar", "guidance"):
        assert manager.accept_tokens(requests[kind], [one])
    end = tokenizer.eos_token_id
    second = allowed()
    assert end in second["xgrammar"] and end not in second["guidance"], "11 … but 1 is no multiple of 5"
    assert manager.accept_tokens(requests["guidance"], [five])
    assert end in allowed()["guidance"]


def test_a_grammar_that_masks_other_words_fails_its_ask_alone(manager: Any, begin: Callable[[str], Any]) -> None:
    begin("xgrammar")
    manager.metier_masked_words += WORDS
    failed = begin("guidance").structured_output_request.grammar
    assert isinstance(failed, ValueError) and "masks" in str(failed)
