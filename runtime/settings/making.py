"""How variants are made on this machine, apart from what a recipe says."""

from __future__ import annotations

from pydantic import Field

from ...agents.frozen_model import FrozenModel

__all__ = ["MakingSettings"]


class MakingSettings(FrozenModel):
    """How `metier make` computes; nothing here changes which variant a recipe describes.

    >>> MakingSettings(threads=1).threads
    1
    """

    threads: int | None = Field(default=None, ge=1)
    """CPU threads to train, prune and quantise on. None is OMP_NUM_THREADS where that is set, else as many as other
    programs leave cores free at the start: two threads that wait for each other on a busy machine take minutes for what
    one does in seconds. The number may change the last digits of what is learned."""
