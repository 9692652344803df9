"""Every error that `metier` raises on purpose, as one tree.

MetierError
├── SettingsError          a setting is unknown or out of range
├── ChatTemplateError      messages that a model's chat template cannot write
├── GraphError             a workflow is wrong; raised while it is built
├── TaskSetError           a task set cannot be made or scored
├── RecipeError            a recipe is wrong; raised when it is loaded
├── VariantError           something on the shelf is wrong
│   ├── UnknownVariantError
│   ├── AdapterError       an adapter folder cannot be served
│   └── BaseModelError     a base model folder cannot be used
├── TrainingError          tuning went wrong (not finite, cannot resume)
│   └── QualityError       a method's result loses more of the role's quality than the recipe allows
├── AssignmentError        an assignment is wrong or names what is not there
│   └── InfeasibleError    no assignment meets the limits
├── ProfileError           what a probe measured cannot be used
├── RunError               one run of a workflow failed
│   ├── AnswerError        a reply does not fit the type its role gives
│   ├── StepError          a Python function step raised
│   ├── StepTimeoutError
│   ├── LoopLimitError     a loop reached its last round and had to succeed
│   ├── LimitError         a run passed its limit of tokens or seconds
│   ├── ToolError          a role's tool, or the server it is on, cannot be used
│   └── RunInterrupted     a run waits for a person's answer
├── EngineError            an engine cannot do what it was asked
│   ├── AskRejectedError   this ask only (prompt too long, bad schema)
│   │   ├── NotServedError a server has no model of that name
│   │   └── ContextError   the prompt leaves no room in the model's context
│   ├── NotFiniteError     what this ask computes is not finite, so that it has no answer
│   ├── EngineDeadError    the engine is gone; the pool restarts it
│   └── PluginError        vLLM is not the version the plugin was written for
├── SessionError           a session is used where it cannot be, or after its end
├── ServerError            `metier serve` cannot start, or refuses a request
└── StoreError             the run store cannot be read or written
    └── ResumeError        a run cannot be resumed as asked
        └── RunTakenError  another process is at the run
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

__all__ = [
    "AdapterError",
    "AnswerError",
    "AskRejectedError",
    "AssignmentError",
    "BaseModelError",
    "ChatTemplateError",
    "ContextError",
    "EngineDeadError",
    "EngineError",
    "GraphError",
    "InfeasibleError",
    "LimitError",
    "LoopLimitError",
    "MetierError",
    "NotFiniteError",
    "NotServedError",
    "PluginError",
    "ProfileError",
    "QualityError",
    "RecipeError",
    "ResumeError",
    "RunError",
    "RunInterrupted",
    "RunTakenError",
    "ServerError",
    "SessionError",
    "SettingsError",
    "StepError",
    "StepTimeoutError",
    "StoreError",
    "TaskSetError",
    "ToolError",
    "TrainingError",
    "UnknownVariantError",
    "VariantError",
    "first_error",
]


class MetierError(Exception):
    """Base of every error raised on purpose; says the value, what was expected, what to change.

    `problem` names the offending value, `expected` what would have been right, `remedy` what to change.
    """

    def __init__(self, problem: str, *, expected: str = "", remedy: str = "") -> None:
        self.problem = problem
        self.expected = expected
        self.remedy = remedy
        super().__init__(problem)

    def __str__(self) -> str:
        parts = [self.problem]
        if self.expected:
            parts.append(f"expected {self.expected}")
        text = "; ".join(parts)
        text = f"{text}. {self.remedy}" if self.remedy else text
        # What was typed may hold bytes that are no text; an error that cannot be printed says nothing.
        return text.encode("utf-8", "backslashreplace").decode()

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only fields would be lost by the default pickling, and errors cross process borders.
        return (_rebuild, (type(self), self.problem, self.expected, self.remedy))


def _rebuild(cls: type[MetierError], problem: str, expected: str, remedy: str) -> MetierError:
    return cls(problem, expected=expected, remedy=remedy)


class SettingsError(MetierError):
    """A setting is unknown or out of range."""


class ChatTemplateError(MetierError):
    """Messages that a model's chat template cannot write."""


