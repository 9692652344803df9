"""The messages between a supervised engine and its host process: one JSON object a line, over a socket pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ....agents import errors
from ....agents.errors import EngineError, MetierError
from ....agents.messages import Ask, Reply, Usage
from ...settings.engine import EngineSettings
from ...slots.adapter import LoadedAdapter, SwapCost
from ..engine import EngineCounters

__all__ = [
    "Abandoned",
    "Abort",
    "Answered",
    "Beat",
    "Begin",
    "Died",
    "Failed",
    "FromHost",
    "Generate",
    "Load",
    "Quit",
    "Ready",
    "Swapped",
    "Text",
    "ToHost",
    "Unload",
    "from_host",
    "to_host",
    "to_line",
]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Call(_Line):
    """A line that belongs to one call: an ask, or an adapter's loading or unloading."""

    key: int
    """Number of the call; every line back about it carries the same one."""


class _Outcome(_Call):
    """A line that ends a call."""

    counters: EngineCounters
    """The engine's totals right after the call, so that the other process can account without asking."""


class Begin(_Line):
    """Start the engine."""

    op: Literal["begin"] = "begin"
    name: str
    """What messages and events call the engine."""
    weights: Path
    """Folder of the checkpoint."""
    dtype: str
    """Format of the weights in memory, as vLLM names it; `auto` leaves it to the checkpoint."""
    adapters: bool
    """Whether adapters will be loaded; an engine without is lighter."""
    settings: EngineSettings


class Generate(_Call):
    """Answer an ask; its pieces as they come when `stream`."""

    op: Literal["generate"] = "generate"
    ask: Ask
    adapter: LoadedAdapter | None = None
    intuition: tuple[float, ...] | None = None
    """The run's semantic vector where the adapter is a T-REX one, r1·r2 values."""
    stream: bool = False
    """Send `Text` lines on the way."""


class Abort(_Call):
    """The asker is gone: abort this ask."""

    op: Literal["abort"] = "abort"


class Load(_Call):
    """Load an adapter."""

    op: Literal["load"] = "load"
    adapter: LoadedAdapter


class Unload(_Call):
    """Take an adapter out."""

    op: Literal["unload"] = "unload"
    adapter: LoadedAdapter


class Quit(_Line):
    """Shut the engine down and end."""

    op: Literal["quit"] = "quit"


class Ready(_Line):
    """The engine can answer; `pids` are the processes that hold it, the host first."""

    op: Literal["ready"] = "ready"
    pids: tuple[int, ...]
    counters: EngineCounters


class Text(_Call):
    """A piece of an answer."""

    op: Literal["text"] = "text"
    piece: str


class Answered(_Outcome):
    """The whole reply."""

    op: Literal["answered"] = "answered"
    reply: Reply


class Failed(_Call):
    """What was asked under `key` failed; `usage` is what an ask had used."""

    op: Literal["failed"] = "failed"
    kind: str
    """Class name of the error, in agents/errors.py."""
    problem: str
    expected: str = ""
    remedy: str = ""
    usage: Usage | None = None
    counters: EngineCounters | None = None

    @classmethod
    def from_error(
        cls, key: int, error: MetierError, usage: Usage | None = None, counters: EngineCounters | None = None
    ) -> Failed:
        """The line that carries `error` to the other process."""
        kind = type(error).__name__
        return cls(
            key=key,
            kind=kind,
            problem=error.problem,
            expected=error.expected,
            remedy=error.remedy,
            usage=usage,
            counters=counters,
        )

    def to_error(self) -> MetierError:
        """The error again, of the class it had."""
        kind: type[MetierError] = getattr(errors, self.kind, EngineError)
        return kind(self.problem, expected=self.expected, remedy=self.remedy)


class Abandoned(_Outcome):
    """An aborted ask has ended; this is what it used."""

    op: Literal["abandoned"] = "abandoned"
    usage: Usage


class Swapped(_Outcome):
    """An adapter was loaded or taken out."""

    op: Literal["swapped"] = "swapped"
    cost: SwapCost


class Beat(_Line):
    """The processes that compute are alive."""

    op: Literal["beat"] = "beat"


class Died(_Line):
    """The engine is gone; the host ends too."""

    op: Literal["died"] = "died"
    reason: str


ToHost = Begin | Generate | Abort | Load | Unload | Quit
FromHost = Ready | Text | Answered | Failed | Abandoned | Swapped | Beat | Died

_to_host: TypeAdapter[ToHost] = TypeAdapter(Annotated[ToHost, Field(discriminator="op")])
_from_host: TypeAdapter[FromHost] = TypeAdapter(Annotated[FromHost, Field(discriminator="op")])


def to_line(message: ToHost | FromHost) -> bytes:
    """A message as one line."""
    return message.model_dump_json().encode() + b"\n"


def to_host(line: bytes) -> ToHost:
    """The message in a line that the host received."""
    return _to_host.validate_json(line)


def from_host(line: bytes) -> FromHost:
    """The message in a line that the host sent."""
    return _from_host.validate_json(line)
