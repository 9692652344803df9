"""vLLM's reasoning parser for engines of ours: where a grammar begins in an ask that thinks before it answers.

vLLM's own parsers look for one token; an end tag of several is found here by the text its tokens make.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.reasoning.abs_reasoning_parsers import ReasoningParser

from ....agents.chat.chat_template import ChatTemplate
from .end_tag import end_tag

__all__ = ["EndTagParser"]

_PROMPT_END_TOKENS = 32


class EndTagParser(ReasoningParser):
    """Finds the end of thinking. Made by vLLM for each request with a grammar that thinks; `close` is its end tag.

    Our engines pass with each request whether it thinks. Elsewhere (`vllm serve --reasoning-parser metier`) a prompt
    thinks if it ends with the open tag of the model's chat template.
    """

    def __init__(self, tokenizer: Any, *args: Any, close: str = "", **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._close = end_tag(tokenizer, close or self._template.thinking.tags.close)

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether a prompt leaves no thinking open, so that its grammar holds from the first token."""
        tail: str = self._tokenizer.decode(list(input_ids[-_PROMPT_END_TOKENS:]), skip_special_tokens=False)
        return not tail.rstrip().endswith(self._template.thinking.tags.open.rstrip())

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether the last token read completes the end tag."""
        return self._close.ends(list(input_ids[-len(self._close.text) :]))

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """The tokens behind the end tag."""
        for end in range(1, len(input_ids) + 1):
            if self._close.ends(input_ids[:end]):
                return input_ids[end:]
        return []

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """(thinking, answer) of a whole reply; all is thinking where the tag is missing."""
        thinking, closed, answer = model_output.partition(self._close.text)
        return thinking, answer if closed else None

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> Any:
        """One piece of a streamed reply as thinking, answer or both."""
        from vllm.entrypoints.generate.base.protocol import DeltaMessage

        if self._close.text in previous_text:
            return DeltaMessage(content=delta_text)
        thinking, closed, answer = current_text.partition(self._close.text)
        if not closed:
            return DeltaMessage(reasoning=delta_text)
        return DeltaMessage(reasoning=thinking[len(previous_text) :] or None, content=answer or None)