class GraphError(MetierError):
    """A workflow is wrong; raised while it is built, before anything runs."""


class TaskSetError(MetierError):
    """A task set cannot be made or scored."""


class RecipeError(MetierError):
    """A recipe is wrong; raised when it is loaded, before anything is trained."""


class VariantError(MetierError):
    """Something on the shelf is wrong."""


class UnknownVariantError(VariantError):
    """No variant of that name or id is on the shelf."""


class AdapterError(VariantError):
    """An adapter folder cannot be served on this base."""


class BaseModelError(VariantError):
    """A base model folder cannot be used."""


class TrainingError(MetierError):
    """Tuning went wrong: not finite, or a checkpoint that does not fit the recipe."""


class QualityError(TrainingError):
    """The result of a recipe's first method loses more of the role's quality than allowed, so nothing is kept."""


class AssignmentError(MetierError):
    """An assignment is wrong, or names a role or variant that is not there."""


class InfeasibleError(AssignmentError):
    """No assignment meets the limits; says which of them binds, and what would be feasible."""


class ProfileError(MetierError):
    """What a probe measured cannot be used: missing, not a number, or of another workflow."""


class RunError(MetierError):
    """One run of a workflow failed; other runs are not affected."""


class AnswerError(RunError):
    """A reply does not fit the type its role gives, also after the correction ask."""


class StepError(RunError):
    """A Python function step raised; the cause is chained."""


class StepTimeoutError(RunError):
    """A step took longer than its `timeout_s`, in every attempt it had."""


class LoopLimitError(RunError):
    """A loop with `on_limit="fail"` reached its last round unsatisfied."""


class LimitError(RunError):
    """A run passed its own limit of tokens or seconds and was stopped."""


class ToolError(RunError):
    """A tool of a role cannot be used as asked: arguments that do not fit, a server that cannot be reached."""


class RunInterrupted(RunError):
    """The run `run_id` waits for a person; `questions` maps each waiting step path to its question."""

    def __init__(
        self,
        problem: str,
        *,
        expected: str = "",
        remedy: str = "",
        questions: dict[str, str] | None = None,
        run_id: str = "",
    ) -> None:
        super().__init__(problem, expected=expected, remedy=remedy)
        self.questions = questions or {}
        self.run_id = run_id


class EngineError(MetierError):
    """An engine cannot do what it was asked."""


class AskRejectedError(EngineError):
    """The engine refuses this ask only (prompt longer than the context, impossible schema)."""


class NotServedError(AskRejectedError):
    """The server has no model of the name the ask was sent to."""


class ContextError(AskRejectedError):
    """The prompt leaves no room for an answer in the model's context."""


class NotFiniteError(EngineError):
    """What the model computes for this ask is not finite, so that it has no answer; other asks are not affected."""


class EngineDeadError(EngineError):
    """The engine is gone; the pool restarts it and retries the asks."""


class PluginError(EngineError):
    """vLLM is not what the plugin was written for, or the plugin is not active."""


class SessionError(MetierError):
    """A session is used where it cannot be (a plain one on an event loop), or before or after its block."""


class ServerError(MetierError):
    """The server cannot start (port taken, no key for an open address), or refuses a request."""


class StoreError(MetierError):
    """The run store cannot be read or written."""


class ResumeError(StoreError):
    """A run cannot be resumed as asked."""


class RunTakenError(ResumeError):
    """Another process is at the run."""


def did_you_mean(
    name: str, known: Iterable[str], otherwise: str, *, most: int = 1, whole: Mapping[str, str] | None = None
) -> str:
    """A remedy for a misspelt name: the `most` closest of the known ones, or `otherwise` where none is close.

    `whole` maps a known name to how it is written in full, where that is more.
    """
    close = difflib.get_close_matches(name, list(known), n=most)
    said = [repr((whole or {}).get(one, one)) for one in close]
    return f"Did you mean {' or '.join(said)}?" if said else otherwise


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error of a task group to show: unexpected errors before those raised on purpose."""
    errors = group.exceptions
    worst = next((e for e in errors if not isinstance(e, MetierError | BaseExceptionGroup)), errors[0])
    return first_error(worst) if isinstance(worst, BaseExceptionGroup) else worst
