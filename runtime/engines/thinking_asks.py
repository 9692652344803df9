"""What thinking adds to an ask before vLLM gets it, and how it is separated from the answer in the reply."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from ...agents.chat.chat_template import ChatTemplate
from ...agents.errors import AskRejectedError
from ...agents.messages import Ask
from ...agents.sampling import WrittenToken
from ...agents.thinking import ThinkingProfile
from ..plugin.thinking.budget_forcing import ThinkingRules
from ..plugin.thinking.end_tag import EndTag, ThinkingScanner, end_tag, tag_token_ids
from ..plugin.wire import plugin_status
from .stop_texts import StopTexts

__all__ = ["ReplyReader", "ThinkingAsks"]


class ThinkingAsks:
    """The thinking of one engine's asks, in the process that builds its prompts: the tags as tokens of its model."""

    def __init__(self, template: ChatTemplate, *, context_tokens: int) -> None:
        self._template = template
        self._context_tokens = context_tokens

    @cached_property
    def _ids(self) -> dict[str, tuple[int, ...]]:
        return tag_token_ids(self._template.tokenizer, self._template.thinking.tags)

    def rules(self, ask: Ask, prompt_tokens: int) -> ThinkingRules | None:
        """What the logits processor is to keep to, None for an ask that does not think; its prompt has so many tokens.

        Where the chat template opens thinking although nothing is said about it, the ask thinks for as many tokens as
        its answer may have, at most.
        Raises: AskRejectedError when this engine cannot do it, or the longest thinking would leave no room for an
        answer; SettingsError when its tokenizer loses the tags.
        """
        profile = ask.thinking
        if profile is None and self._template.thinking.opens:
            room = self._context_tokens - prompt_tokens - len(self._ids["close"]) - 1
            profile = ThinkingProfile(max_tokens=max(min(ask.max_tokens, room // 2), 1))
        if profile is None:
            return None
        close = self._ids["close"]
        most = prompt_tokens if profile.off else prompt_tokens + profile.max_tokens + len(close)
        if most >= self._context_tokens:
            raise AskRejectedError(
                f"the prompt of role {ask.role!r} at step {ask.step_path!r} and its thinking may take {most} tokens",
                expected=f"fewer than {self._context_tokens}, the engine's context, so that an answer fits",
                remedy="Lower the thinking's max_tokens, shorten the inputs, or raise max_model_tokens.",
            )
        if profile.off:
            return None
        status = plugin_status().get("thinking", "not registered")
        if not status.startswith("active"):
            raise AskRejectedError(
                f"the ask of role {ask.role!r} at step {ask.step_path!r} thinks, and the plugin's thinking is {status}",
                expected="an engine with the plugin",
                remedy="Unset METIER_PLUGIN, or set the role's thinking to off.",
            )
        return ThinkingRules(profile, self._template.thinking.tags.close, close, self._ids["wait"])

    def reader(self, ask: Ask, rules: ThinkingRules | None) -> ReplyReader:
        """What reads the reply to an ask with these rules.

        A model whose template knows thinking may begin to think by itself, if nobody has told it not to and no grammar
        keeps it from doing so.
        """
        thinking = self._template.thinking
        stop = ask.sampling.stop
        if rules is not None:
            return ReplyReader(end_tag(self._template.tokenizer, rules.close), ask.max_tokens, stop=stop)
        if not thinking.known or ask.thinking is not None or ask.answer_schema is not None:
            return ReplyReader(stop=stop)
        tag = end_tag(self._template.tokenizer, thinking.tags.close)
        return ReplyReader(tag, ask.max_tokens, may_open=thinking.tags.open.strip(), stop=stop)


class ReplyReader:
    """Reads a reply as it is written, and separates thinking from answer, in text and in tokens.

    Without a `tag` all is answer. `answer_limit` is the number of tokens the answer may have. With `may_open` the reply
    thinks only if it begins with that tag; otherwise thinking is open when it begins. The answer ends before the texts
    of `stop`.
    """

    def __init__(
        self, tag: EndTag | None = None, answer_limit: int = 0, *, may_open: str = "", stop: tuple[str, ...] = ()
    ) -> None:
        self._tag = tag
        self._answer_limit = answer_limit
        self._may_open = may_open
        self._scanner = None if tag is None else ThinkingScanner(tag)
        self._unread = ""
        self._thinking: list[str] = []
        self._answer: list[str] = []
        self._begun = False
        self._stop = StopTexts(stop)
        self._written: list[tuple[int, WrittenToken]] = []  # with the length of the answer before them
        self._tokens = 0
        self.in_pieces = tag is not None or bool(stop)
        """Whether the reply may hold thinking or be ended by a text, so that it has to be read in pieces."""
        self._text_closed = tag is None
        self._logprob: float | None = None
        self._before = (0, 0.0)  # tokens and log-probability up to the end of thinking

    @property
    def parts(self) -> bool:
        """Whether the reply may hold thinking, so that it has to be read in pieces."""
        return self._tag is not None

    def read(
        self, text: str, token_ids: Sequence[int], *, last: bool = False, written: Sequence[WrittenToken] = ()
    ) -> str:
        """Read one piece, the `last` one perhaps; returns what of it belongs to the answer.

        `written` are its tokens, where they are to be reported.
        """
        self._tokens += len(token_ids)
        self._written.extend((self._stop.length, token) for token in written)
        if self._scanner is not None:
            self._scanner.read(token_ids)
        if self._may_open:
            text = self._read_beginning(text, last)
        if not self._text_closed and not self._may_open:
            text = self._read_thinking(text)
        if self._tag is not None and not self._begun:
            text = text.lstrip()  # the line break that models write after the tag
        self._begun = self._begun or bool(text)
        text = self._stop.read(text, last=last or self.full)
        if text:
            self._answer.append(text)
        return text

    def _read_beginning(self, text: str, last: bool) -> str:
        """Find out whether the reply begins with thinking; returns what is to be read on, once that is known."""
        self._unread += text
        begun = self._unread.lstrip()
        if not begun.startswith(self._may_open):
            if self._may_open.startswith(begun) and not last:
                return ""
            self._tag, self._scanner, self._text_closed, self._before = None, None, True, (0, 0.0)
        else:
            begun = begun.removeprefix(self._may_open)
        text = self._unread if self._tag is None else begun
        self._may_open = self._unread = ""
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
        """Whether the answer has ended without the engine's knowing: at a text, or with all the tokens it may have.

        Engines bound thinking and answer together only.
        """
        if self._stop.found:
            return True
        return self._scanner is not None and self._tokens - self._scanner.tokens >= self._answer_limit

    @property
    def stopped(self) -> bool:
        """Whether a text has ended the answer."""
        return self._stop.found

    @property
    def written(self) -> tuple[WrittenToken, ...]:
        """The answer's tokens, where they are reported: without those of thinking and of what ended it."""
        answer = self._written if self._scanner is None else self._written[self._scanner.tokens :]
        end = self._stop.passed if self._stop.found else None
        return tuple(token for start, token in answer if end is None or start < end)

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
