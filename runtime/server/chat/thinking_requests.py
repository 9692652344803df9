"""How long to think, in the words of several clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from ....agents.thinking import THINKING_OFF, ThinkingProfile
from ...settings.server import ThinkingEfforts
from .client_body import ClientBody, Unserved

__all__ = ["Effort", "Reasoning", "TemplateOptions", "asked_thinking"]

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Reasoning(ClientBody):
    """`reasoning` of responses, and of OpenRouter's chat completions."""

    unserved: ClassVar[Mapping[str, Unserved]] = {
        "summary": Unserved("thoughts come as they are, not summed up"),
        "generate_summary": Unserved("thoughts come as they are, not summed up"),
        "context": Unserved("earlier thoughts are not asked with", ("auto", "current_turn")),
        "mode": Unserved("there is one mode", ("standard",)),
        "exclude": Unserved("thinking comes with the answer; `thinking: off` has none", (False,)),
    }

    effort: Effort | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    enabled: bool | None = None


class TemplateOptions(ClientBody):
    """`chat_template_kwargs` of vLLM's clients: whether to think."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


def asked_thinking(
    efforts: ThinkingEfforts,
    thinking: ThinkingProfile | None,
    effort: Effort | None,
    reasoning: Reasoning | None,
    template: TemplateOptions | None,
) -> ThinkingProfile | None:
    """What a request says of thinking, the most exact of its words; None where it says nothing."""
    if thinking is not None:
        return thinking
    if reasoning is not None:
        if reasoning.max_tokens is not None:
            return ThinkingProfile(max_tokens=reasoning.max_tokens)
        effort = effort or reasoning.effort
    if effort is not None:
        return ThinkingProfile(max_tokens=efforts.tokens(effort))
    said = None if reasoning is None else reasoning.enabled
    if template is not None:
        said = template.enable_thinking if template.enable_thinking is not None else template.thinking
    if said is None:
        return None
    return ThinkingProfile(max_tokens=efforts.medium) if said else THINKING_OFF
