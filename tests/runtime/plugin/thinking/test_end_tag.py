"""The end of thinking is found however the tokenizer splits its tag, and only there."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metier.agents.chat.chat_template import ChatTemplate, TemplateSettings
from metier.agents.errors import AskRejectedError, SettingsError
from metier.agents.messages import Ask, Message
from metier.agents.thinking import THINKING_OFF, ThinkingTags
from metier.runtime.engines import thinking_asks
from metier.runtime.engines.thinking_asks import ReplyReader, ThinkingAsks
from metier.runtime.plugin.thinking.end_tag import EndTag, ThinkingScanner, end_tag, tag_token_ids

PIECES = [
    "</",
    "think",
    ">",
    "<",
    "/",
    ".</",
    ">{",
    "k>",
    "</think>",
    "</think>\n\n",
    "a",
    " b",
    "\n",
    "stop",
    "Wait",
    "hin",
    "t",
]
CLOSE = "</think>"


class PieceTokenizer:
    """A tokenizer of a few pieces, several of which overlap with the tag; encodes by the longest piece."""

    def __init__(self, pieces: list[str] = PIECES) -> None:
        self.pieces = pieces

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = []
        while text:
            best = max((p for p in self.pieces[:4] + self.pieces[10:] if text.startswith(p)), key=len, default=None)
            if best is None:
                text = text[1:]  # as if unknown
                continue
            ids.append(self.pieces.index(best))
            text = text[len(best) :]
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.pieces[i] for i in ids)

    def get_vocab(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}


TOKENIZER = PieceTokenizer()


def slow_count(ids: list[int]) -> tuple[int, int, bool]:
    """Oracle: tokens read, tokens of thinking and whether it ended, from the whole text after each token."""
    for read in range(1, len(ids) + 1):
        at = TOKENIZER.decode(ids[:read]).find(CLOSE)
        if at >= 0:
            thought = 0
            while len(TOKENIZER.decode(ids[: thought + 1])) <= at:
                thought += 1
            return read, thought, True
    return len(ids), -1, False


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=30))
@settings(max_examples=400, deadline=None)
def test_scanner_counts_as_the_whole_text_does(ids: list[int]) -> None:
    scanner, (read, thought, closed) = ThinkingScanner(end_tag(TOKENIZER, CLOSE)), slow_count(ids)
    assert scanner.read(ids) == read
    assert scanner.closed == closed
    if closed:
        assert scanner.thought == thought
        assert end_tag(TOKENIZER, CLOSE).ends(ids[:read])
    for end in range(read):
        assert not end_tag(TOKENIZER, CLOSE).ends(ids[:end])
    assert len(scanner.last) <= len(CLOSE) + 1


def test_completions_are_the_tokens_that_finish_the_tag() -> None:
    tag = EndTag(TOKENIZER, CLOSE)
    for completion in tag.completions:
        begun = CLOSE[: completion.begun]
        for token, piece in enumerate(PIECES):
            text = begun + piece
            finishes = CLOSE in text and (completion.begun == 0 or text.startswith(CLOSE))
            assert (token in completion.exact | completion.over) == finishes, (begun, piece)
            if finishes:
                assert (token in completion.exact) == text.endswith(CLOSE)


def test_tags_the_tokenizer_loses_are_refused_by_name() -> None:
    tags = ThinkingTags(open="a", close="[/DONE]", empty="a[/DONE]")
    with pytest.raises(SettingsError, match=r"thinking_tags.close='\[/DONE\]' becomes \['/'.*"):
        tag_token_ids(PieceTokenizer([*PIECES, "/"]), tags)


class StubTokenizer(PieceTokenizer):
    def __init__(self) -> None:
        super().__init__([*PIECES, "<think>\n"])


def ask(**fields: Any) -> Ask:
    fields.setdefault("max_tokens", 5)
    return Ask(run_id="r", step_path="s", role="solver", messages=(Message(role="user", content="a"),), **fields)


def asks(monkeypatch: pytest.MonkeyPatch, status: str = "active") -> ThinkingAsks:
    monkeypatch.setattr(thinking_asks, "plugin_status", lambda: {"thinking": status})
    template = ChatTemplate(StubTokenizer(), TemplateSettings(tags=ThinkingTags()))
    return ThinkingAsks(template, context_tokens=60)


def test_thinking_that_leaves_no_room_for_an_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    thinking = asks(monkeypatch)
    thinking.rules(ask(thinking=54), 2)
    with pytest.raises(AskRejectedError, match=r"step 's' and its thinking may take 60 tokens; expected fewer than 60"):
        thinking.rules(ask(thinking=55), 2)


def test_an_engine_without_the_plugin_refuses_to_think(monkeypatch: pytest.MonkeyPatch) -> None:
    thinking = asks(monkeypatch, "off (METIER_PLUGIN=0)")
    assert thinking.rules(ask(), 3) is None
    assert thinking.rules(ask(thinking=THINKING_OFF), 3) is None
    with pytest.raises(AskRejectedError, match=r"the plugin's thinking is off \(METIER_PLUGIN=0\)"):
        thinking.rules(ask(thinking=4), 3)


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=20), st.data())
@settings(max_examples=300, deadline=None)
def test_reader_parts_thinking_from_answer_whatever_the_pieces(ids: list[int], data: st.DataObject) -> None:
    reader, rest, heard = ReplyReader(end_tag(TOKENIZER, CLOSE), 4), list(ids), ""
    while rest:
        count = data.draw(st.integers(1, len(rest)))
        heard += reader.read(TOKENIZER.decode(rest[:count]), rest[:count])
        rest = rest[count:]
    thinking, _, answer = TOKENIZER.decode(ids).partition(CLOSE)
    assert reader.thinking == thinking.strip()
    assert reader.answer == heard
    assert heard.lstrip() == answer.lstrip()
    read, thought, closed = slow_count(ids)
    assert reader.thinking_tokens + reader.answer_tokens == len(ids)
    assert not closed or reader.thinking_tokens == thought
    assert reader.full == (closed and len(ids) - read >= 4)


def test_a_reply_without_thinking_is_all_answer() -> None:
    reader = ReplyReader()
    assert [reader.read(text, [1]) for text in (" a", "</think>", "b")] == [" a", "</think>", "b"]
    assert (reader.answer, reader.thinking, reader.answer_tokens, reader.full) == (" a</think>b", "", 3, False)
