"""Grammars of several backends in one engine.

vLLM can choose a backend for each ask, xgrammar first and guidance where xgrammar cannot hold the schema. But it makes
the backend of an engine's first ask, and gives that every later one: a schema that only the other holds then ends in a
weaker grammar, or in none. And it chooses only where white space is allowed. Here it chooses for engines of xgrammar
without white space too, and each ask gets the grammar of the backend that was chosen for it. A mask of words has the
same form in all of them: a row of bits for each ask.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_outlines import OutlinesBackend
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

__all__ = ["install"]

_BACKENDS: dict[str, Any] = {"xgrammar": XgrammarBackend, "guidance": GuidanceBackend, "outlines": OutlinesBackend}


def install() -> str:
    """Let an engine keep a grammar backend of each kind that its asks need; returns "active"."""
    grammar_init, create = StructuredOutputManager.grammar_init, StructuredOutputManager._create_grammar
    validate = SamplingParams._validate_structured_outputs

    def _validate(self: Any, model_config: Any, config: Any, tokenizer: Any) -> None:
        if config is not None and config.backend == "xgrammar" and config.disable_any_whitespace:
            config = SimpleNamespace(backend="auto")
        validate(self, model_config, config, tokenizer)

    def _grammar_init(self: Any, request: Any) -> None:
        if request.structured_output_request is not None:
            self.backend = _backend(self, request)  # the original makes one only where there is none
        grammar_init(self, request)

    def _create_grammar(self: Any, request: Any) -> Any:
        """In a thread of its own, when `self.backend` may be that of another ask; raises for this ask alone."""
        backend = _backend(self, request)
        words, masked = self.metier_masked_words, _masked_words(backend)
        if words != masked:
            raise ValueError(f"this grammar masks {masked} words, the engine's others {words}")
        # A copy: guidance's keeps the last text on itself, and several threads make grammars.
        return create(SimpleNamespace(backend=copy.copy(backend)), request)

    SamplingParams._validate_structured_outputs = _validate
    StructuredOutputManager.grammar_init = _grammar_init
    StructuredOutputManager._create_grammar = _create_grammar
    return "active"


def _backend(manager: Any, request: Any) -> Any:
    """The backend that an ask was checked for, made at its first ask."""
    kept = manager.__dict__.setdefault("metier_backends", {})
    name = request.sampling_params.structured_outputs._backend
    if name not in kept:
        words = manager.vllm_config.model_config.get_vocab_size()
        kept[name] = _BACKENDS[name](manager.vllm_config, tokenizer=manager.tokenizer, vocab_size=words)
        manager.__dict__.setdefault("metier_masked_words", _masked_words(kept[name]))
    return kept[name]


def _masked_words(backend: Any) -> int:
    """Words that a mask of a backend has room for."""
    return 32 * int(backend.allocate_token_bitmask(1).shape[1])
