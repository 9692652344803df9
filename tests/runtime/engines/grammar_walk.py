"""Texts that vLLM's grammar of a schema allows, drawn at random without a model."""

from __future__ import annotations

import json
import random
from typing import Any

CLOSING = b'"}],'
MOST_BYTES = 4000


class GrammarWalk:
    """Draws texts from xgrammar's grammars over a vocabulary of the 256 bytes and an end token."""

    def __init__(self) -> None:
        import xgrammar

        self._xgrammar = xgrammar
        vocabulary = [bytes([byte]) for byte in range(256)] + [b"</s>"]
        info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[256])
        self._compiler = xgrammar.GrammarCompiler(info)
        self._mask = xgrammar.allocate_token_bitmask(1, len(vocabulary))

    def draw(self, schema: dict[str, Any], rng: random.Random) -> str | None:
        """A text that the grammar of a schema allows; None for one that has not ended after `MOST_BYTES`."""
        # Compiled as vLLM does for our engines: without any whitespace.
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

    def _choose(self, allowed: list[int], rng: random.Random) -> int:
        closing = [token for token in allowed if token in CLOSING]
        if closing and rng.random() < 0.4:
            return rng.choice(closing)
        return rng.choice([token for token in allowed if token < 128] or allowed)
