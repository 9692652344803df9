"""Serve's request router, for calls that say which replica they are for."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

# Serve copies this module's code, state and all; what it refers to elsewhere stays one.
from .membership import note_members

__all__ = ["AddressedRouter"]


class AddressedRouter(RequestRouter):
    """Sends a call to the replica whose id is its argument `on`.

    Where Serve no longer knows that replica, any other gets the call and says so (see `EngineReplica.take`): a call
    that waited for a replica that is gone would wait for ever.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Record which replicas are running, for the driver to read, beside what Serve does."""
        super().update_replicas(replicas)
        note_members(self._deployment_id.app_name, [replica.replica_id.unique_id for replica in replicas])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica addressed, else all."""
        wanted: Any = None if pending_request is None else pending_request.kwargs.get("on")
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        return [named or list(candidate_replicas)]
