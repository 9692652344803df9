"""Several engines in one process share vLLM's process groups; the end of one must leave them to the others.

vLLM 0.32 destroys the groups with an engine, also when one that failed to start is collected, at any later time. Ours
are kept until the process ends.
"""

from __future__ import annotations

from vllm.v1.engine import core

from .signatures import PROCESS_GROUP_METHODS, check_signatures

__all__ = ["keep_process_groups"]


def keep_process_groups() -> None:
    """Have no engine of this process destroy the groups; to be called before one is built. Safe to call again."""
    if core.cleanup_dist_env_and_memory is not _keep:
        check_signatures(PROCESS_GROUP_METHODS)
        core.cleanup_dist_env_and_memory = _keep


def _keep(shutdown_ray: bool = False) -> None:
    """In place of vLLM's function, which would destroy them."""
