"""An ask on its way through the stepping thread."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

from ....agents.backend import ResumedText
from ....agents.messages import Reply, Usage
from ..engine import EngineRequest
from ..loop_mailbox import LoopMailbox, Promise, deliver
from ..vllm_calls import VllmCall

__all__ = ["PendingAsk"]


@dataclass(eq=False)
class PendingAsk:
    """An ask inside an engine; made in the event loop, then touched by the stepping thread only.

    `promise` and `on_text` belong to the event loop: the thread reaches them through `mailbox`.
    """

    key: str
    request: EngineRequest
    mailbox: LoopMailbox
    promise: Promise[Reply]
    on_text: ResumedText | None
    submitted_s: float = field(default_factory=time.monotonic)
    # What vLLM was handed last, and its name there.
    call: VllmCall | None = None
    vllm_id: str = ""
    failures: int = 0
    gone: bool = False
    # Usage of a reply under way, for when the asker is gone by the time it arrives.
    late: Usage | None = None

    def begin_again(self) -> None:
        """Reset: the engine will write the reply again from the start."""
        if self.on_text is not None:
            self.mailbox.post(self.on_text.restart)

    def stream(self, piece: str) -> None:
        """Pass on a piece of the answer, if the asker streams it."""
        if piece and self.on_text is not None:
            self.mailbox.post(partial(deliver, self.on_text, piece, self.promise))
