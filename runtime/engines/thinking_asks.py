"""What thinking adds to an ask before vLLM gets it, and how it is separated from the answer in the reply."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from ...agents.errors import AskRejectedError
from ...agents.messages import Ask
from ...agents.thinking import ThinkingTags, open_thinking
from ..plugin.thinking.budget_forcing import ThinkingRules
from ..plugin.thinking.end_tag import EndTag, ThinkingScanner, end_tag, tag_token_ids
from ..plugin.wire import plugin_status

__all__ = ["ReplyReader", "ThinkingAsks"]


class ThinkingAsks:
    """The thinking of one engine's asks, in the process that builds its prompts: the tags as tokens of its model."""

    def __init__(self, tokenizer: Any, tags: ThinkingTags, *, context_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._tags = tags
        self._context_tokens = context_tokens

    @cached_property
    def _ids(self) -> dict[str, tuple[int, ...]]:
        return tag_token_ids(self._tokenizer, self._tags)

    def rules(self, ask: Ask) -> ThinkingRules | None:
        """What the logits processor is to keep to, None for an ask that does not think.

        Raises: AskRejectedError when this engine cannot do it, SettingsError when its tokenizer loses the tags.
        """
        if ask.thinking is None or ask.thinking.off:
            return None
        status = plugin_status().get("thinking", "not registered")
        if not status.startswith("active"):
            raise AskRejectedError(
                f"the ask of role {ask.role!r} at step {ask.step_path!r} thinks, and the plugin's thinking is {status}",
                expected="an engine with the plugin",
                remedy="Unset METIER_PLUGIN, or leave `thinking` out.",
            )
        return ThinkingRules(ask.thinking, self._tags.close, self._ids["close"], self._ids["wait"])

    def add_block(self, ask: Ask, prompt_ids: list[int]) -> list[int]:
        """The prompt with thinking opened behind it, or opened and closed when it is off.

        A chat template that opens thinking by itself is not made to do so twice. Raises: AskRejectedError when the
        longest thinking would leave no room for an answer; SettingsError as in `rules`.
        """
        profile = ask.thinking
        if profile is None:
            return prompt_ids
        opened, close = self._ids["open"], self._ids["close"]
        ids = open_thinking(prompt_ids, opened, self._ids["empty"] if profile.off else opened)
        most = len(ids) if profile.off else len(ids) + profile.max_tokens + len(close)
        if most >= self._context_tokens:
            raise AskRejectedError(
                f"the prompt of role {ask.role!r} at step {ask.step_path!r} and its thinking may take {most} tokens",
                expected=f"fewer than {self._context_tokens}, the engine's context, so that an answer fits",
                remedy="Lower the thinking's max_tokens, shorten the inputs, or raise max_model_tokens.",
            )
        return ids

    def reader(self, ask: Ask) -> ReplyReader:
        """What reads the reply to `ask`."""
        thinks = ask.thinking is not None and not ask.thinking.off
        return ReplyReader(end_tag(self._tokenizer, self._tags.close) if thinks else None, ask.max_tokens)


class ReplyReader:
    """Reads a reply as it is written, and separates thinking from answer, in text and in tokens.

    Without a `tag` all is answer. `answer_limit` is the number of tokens the answer may have.
    """

    def __init__(self, tag: EndTag | None = None, answer_limit: int = 0) -> None:
        self._tag = tag
        self._answer_limit = answer_limit
        self._scanner = None if tag is None else ThinkingScanner(tag)
        self._unread = ""
        self._thinking: list[str] = []
        self._answer: list[str] = []
        self._tokens = 0
        self._text_closed = tag is None
        self._logprob: float | None = None
        self._before = (0, 0.0)  # tokens and log-probability up to the end of thinking

    def read(self, text: str, token_ids: list[int]) -> str:
        """Read one piece; returns what of it belongs to the answer."""
        self._tokens += len(token_ids)
        if self._scanner is not None:
            self._scanner.read(token_ids)
        if not self._text_closed:
            text = self._read_thinking(text)
        if self._tag is not None and not self._answer:
            text = text.lstrip()  # the line break that models write after the tag
        if text:
            self._answer.append(text)
        return text

    def _read_thinking(self, text: str) -> str:
        assert self._tag is not None
        self._unread += text
        thought, closed, answer = self._unread.partition(self._tag.text)
        if closed:
            self._text_closed = True
            self._thinking.append(thought)
            self._unread = ""
            return answer
        kept = max(len(self._unread) - len(self._tag.text), 0)
        self._thinking.append(self._unread[:kept])
        self._unread = self._unread[kept:]
        return ""

    @property
    def full(self) -> bool:
        """Whether the answer has all the tokens it may have. Engines bound thinking and answer together only."""
        return self._scanner is not None and self._tokens - self._scanner.tokens >= self._answer_limit

    def note_logprob(self, total: float | None) -> None:
        """Keep the log-probability of the reply up to the piece just read; None where the engine was not asked."""
        self._logprob = total
        if total is not None and self._scanner is not None and self._scanner.tokens >= self._tokens:
            self._before = (self._tokens, total)

    @property
    def mean_logprob(self) -> float | None:
        """Mean log-probability of the answer's tokens in nats; None when none was reported, or there is no answer."""
        tokens, before = self._before
        if self._logprob is None or self._tokens <= tokens:
            return None
        return min((self._logprob - before) / (self._tokens - tokens), 0.0)

    @property
    def answer(self) -> str:
        """The answer so far."""
        return "".join(self._answer)

    @property
    def thinking(self) -> str:
        """The text of the thinking, stripped; the whole reply when thinking never ended."""
        return ("".join(self._thinking) + self._unread).strip()

    @property
    def thinking_tokens(self) -> int:
        """Tokens of thinking."""
        return 0 if self._scanner is None else self._scanner.thought

    @property
    def answer_tokens(self) -> int:
        """All other tokens: the end tag, the answer and its end."""
        return self._tokens - self.thinking_tokens
