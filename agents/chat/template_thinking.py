"""How a chat template writes thinking: its tags, the block it writes where there is none, and what it opens itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..thinking import ThinkingTags
from .chat_tokens import chat_text

__all__ = ["TemplateThinking", "read_thinking"]

# How templates name their tags: the pattern of either, the two of them, and the line break that models write behind
# the first where the template does not show it. Harmony (GPT-OSS) and Gemma 4 have channels; Granite 3.2 has words.
_SPELLINGS = (
    (re.compile(r"</?((?:\w+:)?think(?:ing)?)>"), "<{}>", "</{}>", "\n"),
    (re.compile(r"\[/?(THINK)\]"), "[{}]", "[/{}]", "\n"),
    (re.compile(r"<\|(?:START|END)_(THINKING)\|>"), "<|START_{}|>", "<|END_{}|>", "\n"),
    (
        re.compile(r"<\|(channel)\|>analysis<\|message\|>"),
        "<|{0}|>analysis<|message|>",
        "<|end|><|start|>assistant<|{0}|>final<|message|>",
        "",
    ),
    (re.compile(r"<\|(channel)>"), "<|{0}>thought", "<{0}|>", "\n"),
    (re.compile(r"(Here is my) thought process:"), "{0} thought process:", "{0} response:", "\n"),
)
_SWITCHES = ("enable_thinking", "thinking")
"""Arguments by which templates turn thinking on and off."""
_ASKED, _THOUGHT, _ANSWER = "text-of-the-user", "text-of-the-thought", "text-of-the-answer"


@dataclass(frozen=True)
class TemplateThinking:
    """What a template does about thinking, with the arguments it is given.

    `known` says whether the template knows thinking at all; `opens` whether it opens a block that it leaves open when
    nothing is said about thinking. `switch` is its argument for thinking, empty where it has none. `end_when_on` and
    `end_when_off` are the end of a prompt that belongs to a thinking block, when thinking is on and off.
    """

    tags: ThinkingTags
    known: bool = False
    opens: bool = False
    switch: str = ""
    end_when_on: str = ""
    end_when_off: str = ""

    def switched(self, on: bool) -> dict[str, bool]:
        """The template's argument that turns thinking on or off."""
        return {self.switch: on} if self.switch else {}


def read_thinking(tokenizer: Any, args: Mapping[str, Any], tags: ThinkingTags | None) -> TemplateThinking:
    """Read a tokenizer's template; `tags` are taken instead of those it writes.

    Where it writes none, and for what it does not show, they are those of `ThinkingTags()`.
    """
    names = _tag_names(tokenizer, tags)
    if names is None:
        return TemplateThinking(tags or ThinkingTags())
    opened, closed, _ = names
    reader = _Reader(tokenizer, args)
    switch = next((name for name in _SWITCHES if reader.prompt({name: True}) != reader.prompt({name: False})), "")
    usual = reader.end({})
    on, off = (reader.end({switch: True}), reader.end({switch: False})) if switch else (usual, usual)
    open_at_end = re.compile(re.escape(opened) + r"\s*\Z")
    block_at_end = re.compile(rf"(?:{re.escape(opened)}\s*)?{re.escape(closed)}\s*\Z")
    own = tags or _read_tags(reader, names, _found(open_at_end, on), _found(block_at_end, off, usual))
    return TemplateThinking(
        own,
        known=True,
        opens=bool(open_at_end.search(usual)),
        switch=switch,
        end_when_on=_found(open_at_end, on) or _found(block_at_end, on),
        end_when_off=_found(open_at_end, off) or _found(block_at_end, off),
    )


def _read_tags(reader: _Reader, names: tuple[str, str, str], open_text: str, empty: str) -> ThinkingTags:
    """The tags with the white space around them; `open_text` and `empty` are what prompts end with, where they do."""
    opened, closed, usual_gap = names
    before_thought = re.compile(rf"{re.escape(opened)}\s*(?={_THOUGHT})")
    open_text = open_text or _found(before_thought, reader.answered({"reasoning_content": _THOUGHT}))
    if not open_text:
        gap = re.match(rf"{re.escape(opened)}(\s*)", empty)
        open_text = opened + (gap[1][: (len(gap[1]) + 1) // 2] if gap else usual_gap)
    if not empty:
        before_answer = re.compile(rf"{re.escape(opened)}\s*{re.escape(closed)}\s*(?={_ANSWER})")
        empty = _found(before_answer, reader.answered({})) or open_text + closed
    return ThinkingTags(open=open_text, close=closed, empty=empty)


def _tag_names(tokenizer: Any, tags: ThinkingTags | None) -> tuple[str, str, str] | None:
    """The open and the close tag without white space, and that usual behind the first; None for templates without."""
    if tags is not None:
        return tags.open.strip(), tags.close, ""
    for source in _sources(tokenizer):
        for pattern, opened, closed, gap in _SPELLINGS:
            found = pattern.search(source)
            if found:
                return opened.format(found[1]), closed.format(found[1]), gap
    return None


def _sources(tokenizer: Any) -> Iterator[str]:
    template = getattr(tokenizer, "chat_template", None)
    yield from template.values() if isinstance(template, dict) else [template or ""]


def _found(pattern: re.Pattern[str], *texts: str) -> str:
    return next((found[0] for text in texts if (found := pattern.search(text))), "")


class _Reader:
    """Writes small chats with a template; what it does not take is the empty text."""

    def __init__(self, tokenizer: Any, args: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._args = args

    def prompt(self, more: Mapping[str, Any]) -> str:
        """A prompt, with further arguments."""
        return self._write([{"role": "user", "content": _ASKED}], {**self._args, **more})

    def end(self, more: Mapping[str, Any]) -> str:
        """What a prompt has behind the user's text."""
        return self.prompt(more).rpartition(_ASKED)[2]

    def answered(self, more: Mapping[str, str]) -> str:
        """A chat with an answer, from the end of the user's text on; `more` goes into the answer's turn."""
        turns = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWER, **more}]
        return self._write(turns, self._args, generation_prompt=False).rpartition(_ASKED)[2]

    def _write(self, turns: list[dict[str, str]], args: Mapping[str, Any], generation_prompt: bool = True) -> str:
        try:
            return chat_text(self._tokenizer, turns, generation_prompt=generation_prompt, args=args)
        except Exception:  # a template may raise any exception
            return ""
