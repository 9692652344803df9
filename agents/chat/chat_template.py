"""One model's chat template: what messages it takes, how thinking is opened and closed in it, and how a turn ends.

All of it is read from the template, by writing small chats with it. Serving and training make their prompts here, so
that a model is asked as it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from pydantic import Field, JsonValue, field_validator

from ..errors import ChatTemplateError, SettingsError
from ..frozen_model import FrozenModel
from ..thinking import ThinkingTags
from .chat_tokens import chat_text, chat_tokens, control_marks, text_tokens
from .template_thinking import TemplateThinking, read_thinking

__all__ = ["ChatTemplate", "TemplateSettings"]

Turn = Mapping[str, str]

# What the call of a template says by itself.
_TAKEN = frozenset(
    "conversation messages tools documents chat_template add_generation_prompt continue_final_message tokenize "
    "padding truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)
_BETWEEN = "\n\n"
"""Put between two texts that become one turn."""


class TemplateSettings(FrozenModel):
    """How a model's chat template is written, where it leaves a choice.

    Raises: SettingsError for an argument that is given by the messages themselves.

    >>> TemplateSettings(args={"enable_thinking": False}).tags is None
    True
    """

    args: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of the template, such as `enable_thinking`. A template ignores those it does not know."""

    tags: ThinkingTags | None = None
    """The text that thinking is written between. None reads it from the template."""

    @field_validator("args")
    @classmethod
    def _leaves_the_messages_alone(cls, args: dict[str, JsonValue]) -> dict[str, JsonValue]:
        taken = sorted(_TAKEN & set(args))
        if taken:
            raise SettingsError(
                f"chat template argument {taken[0]!r}",
                expected="an argument that the model's own template knows, such as enable_thinking",
                remedy="Leave it out: the messages of each ask say it.",
            )
        return args


PLAIN = TemplateSettings()


