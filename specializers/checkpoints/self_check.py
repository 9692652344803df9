"""What a checkpoint is sure to answer, so that an engine that computes something else is noticed before it serves.

Kernels for few bits can be fed wrongly without any error: the answers are then garbage. With new weights a few first
words are put on the card of which the model is sure; every engine started on them has to say them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...agents.chat_tokens import chat_tokens
from ...agents.errors import RecipeError

__all__ = ["PROMPTS", "make_self_check", "read_self_check"]

PROMPTS = (
    "What is the capital of France?",
    "What is 2 + 2?",
    "Count from one to five.",
    "What colour is grass?",
    "Translate 'house' into Spanish.",
    "Name three fruits.",
    "Write one sentence about the sea.",
    "How many days does a week have?",
)
# Between the likeliest token and the next, in nats: far more than numbers of 16 bits can turn around.
SURE_MARGIN = 2.0


def make_self_check(weights: Path) -> list[dict[str, str]]:
    """Prompts and the first token of their greedy answers, where the model is sure of it; computed layer by layer.

    Empty for a model that is never sure, or is not built like Llama (see `LayerStream`).
    """
    from transformers import AutoTokenizer

    from .layer_stream import LayerStream

    tokenizer = AutoTokenizer.from_pretrained(weights)
    rows = [chat_tokens(tokenizer, [{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    try:
        stream = LayerStream(weights)
    except RecipeError:
        return []
    sequences = stream.embed(rows)
    for number in range(stream.depth):
        stream.run_layer(number, sequences)
    best = stream.next_token_logits(sequences).topk(2)
    known = []
    for prompt, (first, second), (token, _) in zip(PROMPTS, best.values.tolist(), best.indices.tolist(), strict=True):
        text = tokenizer.decode([token], skip_special_tokens=True)
        if first - second >= SURE_MARGIN and text.strip() and "\ufffd" not in text:
            known.append({"prompt": prompt, "begins": text})
    return known


def read_self_check(card: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(prompt, beginning of the answer) of a variant's card; empty where there are none."""
    return tuple((entry["prompt"], entry["begins"]) for entry in card.get("self_check", ()))
