"""What a request to a T-REX adapter has beyond one to a LoRA: a checked semantic vector, and a cache key of its own."""

from __future__ import annotations

import hashlib
import math
import struct
from typing import get_args

from ...agents.errors import AdapterError, AskRejectedError
from ...specializers.adapters.trex_shape import read_trex_shape
from ..plugin.wire import plugin_status
from ..settings.engine import EngineSettings, SlotRank
from ..slots.adapter import LoadedAdapter
from .engine import EngineRequest

__all__ = ["TrexAdapters", "cache_salt"]

_AS_LORA = "export the adapter with `metier variants export NAME OUT --as lora --recipe RECIPE.yaml`"


class TrexAdapters:
    """Which of an engine's adapters are T-REX ones and how many experts each has; one object per engine."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._experts: dict[int, int] = {}

    def admit(self, adapter: LoadedAdapter) -> None:
        """Note an adapter about to be loaded; raises AdapterError when this engine cannot serve it token-exact."""
        shape = read_trex_shape(adapter.path)
        if shape is None:
            self._experts.pop(adapter.number, None)
            return
        reason = remedy = ""
        if self._settings.tensor_parallel > 1:
            # Each rank of a row-parallel layer holds part of the router's columns, so its logits are partial sums.
            reason = f"tensor_parallel is {self._settings.tensor_parallel}, and the softmax needs whole router logits"
            remedy = f"Set tensor_parallel to 1, or {_AS_LORA}."
        elif not plugin_status().get("trex", "").startswith("active"):
            status = plugin_status().get("trex", "not registered")
            reason = f"the plugin's T-REX part is {status}"
            remedy = f"Unset METIER_PLUGIN, or {_AS_LORA}."
        elif shape.rows > self._settings.slot_rank:
            reason = f"slot_rank is {self._settings.slot_rank}, and r1 + r1·r2 = {shape.rows} rows are needed"
            remedy = (
                f"Set slot_rank to {next((r for r in get_args(SlotRank) if r >= shape.rows), 'more than there is')}."
            )
        if reason:
            raise AdapterError(
                f"T-REX adapter {adapter.id!r} in {adapter.path} cannot be served: {reason}",
                expected="an engine that runs the token gate",
                remedy=remedy,
            )
        self._experts[adapter.number] = shape.experts

    def drop(self, adapter: LoadedAdapter) -> None:
        """Forget an adapter that was unloaded."""
        self._experts.pop(adapter.number, None)

    def check(self, request: EngineRequest) -> None:
        """Raise AskRejectedError unless the request has exactly the semantic vector that its adapter needs."""
        c, adapter = request.intuition, request.adapter
        experts = None if adapter is None else self._experts.get(adapter.number)
        if experts is None:
            if c is not None:
                raise _rejected(request, "a semantic vector, but no T-REX adapter", "no semantic vector")
            return
        wanted = f"{experts} finite numbers, one per expert of adapter {adapter.id!r}" if adapter else ""
        if c is None:
            raise _rejected(request, "a T-REX adapter, but no semantic vector", wanted)
        if len(c) != experts:
            raise _rejected(request, f"a semantic vector of {len(c)} numbers", wanted)
        if not all(map(math.isfinite, c)):
            raise _rejected(request, "a semantic vector with numbers that are not finite", wanted)


def cache_salt(request: EngineRequest) -> str | None:
    """The salt of a request's blocks in the prefix cache: None, or a hash of adapter and semantic vector.

    A T-REX layer's keys and values depend on c, so only requests of the same adapter and the same c may share them.
    """
    if request.intuition is None or request.adapter is None:
        return None
    packed = struct.pack(f"<{len(request.intuition)}d", *request.intuition)
    return hashlib.sha256(request.adapter.id.encode() + b"\0" + packed).hexdigest()[:32]


def _rejected(request: EngineRequest, has: str, expected: str) -> AskRejectedError:
    ask = request.ask
    return AskRejectedError(
        f"the ask of role {ask.role!r} at step {ask.step_path!r} has {has}",
        expected=expected,
        remedy="The pool makes the vector from the run's task text with the adapter's own semantic map.",
    )
