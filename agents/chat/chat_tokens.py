"""Messages as token ids in a model's chat template, with no control token from what a message says.

A chat template writes marks such as `<|im_start|>` around messages, and the tokenizer turns each into a control token
of its own. The same characters inside a message would become the same token: a puzzle could end its own turn and write
the critic's verdict. Here the marks of the template and those in contents are kept apart: wherever a content holds a
mark, the text is cut behind the mark's first character and tokenised in pieces, so that the model reads the same
characters as ordinary text. Other texts give the ids that `apply_chat_template` gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["chat_text", "chat_tokens", "control_marks", "text_tokens"]

# Private characters that stand for a cut while the template is rendered; the first that no content holds is taken.
_CUTS = tuple(chr(0xF8E0 + number) for number in range(16))
_PATTERNS: WeakKeyDictionary[Any, re.Pattern[str] | None] = WeakKeyDictionary()
_NO_ARGS: Mapping[str, Any] = {}


def chat_tokens(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    *,
    generation_prompt: bool = True,
    args: Mapping[str, Any] = _NO_ARGS,
    without_end: str = "",
) -> list[int]:
    """Token ids of a chat; with `generation_prompt` those that open the answer come last.

    `args` are what the template takes besides messages; `without_end` is left out where the chat's text ends with it.
    Raises: whatever the template raises for messages that do not fit it.
    """
    marks, cut = _pattern(tokenizer), ""
    if marks is not None and any(marks.search(_as_matched(tokenizer, m["content"])) for m in messages):
        cut = _unused_cut("".join(m["content"] for m in messages))
        messages = [{**m, "content": _with_cuts(_as_matched(tokenizer, m["content"]), marks, cut)} for m in messages]
    text = chat_text(tokenizer, messages, generation_prompt=generation_prompt, args=args).removesuffix(without_end)
    return [id for piece in (text.split(cut) if cut else [text]) for id in _ids(tokenizer, piece)]


def chat_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    *,
    generation_prompt: bool = True,
    args: Mapping[str, Any] = _NO_ARGS,
) -> str:
    """The text of a chat as the template writes it, in which contents and marks are not told apart."""
    text: str = tokenizer.apply_chat_template(
        [dict(m) for m in messages], add_generation_prompt=generation_prompt, tokenize=False, **args
    )
    return text


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that is all content, such as a reply that is learned: none is a control token."""
    marks = _pattern(tokenizer)
    if marks is None or not marks.search(_as_matched(tokenizer, text)):
        return _ids(tokenizer, text)
    cut = _unused_cut(text)
    pieces = _with_cuts(_as_matched(tokenizer, text), marks, cut).split(cut)
    return [id for piece in pieces for id in _ids(tokenizer, piece)]


def control_marks(tokenizer: Any) -> tuple[str, ...]:
    """The texts that the tokenizer turns into control tokens, longest first.

    Those are its special tokens, and the added ones that its chat template writes: other added tokens, such as runs of
    spaces or HTML tags, are ordinary words.
    """
    template = tokenizer.chat_template
    written = "\n".join(template.values()) if isinstance(template, dict) else template or ""
    added = tokenizer.added_tokens_decoder.values()
    marks = {str(token) for token in added if token.special or (str(token).strip() and str(token) in written)}
    return tuple(sorted((mark for mark in marks if mark), key=lambda mark: (-len(mark), mark)))


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """What a content must not hold as it is; None for a tokenizer without control tokens."""
    if tokenizer not in _PATTERNS:
        marks = control_marks(tokenizer)
        _PATTERNS[tokenizer] = re.compile("|".join(map(re.escape, marks))) if marks else None
    return _PATTERNS[tokenizer]


def _as_matched(tokenizer: Any, text: str) -> str:
    """The text as the tokenizer looks for its added tokens in it: some are looked for after normalising."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is None:
        return text
    if not any(token.normalized for token in tokenizer.added_tokens_decoder.values()):
        return text
    normalised: str = backend.normalizer.normalize_str(text)
    return normalised


def _unused_cut(text: str) -> str:
    return next((cut for cut in _CUTS if cut not in text), _CUTS[0])


def _with_cuts(text: str, marks: re.Pattern[str], cut: str) -> str:
    """The text with a cut behind the first character of every mark, until none is left.

    The cut's own character goes, where a text holds all there are; so does a mark of one character.
    """
    text = text.replace(cut, "")
    while marks.search(text):
        text = marks.sub(lambda mark: mark[0][0] + cut + mark[0][1:] if len(mark[0]) > 1 else "", text)
    return text