class ChatTemplate:
    """The chat template of a tokenizer. It is read when it is first used, and then kept.

    A template that refuses the system role, or leaves its text out, gets that text at the start of the first user
    turn; one whose roles have to alternate gets neighbouring turns of one role as one.
    """

    def __init__(self, tokenizer: Any, settings: TemplateSettings = PLAIN) -> None:
        self.tokenizer = tokenizer
        self.settings = settings

    def prompt(self, messages: Sequence[Turn], thinks: bool | None = None) -> list[int]:
        """Token ids of a chat, up to where the answer begins.

        `thinks` opens thinking (True) or closes it (False), whatever the template does by itself; None leaves that to
        the template. The block's tokens are made apart from the others.
        Raises: ChatTemplateError for messages that the template cannot write.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ChatTemplateError(
                "the model has no chat template",
                expected="a model that was trained on chats",
                remedy="Use its instruct version, or put a chat_template.jinja into the checkpoint's folder.",
            )
        fitted, thinking = self.fit(messages), self.thinking
        args, end, block = self.settings.args, "", ""
        if thinks is not None:
            args = {**args, **thinking.switched(thinks)}
            end = thinking.end_when_on if thinks else thinking.end_when_off
            block = thinking.tags.open if thinks else thinking.tags.empty
        try:
            ids = chat_tokens(self.tokenizer, fitted, args=args, without_end=end)
        except Exception as error:  # a template may raise any exception
            raise ChatTemplateError(
                f"the model's chat template refuses messages of the roles {', '.join(m['role'] for m in messages)}: "
                f"{error}",
                expected="messages that it can write",
                remedy="Let a user's message come first, or use a model whose template takes them.",
            ) from error
        return [*ids, *self.tag_tokens(block)] if block else ids

    def reply_tokens(self, reply: str, thought: str | None) -> list[int]:
        """Token ids of what a model is to write behind a prompt: thought, end tag, answer and the end of its turn.

        `thought` is None for a prompt behind which nothing is thought. Each piece is made into tokens by itself: so
        an engine puts them together, and `</think>{` as one text would be other tokens.
        """
        before: list[int] = []
        if thought is not None:
            before = [*text_tokens(self.tokenizer, thought), *self.tag_tokens(self.thinking.tags.close)]
        return [*before, *text_tokens(self.tokenizer, reply), self.end_of_turn]

    def tag_tokens(self, tag: str) -> list[int]:
        """Token ids of a thinking tag."""
        ids: list[int] = self.tokenizer(tag, add_special_tokens=False).input_ids
        return ids

    @cached_property
    def thinking(self) -> TemplateThinking:
        """How thinking is written in it."""
        return read_thinking(self.tokenizer, self.settings.args, self.settings.tags)

    @cached_property
    def tags_are_special(self) -> bool:
        """Whether a thinking tag holds a special token, which is left out of texts unless they are asked for."""
        tags = self.thinking.tags.open + self.thinking.tags.close
        special = (str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special)
        return any(text in tags for text in special)

    @cached_property
    def end_of_turn(self) -> int:
        """The token that ends a turn of the model: the first control token the template writes behind it.

        The tokenizer's own end, where the template writes none.
        """
        eos = int(self.tokenizer.eos_token_id)
        text = self._written(("user", "assistant"), generation_prompt=False)
        if text is None:
            return eos
        known = {self.tokenizer.convert_tokens_to_ids(mark) for mark in control_marks(self.tokenizer)}
        behind = self.tokenizer(text.rpartition(_word(1))[2], add_special_tokens=False).input_ids
        return next((int(id) for id in behind if id in known), eos)

    def fit(self, messages: Sequence[Turn]) -> list[Turn]:
        """The messages as the template takes them, none of their text left out.

        Raises: ChatTemplateError where there is no way to.
        """
        takes_system = self._takes_system
        if len(messages) > 1 and any(m["role"] == "system" for m in messages[1:]):
            takes_system = takes_system and self._takes_late_system
        turns: list[Turn] = []
        moved = False  # whether the turn before was a system's
        for number, message in enumerate(messages):
            is_moved = message["role"] == "system" and not (takes_system or (number == 0 and self._takes_system))
            turn = {**message, "role": "user"} if is_moved else message
            if turns and turns[-1]["role"] == turn["role"] and (moved or is_moved or not self._takes_repeats):
                turn = {**turn, "content": turns.pop()["content"] + _BETWEEN + turn["content"]}
            turns.append(turn)
            moved = is_moved
        first = next((m["role"] for m in turns if m["role"] != "system"), "user")
        if first == "assistant" and not self._takes_assistant_first:
            raise ChatTemplateError(
                "the model's chat template takes no conversation that the assistant begins",
                expected="a user's message first",
                remedy="Put one before it, or use a model whose template takes them.",
            )
        return turns

    @cached_property
    def _takes_system(self) -> bool:
        return self._keeps("system", "user")

    @cached_property
    def _takes_late_system(self) -> bool:
        return self._keeps("system", "user", "assistant", "system", "user")

    @cached_property
    def _takes_repeats(self) -> bool:
        return self._keeps("user", "user") and self._keeps("user", "assistant", "assistant", "user")

    @cached_property
    def _takes_assistant_first(self) -> bool:
        return self._keeps("assistant", "user")

    def _keeps(self, *roles: str) -> bool:
        """Whether the template writes the texts of all turns of such a chat. Some leave a turn out without a word."""
        text = self._written(roles)
        return text is not None and all(_word(number) in text for number in range(len(roles)))

    def _written(self, roles: Sequence[str], *, generation_prompt: bool = True) -> str | None:
        turns = [{"role": role, "content": _word(number)} for number, role in enumerate(roles)]
        try:
            return chat_text(self.tokenizer, turns, generation_prompt=generation_prompt, args=self.settings.args)
        except Exception:  # whatever it raises says that it does not take them
            return None


def _word(number: int) -> str:
    """The text of a turn of a chat that is written to see what the template does with it."""
    return f"text-{number}-of-a-turn"
