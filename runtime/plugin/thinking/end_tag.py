"""Where thinking ends in a stream of tokens, however the tokenizer has split the end tag."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ....agents.errors import SettingsError
from ....agents.thinking import ThinkingTags

__all__ = ["Completion", "EndTag", "ThinkingScanner", "end_tag", "tag_token_ids"]

TAGS_KEPT = 8
"""Tokenizers whose end tag is kept worked out."""


@dataclass(frozen=True)
class Completion:
    """Tokens that finish the end tag of which `begun` characters are written: those that end with it, or run over."""

    begun: int
    exact: frozenset[int]
    over: frozenset[int]


class EndTag:
    """An end tag such as `</think>` for one tokenizer: found by the text that the last tokens make together.

    A tag is seldom a token of its own: SmolLM2 writes it as three, the first of which begins other tags too, and a
    model may as well write `.</` in one token. So neither one token id nor a fixed sequence of ids finds it.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.text = text
        self._tokenizer = tokenizer
        self._pieces: dict[int, str] = {}
        self._completions: tuple[Completion, ...] | None = None
        # A piece is decoded behind another token, because some tokenizers drop white space at the start of a text.
        self._before = list(tokenizer.encode("a", add_special_tokens=False))
        self._before_text = self._decode(self._before)

    def piece(self, token_id: int) -> str:
        """The text that a token adds to what stands before it."""
        piece = self._pieces.get(token_id)
        if piece is None:
            whole = self._decode([*self._before, token_id])
            behind = whole.startswith(self._before_text)
            piece = whole[len(self._before_text) :] if behind else self._decode([token_id])
            self._pieces[token_id] = piece
        return piece

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether the last of these tokens completes the tag. Only the last few are looked at."""
        if not token_ids or self.text[-1] not in self.piece(token_ids[-1]):
            return False
        scanner = ThinkingScanner(self)
        tail = token_ids[-len(self.text) :]
        return scanner.read(tail) == len(tail) and scanner.closed

    @property
    def completions(self) -> tuple[Completion, ...]:
        """For each number of characters that may be written already, the tokens that finish the tag."""
        if self._completions is None:
            last = self.text[-1]
            candidates: Mapping[str, int] = self._tokenizer.get_vocab()
            # Vocabularies spell white space in many ways, but other ASCII as it is, or as a byte such as <0x3E>.
            spelt = (last, f"<0x{ord(last):02X}>")
            pieces = {i: self.piece(i) for text, i in candidates.items() if any(part in text for part in spelt)}
            self._completions = tuple(self._completion(begun, pieces) for begun in range(len(self.text)))
        return self._completions

    def _completion(self, begun: int, pieces: Mapping[int, str]) -> Completion:
        rest = self.text[begun:]
        exact: set[int] = set()
        over: set[int] = set()
        for token, piece in pieces.items():
            at = piece.find(rest) if begun == 0 else (0 if piece.startswith(rest) else -1)
            if at >= 0:
                (exact if at + len(rest) == len(piece) else over).add(token)
        return Completion(begun, frozenset(exact), frozenset(over))

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text


@lru_cache(maxsize=TAGS_KEPT)
def end_tag(tokenizer: Any, text: str) -> EndTag:
    """The end tag of a tokenizer, made once: what it has learnt of tokens is used for every request."""
    return EndTag(tokenizer, text)


class ThinkingScanner:
    """Reads the tokens of one reply that began inside thinking, and counts.

    `tokens` is how many were read up to and with the end tag; `thought` is how many of them are thinking, the ones the
    end tag is made of apart. A token that ends one word and begins the tag (`.</`) belongs to the tag.
    """

    def __init__(self, tag: EndTag) -> None:
        self.closed = False
        self.tokens = 0
        self.last: list[int] = []
        self._tag = tag
        self._pieces: list[str] = []
        self._in_tag = 0

    def read(self, token_ids: Iterable[int]) -> int:
        """Read tokens until thinking has ended; how many were read."""
        read = 0
        for token in token_ids:
            if self.closed:
                break
            self._read(token)
            read += 1
        return read

    @property
    def thought(self) -> int:
        """Tokens of thinking so far, or in all once the tag is closed."""
        return self.tokens - self._in_tag

    def begun(self) -> list[tuple[int, int]]:
        """How the tag may have begun: (characters, tokens they are in) for each beginning that the text ends with.

        The first is (0, 0): no tag has begun.
        """
        text, tag = "".join(self._pieces), self._tag.text
        return [(0, 0)] + [(n, self._tokens_of(n)) for n in range(1, len(tag)) if text.endswith(tag[:n])]

    def _read(self, token: int) -> None:
        tag = self._tag.text
        self.tokens += 1
        self._pieces.append(self._tag.piece(token))
        self.last.append(token)
        text = "".join(self._pieces)
        at = text.find(tag)
        if at >= 0:
            self.closed = True
            self._in_tag = self._tokens_of(len(text) - at)
            return
        while len(text) - len(self._pieces[0]) >= len(tag) - 1:
            text = text[len(self._pieces.pop(0)) :]
            self.last.pop(0)

    def _tokens_of(self, characters: int) -> int:
        """How many of the last tokens hold the last so many characters."""
        tokens = 0
        for piece in reversed(self._pieces):
            if characters <= 0:
                break
            characters -= len(piece)
            tokens += 1
        return tokens


def tag_token_ids(tokenizer: Any, tags: ThinkingTags) -> dict[str, tuple[int, ...]]:
    """Token ids of `open`, `close`, `empty` and `wait`, as they are put into prompts and replies.

    Raises: SettingsError when the tokenizer does not give a tag back as it was written, so that it could not be found.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, text in tags.model_dump().items():
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        tag = EndTag(tokenizer, text)
        written = "".join(map(tag.piece, ids))
        if written != text:
            raise SettingsError(
                f"thinking_tags.{name}={text!r} becomes {[tag.piece(i) for i in ids]} in this model's tokenizer",
                expected="tokens that make the same text again",
                remedy="Choose tags the tokenizer knows: those the model was trained with.",
            )
        found[name] = ids
    return found
