"""Texts that vLLM's grammars of a schema allow, drawn at random without a model."""

from __future__ import annotations

import json
import random
from typing import Any

from metier.agents.answers.held_schema import grammar_of

CLOSING = b'"}],'
MOST_BYTES = 4000


class GrammarWalk:
    """Draws texts from the grammar that serves a schema, over a vocabulary of the 256 bytes and an end token."""

    def __init__(self) -> None:
        import xgrammar
        from llguidance import LLTokenizer

        self._xgrammar = xgrammar
        vocabulary = [bytes([byte]) for byte in range(256)] + [b"</s>"]
        info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[256])
        self._compiler = xgrammar.GrammarCompiler(info)
        self._guidance = LLTokenizer("byte")
        self._mask = xgrammar.allocate_token_bitmask(1, len(vocabulary))

    def draw(self, schema: dict[str, Any], rng: random.Random) -> str | None:
        """A text that the grammar of a schema allows; None for one that has not ended after `MOST_BYTES`."""
        # Compiled as vLLM does for our engines: without any whitespace.
        if grammar_of(schema) == "guidance":
            return self._draw_by_guidance(schema, rng)
        grammar = self._compiler.compile_json_schema(json.dumps(schema), any_whitespace=False, separators=(",", ":"))
        matcher = self._xgrammar.GrammarMatcher(grammar)
        text = bytearray()
        while len(text) < MOST_BYTES:
            matcher.fill_next_token_bitmask(self._mask)
            bits = self._mask[0].tolist()
            allowed = [token for token in range(257) if bits[token // 32] >> (token % 32) & 1]
            if 256 in allowed and (len(allowed) == 1 or rng.random() < 0.5):
                return text.decode()
            chosen = self._choose([token for token in allowed if token != 256], rng)
            assert matcher.accept_token(chosen)
            text.append(chosen)
        return None

    def _draw_by_guidance(self, schema: dict[str, Any], rng: random.Random) -> str | None:
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})
        matcher = LLMatcher(self._guidance, grammar)
        text = bytearray()
        while len(text) < MOST_BYTES:
            bits = matcher.compute_bitmask()
            allowed = [token for token in range(256) if bits[token // 8] >> (token % 8) & 1]
            if matcher.is_accepting() and (not allowed or rng.random() < 0.5):
                return text.decode()
            chosen = self._choose(allowed, rng)
            assert matcher.consume_token(chosen)
            text.append(chosen)
        return None

    def _choose(self, allowed: list[int], rng: random.Random) -> int:
        closing = [token for token in allowed if token in CLOSING]
        if closing and rng.random() < 0.4:
            return rng.choice(closing)
        return rng.choice([token for token in allowed if token < 128] or allowed)
