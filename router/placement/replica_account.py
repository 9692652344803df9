"""What a driver knows about a replica from the asks it has sent there itself, without asking the replica."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from .placement import PlacedAsk, ReplicaState

__all__ = ["ReplicaAccount"]


class ReplicaAccount:
    """Keeps the `state` of one replica for `place`: updated with every ask that begins or ends there.

    Assumes that adapters are evicted as in `AdapterSlots`: the longest idle one first, when another needs its slot.
    Of the conversations, the last `conversations_kept` are remembered.
    """

    def __init__(self, name: str, *, adapter_slots: int, conversations_kept: int = 1024) -> None:
        self._adapters: dict[str, int] = {}  # the longest unused first
        self._conversations: OrderedDict[str, int] = OrderedDict()
        self._kept = conversations_kept
        self.state = ReplicaState(name, adapter_slots, self._adapters, 0, self._conversations)

    @contextmanager
    def answering(self, ask: PlacedAsk) -> Iterator[None]:
        """Count an ask as in flight within the block; afterwards its prompt counts as cached unless it failed."""
        cached = self._conversations.pop(ask.conversation, 0)
        tokens = max(ask.prompt_tokens - cached, 0) + ask.answer_tokens
        self.state.outstanding_tokens += tokens
        self._remember(ask.conversation, max(ask.prompt_tokens, cached))
        self._use(ask.adapter, 1)
        try:
            yield
        except BaseException:
            self._conversations.pop(ask.conversation, None)
            raise
        finally:
            self.state.outstanding_tokens -= tokens
            self._use(ask.adapter, -1)

    def forget(self) -> None:
        """The replica was restarted: nothing is resident or cached but what is in flight."""
        self._conversations.clear()
        for adapter in [adapter for adapter, asks in self._adapters.items() if not asks]:
            del self._adapters[adapter]

    def _use(self, adapter: str | None, asks: int) -> None:
        if adapter is None:
            return
        self._adapters[adapter] = self._adapters.pop(adapter, 0) + asks
        idle = [adapter for adapter, asks in self._adapters.items() if not asks]
        for longest_idle in idle[: max(len(self._adapters) - self.state.adapter_slots, 0)]:
            del self._adapters[longest_idle]

    def _remember(self, conversation: str, tokens: int) -> None:
        self._conversations[conversation] = tokens
        if len(self._conversations) > self._kept:
            self._conversations.popitem(last=False)
