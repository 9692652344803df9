"""What is trained on: rows as token ids, and which rows each step takes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...agents.chat.chat_template import ChatTemplate, TemplateSettings
from ...agents.chat.chat_tokens import text_tokens
from ...agents.errors import ChatTemplateError, TrainingError
from ...agents.traffic import TrafficRow

__all__ = ["EncodedRow", "encode_rows", "pad_token", "passes", "plan_batches", "shared_start"]

# Rows are sorted by length within pools of this many batches: enough to pad little, few enough to stay mixed.
_POOL_BATCHES = 16
PLAIN = TemplateSettings()


@dataclass(frozen=True)
class EncodedRow:
    """One training row as token ids; the loss covers `tokens[prompt_tokens:]`.

    `intuition` is T-REX's input about the row's task, None for every other method.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int
    intuition: tuple[float, ...] | None = None


def pad_token(tokenizer: Any) -> int:
    """The token that fills up short rows: the tokenizer's own, else the end of a turn."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def encode_rows(
    rows: Sequence[TrafficRow],
    tokenizer: Any,
    *,
    max_row_tokens: int,
    intuition: Callable[[str], tuple[float, ...]] | None = None,
    template: TemplateSettings = PLAIN,
) -> list[EncodedRow]:
    """Tokenise rows exactly as an engine prompts: chat template, generation prompt, reply, end of turn.

    Prompt and reply are tokenised apart, because that is where an engine starts to generate. A row without messages
    is plain text, of which all tokens but the first are learned. What a row thought is learned with the tag that ends
    it; where its thinking was off, the closed block is part of the prompt. `intuition` turns a row's task into
    T-REX's input about it; `template` says how the chat template is written.
    Raises: TrainingError for no rows, a row longer than `max_row_tokens`, text too short to learn from, or messages
    that the chat template cannot write.
    """
    if not rows:
        raise TrainingError(
            "the training data has no rows",
            expected="at least one row",
            remedy="Check the recipe's `data`: its role, its min_score, or its program's size.",
        )
    encoded, chats = [], ChatTemplate(tokenizer, template)
    for number, row in enumerate(rows, 1):
        try:
            prompt, answer = _tokens_of(row, chats)
        except ChatTemplateError as error:
            raise TrainingError(
                f"training row {number}: {error.problem}", expected=error.expected, remedy=error.remedy
            ) from error
        if not answer:
            raise TrainingError(
                f"training row {number} is text of {len(prompt)} tokens",
                expected="at least two, since the first is not learned",
                remedy="Leave such rows out.",
            )
        if len(prompt) + len(answer) > max_row_tokens:
            raise TrainingError(
                f"training row {number} has {len(prompt) + len(answer)} tokens",
                expected=f"at most max_row_tokens={max_row_tokens}",
                remedy="Raise max_row_tokens in the recipe, or leave such rows out.",
            )
        row_intuition = None if intuition is None else intuition(row.task)
        encoded.append(EncodedRow((*prompt, *answer), len(prompt), row_intuition))
    return encoded


def _tokens_of(row: TrafficRow, template: ChatTemplate) -> tuple[list[int], list[int]]:
    if not row.messages:
        text = text_tokens(template.tokenizer, row.reply)
        return text[:1], text[1:]
    thinks = None if row.thinking is None else bool(row.thinking)
    prompt = template.prompt([{"role": m.role, "content": m.content} for m in row.messages], thinks)
    # Thinking that the template opens by itself is learned to be closed at once, where the row did not think.
    thought = "" if thinks is None and template.thinking.opens else row.thinking or None
    return prompt, template.reply_tokens(row.reply, thought)


def plan_batches(lengths: Sequence[int], *, batch_rows: int, steps: int, seed: int) -> list[list[int]]:
    """Choose the rows of every step: shuffled epochs, batches of like length, the same for the same seed.

    Returns `steps` lists of row indices, each of `batch_rows` (all rows when there are fewer).
    """
    rng = random.Random(seed)
    batch_rows = min(batch_rows, len(lengths))
    plan: list[list[int]] = []
    while len(plan) < steps:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        epoch: list[list[int]] = []
        pool = batch_rows * _POOL_BATCHES
        for start in range(0, len(order), pool):
            near = sorted(order[start : start + pool], key=lambda i: lengths[i])
            # A last, smaller batch would weigh its rows more than others: it waits for the next epoch.
            epoch += [near[i : i + batch_rows] for i in range(0, len(near) - batch_rows + 1, batch_rows)]
        rng.shuffle(epoch)
        plan += epoch
    return plan[:steps]


def passes(rows: Sequence[EncodedRow], pass_tokens: int | None) -> list[Sequence[EncodedRow]]:
    """Split a batch, in order, into parts of at most `pass_tokens` tokens each; a longer row is a part of its own."""
    if pass_tokens is None:
        return [rows]
    parts, start, tokens = [], 0, 0
    for number, row in enumerate(rows):
        if number > start and tokens + len(row.tokens) > pass_tokens:
            parts.append(rows[start:number])
            start, tokens = number, 0
        tokens += len(row.tokens)
    return [*parts, rows[start:]]


def shared_start(rows: Sequence[EncodedRow]) -> int:
    """How many tokens all rows start with, leaving each at least its last prompt token.

    That token must be computed per row, because the first answer token is predicted from it. Rows of different
    intuition share nothing: the same tokens have other keys and values.
    """
    if len({row.intuition for row in rows}) > 1:
        return 0
    most = min(row.prompt_tokens for row in rows) - 1
    for at in range(most):
        if len({row.tokens[at] for row in rows}) > 1:
            return at
    return max(0, most)
